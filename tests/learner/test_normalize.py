"Normalisation against the plain formula, and back."

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.data.normalize import Normalize


def pixels(seed: int, n: int, height: int, width: int, channels: int) -> Tensor:
    return torch.randint(0, 256, (n, height, width, channels), generator=torch.Generator().manual_seed(seed)).byte()


shapes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3]))
seeds = st.integers(0, 2**31)


@given(seeds, shapes, st.floats(0, 1), st.floats(0.05, 1))
def test_it_is_the_plain_formula_with_channels_first(seed, shape, mean, std) -> None:
    x, channels = pixels(seed, *shape), shape[3]
    means, stds = [mean / (c + 1) for c in range(channels)], [std / (c + 1) for c in range(channels)]
    y = Normalize(tuple(means), tuple(stds))(x)
    expected = (x.numpy() / 255.0 - means) / stds
    assert y.shape == (shape[0], channels, *shape[1:3]) and y.dtype is torch.float32
    np.testing.assert_allclose(y.numpy(), expected.transpose(0, 3, 1, 2), rtol=1e-5, atol=2e-5)


@given(seeds, shapes)
def test_statistics_are_those_of_the_batch_and_make_it_standard(seed, shape) -> None:
    x = pixels(seed, *shape)
    norm = Normalize.of(x)
    scaled = x.numpy().reshape(-1, shape[3]) / 255.0
    np.testing.assert_allclose(norm.mean, scaled.mean(0), rtol=1e-12)
    varied = scaled.std(0) > 0
    np.testing.assert_allclose(norm.std, np.where(varied, scaled.std(0), 1.0), rtol=1e-9)
    y = norm(x).double().numpy()
    np.testing.assert_allclose(y.mean((0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(y.std((0, 2, 3)), varied, atol=1e-4)


@given(seeds, shapes)
def test_the_inverse_gives_every_byte_back(seed, shape) -> None:
    x = pixels(seed, *shape)
    norm = Normalize.of(x)
    assert torch.equal(norm.invert(norm(x)), x)


def test_the_inverse_stays_within_bytes() -> None:
    norm = Normalize((0.5,), (0.25,))
    assert norm.invert(torch.tensor([-9.0, 0.0, 9.0]).view(1, 1, 1, 3)).flatten().tolist() == [0, 128, 255]


def test_the_batch_stays_as_it_was_and_the_result_is_stored_channels_last() -> None:
    x = pixels(0, 2, 5, 4, 3)
    before = x.clone()
    y = Normalize.of(x)(x)
    assert torch.equal(x, before)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_view_that_was_cropped_is_normalised_like_its_copy() -> None:
    x = pixels(0, 2, 8, 8, 3)[:, 1:6, 2:7]
    norm = Normalize.of(x)
    assert torch.equal(norm(x), norm(x.contiguous()))


def test_json_holds_both_statistics() -> None:
    assert Normalize((0.5, 0.4), (0.2, 0.1)).as_json() == {"mean": pytest.approx([0.5, 0.4]), "std": (0.2, 0.1)}
