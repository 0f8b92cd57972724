"The decision which epoch is best and when to stop, over any history."

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.best import Best


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(0, 4))
def test_best_is_the_first_highest_and_patience_counts_since_then(accuracies, patience) -> None:
    best = Best(patience)
    for number, accuracy in enumerate(accuracies):
        better = best.note({"epoch": number, "accuracy": accuracy})
        first = accuracies.index(max(accuracies[: number + 1]))
        assert better == (first == number)
        assert best.row is not None and best.row["epoch"] == first
        assert best.exhausted == (patience > 0 and number - first >= patience)
