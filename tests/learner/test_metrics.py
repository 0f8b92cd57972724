"Metrics: parts merge to what the whole would give."

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.metrics import accuracy, means


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
