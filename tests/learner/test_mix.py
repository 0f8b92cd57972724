"MixUp and CutMix: the same for every division of a global batch, and what the papers' formulas give."

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.callbacks import Accumulate
from learner.callbacks.mix import Mix
from learner.callbacks.outcomes import KeepOutcomes
from learner.callbacks.setup import SetupLearner
from learner.data.augment import draws
from learner.data.loader import DataLoaders
from learner.data.mix import Blend, MixConfig, blend, kept, mix_images, mix_targets, needed, pairs, partners
from learner.data.normalize import Normalize
from learner.data.warp import AugmentConfig, Warp
from learner.dropout import Dropout
from learner.errors import UsageError, UserError
from learner.layers import Linear
from learner.learner import Learner
from learner.module import Module

CLASSES = 5
BOTH = MixConfig(mixup=0.4, cutmix=1.0)
configs = st.sampled_from([MixConfig(mixup=0.2), MixConfig(cutmix=1.0), BOTH, MixConfig(mixup=1.0, p=0.5)])


class Net(Module):
    "A Dropout that can be looked into, and a layer behind it."

    def __init__(self) -> None:
        self.dropout = Dropout(0.5)
        self.linear = Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.dropout(x.mean((2, 3))))


def batch(n: int, side: int = 12) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(8)
    x = torch.from_numpy(rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8))
    return x, torch.from_numpy(rng.integers(0, CLASSES, n))


def division(n: int, world_size: int) -> list[range]:
    return [range(n * r // world_size, n * (r + 1) // world_size) for r in range(world_size)]


def prepared(x: Tensor, y: Tensor, config: MixConfig, rows: Tensor, place: tuple[range, int] | None) -> Learner:
    "A learner after `before_batch`: warped, normalised, mixed."
    setup = SetupLearner("cpu", Normalize((0.5,) * 3, (0.2,) * 3), Warp(8, 3, AugmentConfig()))
    mix = Mix(config, CLASSES, seed=3)
    mix.place = place
    learner = Learner(Net(), None, cbs=[mix, setup])
    learner.model.training = True
    learner("before_fit")
    learner.batch, learner.rows, learner.global_step = (x, y), rows, 7
    learner("before_batch")
    return learner


@given(st.integers(0, 40))
def test_partners_are_a_permutation_that_pairs_nobody_with_himself(n: int) -> None:
    found = partners(n)
    assert sorted(found.tolist()) == list(range(n))
    assert n < 2 or (found != torch.arange(n)).all()


@given(st.integers(0, 30), st.integers(1, 7))
def test_a_rank_loads_its_rows_and_at_most_one_more(n: int, world_size: int) -> None:
    for mine in division(n, world_size):
        rows = needed(mine, n)
        assert rows[: len(mine)] == list(mine) and len(rows) <= len(mine) + bool(len(mine))
        assert len(set(rows)) == len(rows) and set(partners(n)[list(mine)].tolist()) <= set(rows)
        if world_size == 1:
            assert rows == list(range(n))


@given(configs, st.integers(1, 11), st.sampled_from([1, 2, 3]), st.sets(st.integers(0, 10)))
def test_every_division_of_the_batch_gives_the_same_mixture(
    config: MixConfig, n: int, world_size: int, unreadable: set[int]
) -> None:
    x, y = batch(n)
    good = [row for row in range(n) if row not in unreadable]
    whole = prepared(x[good], y[good], config, torch.tensor(good, dtype=torch.int64), (range(n), n))
    parts = []
    for mine in division(n, world_size):
        rows = torch.tensor([row for row in needed(mine, n) if row in good], dtype=torch.int64)
        parts.append(prepared(x[rows], y[rows], config, rows, (mine, n)))
    assert torch.cat([part.rows for part in parts]).tolist() == good == whole.rows.tolist()
    assert torch.equal(torch.cat([part.batch[0] for part in parts]), whole.batch[0])
    assert torch.equal(torch.cat([part.batch[1] for part in parts]), whole.batch[1])
    keys = [part.model.dropout.keys for part in parts]
    assert torch.equal(torch.cat(keys), whole.model.dropout.keys) and len(torch.cat(keys)) == len(good)


def test_without_a_place_the_batch_is_the_whole() -> None:
    x, y = batch(9)
    alone = prepared(x, y, BOTH, None, None)  # type: ignore[arg-type]
    whole = prepared(x, y, BOTH, torch.arange(9), (range(9), 9))
    assert torch.equal(alone.batch[0], whole.batch[0]) and torch.equal(alone.batch[1], whole.batch[1])


def test_batches_of_any_length_are_mixed_one_after_the_other_but_no_parts_of_one() -> None:
    x, y = batch(9)
    data = DataLoaders([(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:], y[8:])], [(x[:3], y[:3])])
    cbs: list = [SetupLearner("cpu", Normalize.of(x), seed=0), Mix(BOTH, CLASSES, 0), KeepOutcomes(4)]
    learner = Learner(Net(), data, cbs=cbs)
    learner.fit(1)
    assert learner.rows is None and len(learner.cbs[-1].take()) == 3  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="leave Accumulate out"):
        Learner(Net(), data, cbs=[*cbs, Accumulate(2)]).fit(1)


