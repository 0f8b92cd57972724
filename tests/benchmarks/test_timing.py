"Timing in turn."

from collections import Counter
from itertools import pairwise

import pytest

from benchmarks.timing import interleaved


@pytest.mark.parametrize("n", [2, 3, 4])
def test_each_alternative_comes_as_often_after_each_other_one(n: int) -> None:
    "Within a round; what one leaves behind (a warm cache, a busy disk) then favours nobody."
    came: list[str] = []
    seconds = interleaved({name: lambda name=name: came.append(name) for name in "abcd"[:n]}, 8 * n - 1)
    assert all(len(times) == 8 * n - 1 for times in seconds.values())
    rounds = [came[start : start + n] for start in range(0, len(came), n)]
    assert all(len(set(names)) == n for names in rounds)
    assert len({tuple(Counter(names[place] for names in rounds).values()) for place in range(n)}) == 1
    after = Counter(pair for names in rounds for pair in pairwise(names))
    assert all(after[a, b] == after[b, a] for a, b in after)


def test_what_times_itself_is_believed() -> None:
    assert interleaved({"a": lambda: 3.5, "b": lambda: 0.25}, 2) == {"a": [3.5, 3.5], "b": [0.25, 0.25]}
