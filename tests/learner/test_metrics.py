"Metrics: parts merge to what the whole would give, and each is its definition."

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from learner.interpret import Outcomes
from learner.metrics import accuracy, confusion, error_rate, means, per_class, top_k


@given(st.integers(0, 20), st.integers(1, 5), st.lists(st.integers(0, 20), max_size=3), st.integers(0, 2**31))
def test_accuracy_of_parts_merges_to_that_of_the_whole(n, classes, cuts, seed) -> None:
    rng = np.random.default_rng(seed)
    preds, targets = rng.standard_normal((n, classes)), rng.integers(0, classes, n)
    parts = zip(np.split(preds, sorted(cuts)), np.split(targets, sorted(cuts)))
    right = sum(accuracy(torch.from_numpy(p), torch.from_numpy(t)).item() for p, t in parts)
    expected = (preds.argmax(1) == targets).mean() if n else math.nan
    assert means({"accuracy": (right, n)})["accuracy"] == pytest.approx(expected, nan_ok=True)


def test_an_empty_count_has_no_mean() -> None:
    assert math.isnan(means({"loss": (0.0, 0.0)})["loss"])


@given(st.integers(0, 2**31), st.tuples(st.integers(1, 9), st.integers(2, 7)), st.integers(1, 9))
def test_top_k_counts_what_sorting_finds(seed, size, k) -> None:
    torch.manual_seed(seed)
    preds, targets = torch.randn(size), torch.randint(size[1], size[:1])
    found = sum(int(t) in p.argsort(descending=True)[:k].tolist() for p, t in zip(preds, targets))
    assert int(top_k(k)(preds, targets)) == found
    assert int(error_rate(preds, targets)) == len(targets) - int(top_k(1)(preds, targets))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_prediction_that_is_no_number_is_wrong(number) -> None:
    "Also of the class that a search for the largest comes upon first."
    preds, targets = torch.full((6, 3), number), torch.tensor([0, 1, 2] * 2)
    preds[5] = torch.tensor([0.0, 0.0, 1.0])
    assert [int(metric(preds, targets)) for metric in (accuracy, top_k(3), error_rate)] == [1, 1, 5]
    rates = Outcomes.of(preds, targets, torch.arange(6), 3).rates()
    assert [rates[name] for name in ("accuracy", "top_5_accuracy", "error_rate")] == pytest.approx(
        [1 / 6, 1 / 6, 5 / 6]
    )


def test_per_class_scores_are_their_definitions_and_merge_over_ranks() -> None:
    torch.manual_seed(0)
    preds, targets = torch.randn(40, 5), torch.randint(4, (40,))
    parts = [slice(0, 7), slice(7, 7), slice(7, 40)]
    merged = sum(confusion(preds[part], targets[part]) for part in parts)
    assert torch.equal(merged, confusion(preds, targets))
    scores, chosen = per_class(merged), preds.argmax(1)
    for c, name in itertools.product(range(5), ("precision", "recall")):
        among = (chosen if name == "precision" else targets) == c
        right = ((chosen == c) & (targets == c)).sum().item()
        assert scores[name][c].item() == pytest.approx(right / max(1, among.sum().item()))
    both = scores["precision"] + scores["recall"]
    harmonic = torch.where(both > 0, 2 * scores["precision"] * scores["recall"] / both, torch.zeros(5).double())
    assert_close(scores["f1"], harmonic)
    assert scores["support"].tolist() == [(targets == c).sum().item() for c in range(5)]