def test_validation_is_not_mixed() -> None:
    x, y = batch(4)
    learner = Learner(Net(), None, cbs=[Mix(BOTH, CLASSES, 0)])
    learner.model.training = False
    learner.batch = before = (x, y)
    learner("before_batch")
    assert learner.batch is before


def test_a_row_without_its_partner_stays_as_it_is() -> None:
    own, other = pairs(torch.tensor([0, 1, 3, 4]), range(4), 5)
    assert own.tolist() == [0, 1, 2] and other.tolist() == [1, 1, 3]
    x, y = torch.rand(1, 3, 6, 6), torch.tensor([2])
    drawn = blend(0, 0, 1, MixConfig(mixup=1.0))
    torch.testing.assert_close(mix_images(x, x, drawn), x)
    torch.testing.assert_close(mix_targets(y, y, drawn, 6, 4), torch.tensor([[0.0, 0, 1, 0]]))


@given(st.integers(0, 2**63), st.integers(0, 10**6))
def test_mixup_is_the_papers_sum(seed: int, step: int) -> None:
    x, other, y, y_other = torch.rand(6, 3, 4, 4), torch.rand(6, 3, 4, 4), torch.arange(6) % 3, torch.arange(6) % 2
    drawn = blend(seed, step, 6, MixConfig(mixup=0.4))
    share = drawn.keep.double().view(-1, 1, 1, 1)
    expected = share * x.double() + (1 - share) * other.double()
    torch.testing.assert_close(mix_images(x, other, drawn).double(), expected, atol=1e-6, rtol=1e-6)
    one_hot = torch.eye(4).double()
    soft = share[:, :, 0, 0] * one_hot[y] + (1 - share[:, :, 0, 0]) * one_hot[y_other]
    torch.testing.assert_close(mix_targets(y, y_other, drawn, 4, 4).double(), soft, atol=1e-6, rtol=1e-6)


def papers_box(size: int, share: float, x: float, y: float) -> tuple[int, int, int, int]:
    "rand_bbox of the CutMix paper's code: left, top, right, bottom."
    side, cx, cy = int(size * np.sqrt(1.0 - share)), int(x * size), int(y * size)
    left, top = cx - side // 2, cy - side // 2
    return max(left, 0), max(top, 0), min(left + side, size), min(top + side, size)


