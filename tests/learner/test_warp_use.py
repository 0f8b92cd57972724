"Lighting by its formula, the magnitudes' rules, validation's crop, and the way through SetupLearner."

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.callbacks.setup import SetupLearner
from learner.data.augment import Augment, draws
from learner.data.normalize import Normalize
from learner.data.warp import BRIGHTNESS, COLUMNS, CONTRAST, AugmentConfig, Warp, light_tables, make_augment
from learner.errors import UsageError
from learner.learner import Learner

STILL = AugmentConfig.window(1.0, p_flip=0.0)


def noise(n: int, side: int, channels: int = 3) -> Tensor:
    return torch.from_numpy(np.random.default_rng(5).integers(0, 256, (n, side, side, channels), dtype=np.uint8))


def one_row(**columns: float) -> Tensor:
    row = torch.full((1, COLUMNS), 0.5).double()
    row[0, BRIGHTNESS], row[0, CONTRAST] = columns["brightness"], columns["contrast"]
    return row


@given(st.floats(0, 0.9999), st.floats(0, 0.9999), st.floats(0.01, 0.9))
def test_lighting_adds_and_multiplies_in_logit_space(brightness: float, contrast: float, most: float) -> None:
    config = AugmentConfig(max_lighting=most, p_lighting=1.0)
    table = light_tables(one_row(brightness=brightness, contrast=contrast), config)[0].double()
    moved = 0.5 * (1 + most * (2 * brightness - 1))
    factor = (1 - most) ** (1 - 2 * contrast)
    for byte in (1, 40, 128, 254):
        logit = math.log(byte / 255) - math.log(1 - byte / 255)
        lit = 255 / (1 + math.exp(-(factor * logit + math.log(moved / (1 - moved)))))
        assert table[byte].item() == pytest.approx(lit, abs=1e-3)
    assert (table.diff() >= 0).all() and table.min() >= 0 and table.max() <= 255


def test_lighting_that_changes_nothing_is_the_identity_and_its_extremes_are_as_documented() -> None:
    bytes_ = torch.arange(256).float()
    always, never = AugmentConfig(p_lighting=1.0), AugmentConfig(p_lighting=0.0)
    neutral = light_tables(one_row(brightness=0.5, contrast=0.5), always)[0]
    torch.testing.assert_close(neutral, bytes_, atol=1e-3, rtol=0)
    torch.testing.assert_close(light_tables(draws(0, 0, 3, COLUMNS).double(), never)[1], bytes_, atol=1e-3, rtol=0)
    darkest = light_tables(one_row(brightness=0.0, contrast=0.5), always)[0]
    assert (darkest[127] + darkest[128]) / 2 / 255 == pytest.approx(0.4, abs=1e-3)
    tables = light_tables(draws(0, 0, 4000, COLUMNS).double(), AugmentConfig())
    untouched = (tables - bytes_).abs().amax(1) < 1e-3
    assert untouched.double().mean().item() == pytest.approx(0.25**2, abs=0.015)


def test_each_picture_is_lit_by_its_own_table() -> None:
    x, seed = noise(5, 12), 9
    config = AugmentConfig(p_flip=0, scale=(1, 1), ratio=(1, 1), max_zoom=1, max_rotate=0, max_warp=0, max_lighting=0.4)
    tables = light_tables(draws(seed, 3, 5, COLUMNS).double(), config)
    expected = np.stack([table[picture] for table, picture in zip(tables.numpy(), x.numpy())])
    np.testing.assert_allclose(Warp(12, seed, config)(x, True, 3).numpy(), expected, atol=0.02)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("scale", (0.0, 1.0), "two rising numbers above 0"),
        ("scale", (0.5, 0.4), "two rising numbers"),
        ("scale", (0.5, 1.1), "up to 1"),
        ("scale", 0.5, "two numbers"),
        ("ratio", (1.1, 1.3), "one number up to 1 and one from 1 on"),
        ("ratio", (0.5, math.inf), "one number up to 1"),
        ("max_zoom", 0.9, r"min_zoom=1.0 or more"),
        ("max_rotate", -1.0, "0 to 180 degrees"),
        ("max_warp", 0.5, "below 0.5, or the picture folds"),
        ("max_lighting", 1.0, "below 1"),
        ("p_flip", 1.5, "0 to 1"),
        ("p_affine", -0.1, "0 to 1"),
        ("p_lighting", math.nan, "0 to 1"),
        ("valid_crop", 1.1, "0 to 1"),
        ("max_rotate", "5", "a number"),
        ("p_flip", [0.1, 0.2], "a number"),
    ],
)
def test_a_magnitude_that_cannot_be_is_refused(name: str, value: object, says: str) -> None:
    with pytest.raises(UsageError, match=f"{name}=.*is not possible in augmentation: it must be .*{says}"):
        AugmentConfig.read({name: value})


