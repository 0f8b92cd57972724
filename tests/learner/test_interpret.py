"Outcomes: what is said of each sample, against plain torch; confusion and top losses against counting by hand."

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from torch.nn import functional as F

from learner.callbacks.outcomes import KeepOutcomes
from learner.data.loader import DataLoader, DataLoaders
from learner.errors import UserError
from learner.figures import BARS, class_bars, confused_pairs, confusion_matrix, image_grid
from learner.interpret import Confused, Outcomes, most_confused
from learner.learner import Learner
from learner.models import linear


def batch(n: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    "Logits and targets."
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, classes, generator=random), torch.randint(classes, (n,), generator=random)


def outcomes(n: int, classes: int, seed: int = 0, k: int = 5) -> Outcomes:
    "Those of a batch."
    return Outcomes.of(*batch(n, classes, seed), torch.arange(n), k)


@given(st.integers(0, 30), st.integers(1, 8), st.integers(1, 10), st.integers(0, 99))
def test_outcomes_are_what_torch_says_of_each_sample(n, classes, k, seed) -> None:
    logits, targets = batch(n, classes, seed)
    found = outcomes(n, classes, seed, k)
    torch.testing.assert_close(found.losses, F.cross_entropy(logits, targets, reduction="none"))
    chances = logits.softmax(1).sort(descending=True)
    torch.testing.assert_close(found.probabilities, chances.values[:, :k])
    torch.testing.assert_close(found.ranked, chances.indices[:, :k])
    torch.testing.assert_close(found.predicted, logits.argmax(1))


def test_rates_are_averages_over_samples() -> None:
    logits, targets = batch(57, 9)
    ranks = (logits > logits.gather(1, targets[:, None])).sum(1)
    rates = outcomes(57, 9).rates()
    assert rates["loss"] == pytest.approx(F.cross_entropy(logits, targets).item())
    assert rates["accuracy"] == (ranks == 0).sum().item() / 57
    assert rates["error_rate"] == (ranks > 0).sum().item() / 57
    assert rates["top_5_accuracy"] == (ranks < 5).sum().item() / 57
    assert all(np.isnan(rate) for rate in outcomes(0, 9).rates().values())


@given(st.integers(1, 40), st.lists(st.integers(0, 40), max_size=3), st.randoms())
def test_parts_join_to_the_whole_in_any_order(n, cuts, random) -> None:
    logits, targets = batch(n, 6)
    bounds = [0, *sorted(min(cut, n) for cut in cuts), n]
    samples = torch.arange(n)
    parts = [Outcomes.of(logits[a:b], targets[a:b], samples[a:b]) for a, b in pairwise(bounds)]
    random.shuffle(parts)
    joined, whole = Outcomes.join(parts), outcomes(n, 6)
    assert all(torch.equal(getattr(joined, name), getattr(whole, name)) for name in vars(whole))


def test_a_sample_that_comes_twice_is_refused() -> None:
    part = outcomes(4, 3)
    with pytest.raises(UserError, match="twice"):
        Outcomes.join([part, part.take(torch.tensor([2]))])


def test_confusion_and_its_worst_pairs_count_what_was_said() -> None:
    found = outcomes(200, 4)
    pairs = list(zip(found.targets.tolist(), found.predicted.tolist()))
    confusion = found.confusion(4)
    assert confusion.tolist() == [[pairs.count((row, column)) for column in range(4)] for row in range(4)]
    worst = most_confused(confusion)
    assert [pair.count for pair in worst] == sorted((pair.count for pair in worst), reverse=True)
    assert {(pair.actual, pair.predicted): pair.count for pair in worst} == {
        pair: pairs.count(pair) for pair in set(pairs) if pair[0] != pair[1]
    }
    assert most_confused(confusion, 2) == worst[:2]
    assert most_confused(torch.eye(3, dtype=torch.int64)) == []


def test_top_losses_are_the_largest_and_one_that_is_no_number_leads() -> None:
    found = outcomes(50, 4)
    worst = found.top_losses(7)
    assert worst.losses.tolist() == sorted(found.losses.tolist(), reverse=True)[:7]
    assert torch.equal(found.losses[worst.samples], worst.losses)
    assert len(found.top_losses()) == 50
    found.losses[31] = float("nan")
    assert found.top_losses(1).samples.tolist() == [31]


def test_a_learner_keeps_the_outcomes_of_its_last_validation() -> None:
    x, y = torch.randn(11, 1, 28, 28), torch.randint(3, (11,))
    data = list(zip(x, y))
    keep, model = KeepOutcomes(batch_size=4, k=2), linear(1, 3)
    loader = DataLoader(data, 4, n_workers=0)
    Learner(model, DataLoaders(loader, loader), cbs=[keep], lr=0.0).fit(2)
    found = keep.take()
    assert found is not None
    assert found.samples.tolist() == list(range(11))
    torch.testing.assert_close(found.losses, F.cross_entropy(model(x), y, reduction="none").detach())
    assert found.ranked.shape == (11, 2)
    assert keep.take() is None


def test_long_titles_are_cut_where_the_next_picture_begins() -> None:
    one, long = (
        np.asarray(image_grid(np.zeros((2, 64, 64, 3), np.uint8), [title, "x"], 2)) for title in ("W", "W" * 99)
    )
    width = one.shape[1] // 2
    assert (long[:15, width:] == one[:15, width:]).all() and (long[:15, :width] != one[:15, :width]).any()
    assert (long[:15, [0, -1]] == 255).all()


@pytest.mark.parametrize(("n", "cut"), [(BARS, False), (BARS + 1, True)])
def test_classes_that_are_left_out_are_mentioned_and_no_others(n, cut, monkeypatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(Axes, "set_xlabel", lambda self, text: told.append(text))
    class_bars(torch.eye(n, dtype=torch.int64), [f"{number}" for number in range(n)])
    assert ("those of the lowest f1" in told[0]) == cut


@pytest.mark.parametrize("n", [1, 45])
def test_figures_of_few_and_many_classes_with_any_names_can_be_drawn(n) -> None:
    found = outcomes(4 * n, n)
    classes = [f"${number}$ x^{{_ \udce9 {'long ' * 9}" for number in range(n)]
    confusion = found.confusion(n)
    pairs = most_confused(confusion, 60) or [Confused(0, 0, 1)]
    bars = [confused_pairs(pairs, classes), confused_pairs([], classes), class_bars(confusion, classes)]
    for picture in (confusion_matrix(confusion, classes), *bars):
        assert len(np.unique(np.asarray(picture))) > 10
