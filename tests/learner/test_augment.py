"Augmentation: its numbers, its pixels, and that a slice of a batch gets what the whole would give it."

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.data.augment import Augment, crop_flip, crop_pixels, crop_slices, draws
from learner.errors import UsageError

seeds = st.integers(0, 2**63)


def pictures(n: int, height: int, width: int) -> Tensor:
    "Random bytes, so that no two crops are alike."
    return torch.from_numpy(np.random.default_rng(5).integers(0, 256, (n, height, width, 3), dtype=np.uint8))


@given(seeds, st.integers(0, 10**6), st.integers(0, 20), st.integers(0, 20), st.integers(1, 6))
def test_a_row_is_the_same_however_many_are_drawn(seed, step, few, more, columns) -> None:
    long = draws(seed, step, few + more, columns)
    assert torch.equal(draws(seed, step, few, columns), long[:few])
    assert long.shape == (few + more, columns) and long.dtype is torch.float32
    assert ((long >= 0) & (long < 1)).all()


def test_numbers_depend_on_seed_and_step_and_are_uniform() -> None:
    streams = [draws(seed, step, 2000, 3) for seed in range(3) for step in range(3)]
    assert len({tuple(stream[0].tolist()) for stream in streams}) == 9
    assert torch.stack(streams).mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.stack(streams).std().item() == pytest.approx(12**-0.5, abs=0.01)
    correlation = np.corrcoef([stream[:, 0].numpy() for stream in streams]) - np.eye(9)
    assert np.abs(correlation).max() < 0.1


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.data())
def test_crop_flip_equals_cutting_and_mirroring_each_picture(n, height, width, size, data) -> None:
    size = min(size, height, width)
    numbers = st.floats(0, 1, exclude_max=True, width=32)
    random = data.draw(st.lists(st.tuples(numbers, numbers, numbers), min_size=n, max_size=n))
    x = pictures(n, height, width)
    result = crop_flip(x, torch.tensor(random), size).numpy()
    for picture, (down, across, flip), found in zip(x.numpy(), random, result):
        top = min(int(np.float32(down) * np.float32(height - size + 1)), height - size)
        left = min(int(np.float32(across) * np.float32(width - size + 1)), width - size)
        crop = picture[top : top + size, left : left + size]
        np.testing.assert_array_equal(found, crop[:, ::-1] if flip < 0.5 else crop)


def test_every_place_and_both_sides_are_drawn() -> None:
    x = torch.arange(16, dtype=torch.uint8).view(1, 4, 4, 1).expand(400, 4, 4, 1)
    crops = Augment(3, seed=0)(x, training=True, step=0)
    seen = {tuple(crop.flatten().tolist()) for crop in crops}
    assert len(seen) == 2 * 2 * 2


@given(seeds, st.integers(0, 1000), st.lists(st.integers(0, 7), min_size=1, max_size=4))
def test_parts_of_a_batch_get_what_the_whole_gives_them(seed, step, sizes) -> None:
    augment, x = Augment(5, seed), pictures(sum(sizes), 7, 8)
    whole = augment(x, True, step)
    rows = torch.arange(sum(sizes))
    parts = [augment(part, True, step, where) for part, where in zip(x.split(sizes), rows.split(sizes))]
    assert torch.equal(torch.cat(parts), whole)


@given(st.permutations(range(9)), st.integers(1, 9))
def test_rows_in_any_order_keep_their_own_augmentation(order, n) -> None:
    augment, x, rows = Augment(5, 11), pictures(9, 7, 8), torch.tensor(order[:n])
    assert torch.equal(augment(x[rows], True, 3, rows), augment(x, True, 3)[rows])


def test_a_step_is_repeatable_and_the_next_differs() -> None:
    augment, x = Augment(5, 1), pictures(8, 9, 9)
    assert torch.equal(augment(x, True, 4), augment(x, True, 4))
    assert not torch.equal(augment(x, True, 4), augment(x, True, 5))
    assert not torch.equal(augment(x, True, 4), Augment(5, 2)(x, True, 4))


@given(st.integers(1, 6), st.integers(0, 3), st.integers(0, 3))
def test_validation_takes_the_centre(size, more_height, more_width) -> None:
    x = pictures(2, size + 2 * more_height, size + 2 * more_width)
    bottom, right = more_height + size, more_width + size
    assert torch.equal(Augment(size, 0)(x, False, 3), x[:, more_height:bottom, more_width:right])


@pytest.mark.parametrize("training", [True, False])
def test_a_crop_larger_than_the_pictures_is_refused(training: bool) -> None:
    with pytest.raises(UsageError, match="crop of 9 is larger than the pictures, 12x8"):
        Augment(9, 0)(pictures(1, 12, 8), training, 0)


def test_pixels_and_slices_crop_alike() -> None:
    "What a GPU does and what a CPU does."
    x, generator = pictures(9, 13, 17), torch.Generator().manual_seed(0)
    top, left = torch.randint(0, 6, (9,), generator=generator), torch.randint(0, 10, (9,), generator=generator)
    mirrored = torch.rand(9, generator=generator) < 0.5
    assert mirrored.any() and not mirrored.all()
    expected = crop_slices(x, top, left, mirrored, 8)
    assert torch.equal(crop_pixels(x, top, left, mirrored, 8), expected)
    nothing = torch.zeros(0, dtype=torch.int64)
    assert crop_pixels(x[:0], nothing, nothing, nothing.bool(), 8).shape == (0, 8, 8, 3)