def test_magnitudes_are_read_from_a_table_and_unknown_ones_named() -> None:
    assert AugmentConfig.read({"scale": [0.08, 1.0], "max_rotate": 5.0}) == AugmentConfig(
        scale=(0.08, 1.0), max_rotate=5.0
    )
    with pytest.raises(UsageError, match="augmentation has no max_rotation, zoom; it has p_flip, scale"):
        AugmentConfig.read({"max_rotation": 3, "zoom": 1})


def test_no_tilt_that_is_allowed_folds_a_picture() -> None:
    worst = AugmentConfig(min_zoom=0.5, max_zoom=0.5, scale=(1, 1), ratio=(1, 1), max_warp=0.249, p_affine=1.0)
    warp = Warp(8, 0, worst)
    for step in range(30):
        assert warp(noise(64, 8), True, step).isfinite().all()


def test_validation_cuts_the_centre_out_or_resamples_it() -> None:
    x = noise(3, 20)
    cut = Warp(12, 0, AugmentConfig(valid_crop=0))(x, False, 5)
    assert torch.equal(cut, x[:, 4:16, 4:16])
    same = Warp(12, 0, AugmentConfig(valid_crop=0.6))(x, False, 5)
    torch.testing.assert_close(same, cut.float(), atol=0.01, rtol=0)
    half = Warp(10, 0, AugmentConfig(valid_crop=1.0))(x, False, 5)
    torch.testing.assert_close(half, x.float().view(3, 10, 2, 10, 2, 3).mean((2, 4)), atol=0.01, rtol=0)
    warp = Warp(12, 0, AugmentConfig())
    warp.train_size = 8
    assert warp(x, False, 0).shape[1] == 12 and warp(x, True, 0).shape[1] == 8


def test_the_modes_give_what_their_names_say() -> None:
    assert make_augment("none", 64, 64, 1) is None
    assert type(make_augment("crop", 64, 72, 1)) is Augment
    full = make_augment("full", 64, 80, 1, AugmentConfig(max_rotate=3.0))
    assert isinstance(full, Warp) and full.config.max_rotate == 3 and (full.size, full.seed) == (64, 1)
    with pytest.raises(UsageError, match="augmentation 'ful' is unknown; known are none, crop, full"):
        make_augment("ful", 64, 72, 1)


@pytest.mark.parametrize("mode", ["none", "crop"])
def test_progressive_runs_resample_the_same_crop(mode: str) -> None:
    warp, x = make_augment(mode, 16, 18 if mode == "crop" else 16, 1, progressive=True), noise(6, 18)
    assert isinstance(warp, Warp)
    warp.train_size = 8
    assert warp(x, True, 0).shape == (6, 8, 8, 3)
    if mode == "crop":
        assert torch.equal(warp(x, False, 0), Augment(16, 1)(x, False, 0))
    else:
        blocks = x[:, 1:17, 1:17].float().view(6, 8, 2, 8, 2, 3).mean((2, 4))
        torch.testing.assert_close(warp(x[:, 1:17, 1:17], True, 0), blocks, atol=0.01, rtol=0)


def test_a_window_has_one_size_and_is_anywhere() -> None:
    x = torch.arange(64.0).expand(200, 64, 64)[..., None].byte()
    y = Warp(32, 4, AugmentConfig.window(0.5, p_flip=0.0))(x, True, 0)
    torch.testing.assert_close(y[:, 0].diff(dim=1), torch.ones(200, 31, 1), atol=1e-3, rtol=0)
    first = y[:, 0, 0, 0]
    assert first.min() < 2 and first.max() > 30 and first.mean().item() == pytest.approx(16, abs=2)


@pytest.mark.parametrize("n", [0, 4])
def test_a_learner_gets_normalised_floats_stored_channels_last(n: int) -> None:
    x, norm = noise(n, 20), Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    warp = Warp(16, 7, AugmentConfig())
    learner = Learner(SimpleNamespace(training=True, modules=list), None, cbs=[SetupLearner("cpu", norm, warp)])
    learner.batch, learner.global_step = (x, torch.zeros(n, dtype=torch.int64)), 6
    learner("before_batch")
    seen = learner.batch[0]
    expected = (warp(x, True, 6) / 255 - torch.tensor(norm.mean)) / torch.tensor(norm.std)
    torch.testing.assert_close(seen, expected.permute(0, 3, 1, 2), atol=1e-5, rtol=1e-5)
    assert not n or seen.is_contiguous(memory_format=torch.channels_last)


def test_floats_that_are_normalised_stay_as_they_were() -> None:
    x = torch.rand(2, 4, 4, 3) * 255
    before = x.clone()
    Normalize((0.5,) * 3, (0.2,) * 3)(x)
    assert torch.equal(x, before)
