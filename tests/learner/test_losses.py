"Losses against torch's own, also for logits that overflow or vanish, and their gradients against differences."

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from learner.losses import (
    balanced,
    binary_cross_entropy,
    cross_entropy,
    digit_loss,
    l1,
    log_softmax,
    logsumexp,
    mse,
    nll,
)

seeds = st.integers(0, 2**31)
sizes = st.tuples(st.integers(1, 9), st.integers(2, 7))
reductions = st.sampled_from(["mean", "sum", "none"])
scales = st.sampled_from([1e-30, 1.0, 30.0, 1e4, 1e30])
dtypes = st.sampled_from([torch.float32, torch.float64])


def logits_and_targets(seed: int, n: int, classes: int, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    "Random logits (n, classes), rounded to tenths of `scale` so that some tie, and class numbers (n,)."
    stream = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, dtype=dtype, generator=stream).mul(10).round().div(10) * scale
    return logits, torch.randint(classes, (n,), generator=stream)


def with_gradient(function, x: Tensor, *args) -> tuple[Tensor, Tensor]:
    "The function's value at x and the gradient of its sum."
    x = x.clone().requires_grad_()
    value = function(x, *args)
    value.sum().backward()
    return value.detach(), x.grad


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data(), seeds, scales, dtypes)
def test_logsumexp_and_log_softmax_equal_torchs(shape, data, seed, scale, dtype) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * scale
    for ours, theirs in ((logsumexp, torch.logsumexp), (log_softmax, F.log_softmax)):
        assert_close(with_gradient(ours, x, dim), with_gradient(theirs, x, dim))


@given(st.integers(1, 6), st.integers(1, 5), seeds, scales, dtypes, reductions)
def test_cross_entropy_equals_torchs(n, classes, seed, scale, dtype, reduction) -> None:
    logits, targets = logits_and_targets(seed, n, classes, scale, dtype)
    ours = with_gradient(cross_entropy, logits, targets, reduction)
    assert_close(ours, with_gradient(lambda x: F.cross_entropy(x, targets, reduction=reduction), logits))


@given(st.integers(1, 6), st.integers(1, 5), seeds, reductions)
def test_nll_equals_torchs(n, classes, seed, reduction) -> None:
    log_probs, targets = logits_and_targets(seed, n, classes, 1.0, torch.float64)
    ours = with_gradient(nll, log_probs, targets, reduction)
    assert_close(ours, with_gradient(lambda x: F.nll_loss(x, targets, reduction=reduction), log_probs))


@pytest.mark.parametrize("size", [1e4, 1e30, -1e30])
def test_equal_logits_of_any_size_cost_the_logarithm_of_their_number(size: float) -> None:
    losses = cross_entropy(torch.full((1, 4), size), torch.tensor([2]), "none")
    assert losses.item() == pytest.approx(math.log(4), rel=1e-6)


def test_minus_infinity_means_a_class_that_is_ruled_out() -> None:
    logits = torch.tensor([[-math.inf, 1.0, 2.0], [3.0, -math.inf, -math.inf]])
    targets = torch.tensor([1, 0])
    ours = with_gradient(cross_entropy, logits, targets, "none")
    assert_close(ours, with_gradient(lambda x: F.cross_entropy(x, targets, reduction="none"), logits))
    assert ours[1].isfinite().all()
    assert cross_entropy(logits, torch.tensor([0, 0]), "sum").item() == math.inf


@pytest.mark.parametrize("x", [[-math.inf, -math.inf], [math.inf, 1.0], [math.inf, -math.inf]])
def test_logsumexp_of_infinities_is_infinite_and_no_nan(x: list[float]) -> None:
    assert logsumexp(torch.tensor(x)).item() == max(x)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@given(seed=seeds, n=st.integers(1, 4), classes=st.integers(2, 4))
def test_gradients_agree_with_differences(reduction, seed, n, classes) -> None:
    logits, targets = logits_and_targets(seed, n, classes, 1.0, torch.float64)
    logits.requires_grad_()
    for function in (cross_entropy, nll):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, targets, reduction), logits)
    assert torch.autograd.gradcheck(logsumexp, logits) and torch.autograd.gradcheck(log_softmax, logits)


def test_no_samples_sum_to_zero_and_have_no_mean() -> None:
    logits, targets = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    assert cross_entropy(logits, targets, "sum").item() == 0
    assert cross_entropy(logits, targets).isnan()
    assert cross_entropy(logits, targets, "none").shape == (0,)


@pytest.mark.parametrize("loss", [nll, cross_entropy])
def test_an_unknown_reduction_is_named_with_those_there_are(loss) -> None:
    with pytest.raises(ValueError, match=r"'avg'.*'mean', 'sum' and 'none'"):
        loss(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), "avg")