@pytest.mark.parametrize("size", [7, 32])
def test_cutmix_pastes_the_papers_box_and_its_area_is_the_partners_share(size: int) -> None:
    drawn = blend(3, 1, 200, MixConfig(cutmix=1.0))
    x, other = torch.zeros(200, 3, size, size), torch.ones(200, 3, size, size)
    mixed, own = mix_images(x, other, drawn), kept(drawn, size)
    for row in range(200):
        left, top, right, bottom = papers_box(size, drawn.keep[row].double().item(), *drawn.centre[row].tolist())
        expected = torch.zeros(3, size, size)
        expected[:, top:bottom, left:right] = 1
        assert torch.equal(mixed[row], expected)
    torch.testing.assert_close(mixed.mean((1, 2, 3)), 1 - own, atol=1e-6, rtol=0)
    soft = mix_targets(torch.zeros(200).long(), torch.ones(200).long(), drawn, size, 2)
    torch.testing.assert_close(soft, torch.stack((own, 1 - own), 1))
    corners = mixed[:, 0, :: size - 1, :: size - 1].mean(0)
    assert (corners > 0.02).all()  # boxes are clipped at every corner


def test_shares_are_beta_and_modes_and_odds_as_configured() -> None:
    n = 20000
    for alpha in (0.2, 1.0):
        keep = blend(0, 0, n, MixConfig(mixup=alpha)).keep.double()
        assert keep.mean().item() == pytest.approx(0.5, abs=0.012)
        assert keep.var().item() == pytest.approx(0.25 / (2 * alpha + 1), rel=0.03)
    both = blend(0, 0, n, MixConfig(mixup=0.4, cutmix=1.0, p=0.3))
    assert both.cut.double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert (both.keep < 1).double().mean().item() == pytest.approx(0.3, abs=0.02)
    assert not blend(0, 0, 9, MixConfig(mixup=0.4)).cut.any() and blend(0, 0, 9, MixConfig(cutmix=1.0)).cut.all()
    assert (
        (blend(0, 0, 9, MixConfig()).keep == 1).all() and not MixConfig() and not MixConfig(mixup=1.0, p=0.0) and BOTH
    )


@pytest.mark.parametrize("config", [MixConfig(mixup=0.4, p=0.0), MixConfig(cutmix=1.0, p=0.0)])
def test_an_unmixed_row_keeps_every_bit(config: MixConfig) -> None:
    x, other, drawn = torch.randn(5, 3, 6, 6), torch.randn(5, 3, 6, 6), blend(0, 0, 5, config)
    assert torch.equal(mix_images(x, other, drawn), x)
    soft = mix_targets(torch.arange(5), torch.zeros(5).long(), drawn, 6, 5)
    assert torch.equal(soft, torch.eye(5))


def test_numbers_repeat_differ_by_step_and_are_not_those_of_the_augmentation() -> None:
    one, same, later = (blend(1, step, 500, BOTH) for step in (4, 4, 5))
    assert torch.equal(one.keep, same.keep) and torch.equal(one.centre, same.centre)
    assert not torch.equal(one.keep, later.keep)
    theirs = draws(1, 4, 2000, 11).double().flatten().sort().values  # one stream would give the same leading bits
    ours = one.centre.flatten()
    nearest = torch.searchsorted(theirs, ours).clamp(1, len(theirs) - 1)
    gaps = torch.minimum((theirs[nearest] - ours).abs(), (theirs[nearest - 1] - ours).abs())
    assert (gaps < 2**-22).double().mean() < 0.05


def test_no_samples_are_mixed_to_none() -> None:
    drawn: Blend = blend(0, 0, 0, BOTH)
    assert mix_images(torch.rand(0, 3, 4, 4), torch.rand(0, 3, 4, 4), drawn).shape == (0, 3, 4, 4)
    assert mix_targets(torch.zeros(0).long(), torch.zeros(0).long(), drawn, 4, 3).shape == (0, 3)
    assert needed(range(3, 3), 7) == [] and pairs(torch.zeros(0).long(), range(0), 7)[0].shape == (0,)


@pytest.mark.parametrize("name", ["mixup", "cutmix", "p"])
def test_a_magnitude_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name}=-0.1 is not possible in mixing: it must be 0 to 1"):
        MixConfig(**{name: -0.1})
