"Metrics: parts merge to what the whole would give."

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.errors import UserError
from learner.metrics import accuracy, means, merge


@given(st.integers(0, 20), st.integers(1, 5), st.lists(st.integers(0, 20), max_size=3), st.integers(0, 2**31))
def test_accuracy_of_parts_merges_to_that_of_the_whole(n, classes, cuts, seed) -> None:
    rng = np.random.default_rng(seed)
    preds, targets = rng.standard_normal((n, classes)), rng.integers(0, classes, n)
    parts = [
        {"accuracy": (accuracy(torch.from_numpy(p), torch.from_numpy(t)).item(), len(t))}
        for p, t in zip(np.split(preds, sorted(cuts)), np.split(targets, sorted(cuts)))
    ]
    expected = (preds.argmax(1) == targets).mean() if n else math.nan
    assert means(merge(parts))["accuracy"] == pytest.approx(expected, nan_ok=True)


@given(st.lists(st.tuples(st.integers(-100, 100), st.integers(0, 100)), min_size=1, max_size=6))
def test_merge_adds_each_key(pairs) -> None:
    parts = [{"loss": (float(a), float(n)), "n": (float(n), 1.0)} for a, n in pairs]
    total, count = sum(a for a, _ in pairs), sum(n for _, n in pairs)
    assert merge(parts) == {"loss": (total, count), "n": (count, len(pairs))}


def test_merge_refuses_an_average_of_some() -> None:
    with pytest.raises(UserError, match=r"\['accuracy', 'loss'\] and \['loss'\]"):
        merge([{"loss": (1.0, 1.0), "accuracy": (1.0, 1.0)}, {"loss": (1.0, 1.0)}])


def test_nothing_merges_to_nothing_and_an_empty_count_has_no_mean() -> None:
    assert merge([]) == {}
    assert math.isnan(means({"loss": (0.0, 0.0)})["loss"])