@given(seeds, sizes, reductions, st.sampled_from([0.0, 0.1, 0.5]), st.booleans())
def test_smoothing_and_weights_are_torchs(seed, size, reduction, smoothing, weighted) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(size, dtype=torch.float64) * 5
    targets = torch.randint(size[1], size[:1])
    weight = torch.rand(size[1], dtype=torch.float64) + 0.1 if weighted else None
    ours = cross_entropy(logits, targets, reduction, smoothing, weight)
    theirs = F.cross_entropy(logits, targets, weight, reduction=reduction, label_smoothing=smoothing)
    assert_close(ours, theirs)


@given(seeds, sizes, reductions, st.sampled_from([0.0, 0.1]), st.booleans())
def test_soft_targets_are_torchs(seed, size, reduction, smoothing, weighted) -> None:
    torch.manual_seed(seed)
    logits = (torch.randn(size, dtype=torch.float64) * 5).requires_grad_()
    targets = torch.rand(size, dtype=torch.float64).softmax(1)
    weight = torch.rand(size[1], dtype=torch.float64) + 0.1 if weighted else None
    ours = cross_entropy(logits, targets, reduction, smoothing, weight)
    theirs = F.cross_entropy(logits, targets, weight, reduction=reduction, label_smoothing=smoothing)
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours.sum(), logits), torch.autograd.grad(theirs.sum(), logits))


def test_one_hot_targets_are_class_numbers() -> None:
    logits, targets = torch.randn(6, 4, dtype=torch.float64), torch.randint(4, (6,))
    assert_close(cross_entropy(logits, F.one_hot(targets, 4).double()), cross_entropy(logits, targets))
    logits[0, (targets[0] + 1) % 4] = -torch.inf
    assert cross_entropy(logits, F.one_hot(targets, 4).double()).isfinite()


@given(seeds, sizes, st.sampled_from([0.0, 0.1, 0.5]), st.booleans(), dtypes)
def test_class_numbers_are_one_hot_targets_smoothed_and_weighted_too(seed, size, smoothing, weighted, dtype) -> None:
    logits, targets = logits_and_targets(seed, *size, 5.0, dtype)
    weight = torch.arange(size[1]) / 2.0 if weighted else None
    losses, gradient = with_gradient(cross_entropy, logits, targets, "none", smoothing, weight)
    soft = with_gradient(cross_entropy, logits, F.one_hot(targets, size[1]).to(dtype), "none", smoothing, weight)
    assert_close((losses, gradient), soft)


def test_a_class_that_is_ruled_out_and_weighs_nothing_costs_nothing() -> None:
    logits, targets = torch.tensor([[-math.inf, 1.0, 2.0]]), torch.tensor([[0.5, 0.5, 0.0]])
    ours = with_gradient(cross_entropy, logits, targets, "sum", 0.1, torch.tensor([0.0, 1.0, 1.0]))
    assert ours[0].isfinite() and ours[1].isfinite().all()


@given(seeds, sizes, reductions, st.sampled_from([1.0, 100.0, 1e4]))
def test_binary_cross_entropy_is_torchs_at_any_logit(seed, size, reduction, scale) -> None:
    torch.manual_seed(seed)
    logits = (torch.randn(size, dtype=torch.float64) * scale).requires_grad_()
    targets = torch.rand(size, dtype=torch.float64).round()
    ours, theirs = binary_cross_entropy(logits, targets, reduction), F.binary_cross_entropy_with_logits(
        logits, targets, reduction=reduction)  # fmt: skip
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours.sum(), logits), torch.autograd.grad(theirs.sum(), logits))


@given(seeds, sizes, reductions)
def test_regression_losses_are_torchs(seed, size, reduction) -> None:
    torch.manual_seed(seed)
    a, b = torch.randn(2, *size, dtype=torch.float64)
    assert_close(mse(a, b, reduction), F.mse_loss(a, b, reduction=reduction))
    assert_close(l1(a, b, reduction), F.l1_loss(a, b, reduction=reduction))


def test_digit_loss_is_the_chapters() -> None:
    logits = torch.tensor([0.9, 0.4, 0.2], dtype=torch.float64).logit()
    assert_close(digit_loss(logits, torch.tensor([1, 0, 1])).item(), (0.1 + 0.4 + 0.8) / 3)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_balanced_weights_give_every_class_that_occurs_the_same_say(targets) -> None:
    weights = balanced(targets, 6)
    says = {c: weights[c] * targets.count(c) for c in range(6)}
    assert {c for c, say in says.items() if say} == set(targets)
    assert [says[c] for c in set(targets)] == pytest.approx([len(targets) / len(set(targets))] * len(set(targets)))
