"What was asked for stands beside what was measured, and what misses it says so."

import re

import pytest

from benchmarks.__main__ import RESULTS
from benchmarks.timing import aim


def test_an_aim_names_what_misses_it() -> None:
    assert aim(1.3, [1.2, 1.3, 9.0]) == "1.3"
    assert aim(1.3, [1.2], [1.0, 1.69, 2.0]) == "1.3 MISSED: 1.69"
    assert aim(1.03, [1.0324]) == "1.03 MISSED: 1.032"
    assert aim(3.5, [3.4], least=True) == "3.5 MISSED: 3.4"
    assert aim(3.5, [3.5], least=True) == "3.5"


ASKED = {  # the aims of each table, from left to right and from top to bottom
    "epoch": [1.3, 1.05, 2.0, 1.3, 1.1, 2.0, 1.36, 1.15, 2.0, 1.36, 1.2, 2.0],
    "decoding": [3.5, 3.5],
    "step": [0.9, 1.0],
    "driver": [1.03, 3.0, 1.03, 3.0, 10.0],
}


def rounds_to(exact: str, shown: str) -> bool:
    "Whether the table shows that number so."
    return f"{float(exact):.{len(shown.partition('.')[2])}f}" == shown


@pytest.mark.parametrize("name", ASKED)
def test_what_was_measured_last_misses_no_aim_in_silence(name: str) -> None:
    section = RESULTS.read_text().split(f"\n## {name}\n")[1].split("\n## ")[0]
    rows = [re.split(r" *\| *", line)[1:-1] for line in section.splitlines() if line.startswith("|")]
    columns = next([i for i, cell in enumerate(row) if cell == "aim"] for row in rows if "aim" in row)
    found = []
    for row in (row for row in rows if len(row) > max(columns)):
        for first, column in zip([0, *(i + 1 for i in columns)], columns):
            if told := re.match(r"[\d.]+", row[column]):
                measured = [cell for cell in row[first:column] if "median" in cell] or [row[column - 1]]
                cells = [re.split(r"[ %]", cell)[0] for cell in measured]
                exact = re.findall(r"[\d.]+", row[column])[1:]  # with more digits than the table has
                medians = [[float(next((e for e in exact if rounds_to(e, cell)), cell))] for cell in cells]
                assert row[column] == aim(float(told[0]), *medians, least=name == "decoding")
                found.append(float(told[0]))
    assert found == ASKED[name]
