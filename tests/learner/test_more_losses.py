"Smoothing, class weights, soft targets, other losses, and the metrics beyond accuracy, against torch's own."

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from learner.losses import balanced, binary_cross_entropy, cross_entropy, digit_loss, l1, mse
from learner.metrics import confusion, error_rate, per_class, top_k

seeds = st.integers(0, 2**31)
sizes = st.tuples(st.integers(1, 9), st.integers(2, 7))
reductions = st.sampled_from(["mean", "sum", "none"])


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


@given(seeds, sizes, st.integers(1, 9))
def test_top_k_counts_what_sorting_finds(seed, size, k) -> None:
    torch.manual_seed(seed)
    preds, targets = torch.randn(size), torch.randint(size[1], size[:1])
    found = sum(int(t) in p.argsort(descending=True)[:k].tolist() for p, t in zip(preds, targets))
    assert int(top_k(k)(preds, targets)) == found
    assert int(error_rate(preds, targets)) == len(targets) - int(top_k(1)(preds, targets))


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


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60))
def test_balanced_weights_give_every_class_that_occurs_the_same_say(targets) -> None:
    weights = balanced(targets, 6)
    says = {c: weights[c] * targets.count(c) for c in range(6)}
    assert {c for c, say in says.items() if say} == set(targets)
    assert [says[c] for c in set(targets)] == pytest.approx([len(targets) / len(set(targets))] * len(set(targets)))
