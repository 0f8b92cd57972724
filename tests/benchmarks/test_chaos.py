"Recovery as it was measured last, beside what was asked for: a row that misses its aim says so."

import re
from dataclasses import replace

import pytest

from benchmarks.__main__ import RESULTS
from benchmarks.chaos import CASES, PHASES, Outcome, row

GOOD = Outcome([dict.fromkeys(PHASES, 0.1) | {"all": 0.5}] * 3, 0, ["aa"] * 3)


def late(phase: str, seconds: float) -> Outcome:
    "With that phase, or all of them, this long."
    return replace(GOOD, phases=[one | {phase: seconds} for one in GOOD.phases])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_row_says_what_was_missed(case) -> None:
    assert "MISSED" not in row(case, GOOD, GOOD.prints)
    assert f"MISSED: under {case.target:g}" in row(case, late("all", case.target + 0.2), GOOD.prints)
    hang = "SIGSTOP" in case.name
    assert ("MISSED: under 0.2" in row(case, late("noticed", 0.3), GOOD.prints)) == (not hang), "deaths alone"
    assert ("DIFFER" in row(case, GOOD, ["bb"] * 3)) == (case.wait > 0), "fewer workers: up to rounding"


def test_what_was_measured_last_met_all_aims() -> None:
    section = RESULTS.read_text().split("\n## chaos\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith(("| killed, ", "| stopped "))]
    assert [line.split(" | ")[0].removeprefix("| ") for line in rows] == [case.name for case in CASES]
    for line, case in zip(rows, CASES):
        assert "MISSED" not in line and "DIFFER" not in line
        assert re.search(rf"\| under {case.target:g} \| 0 \|", line), "and no step was repeated"
    assert [case.target for case in CASES] == [1.0, 1.0, 5.0, 4.0]
