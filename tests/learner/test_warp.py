"The geometry against Pillow, numpy and float64, what is drawn against its distributions, and slices of a batch."

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from learner.data.augment import draws
from learner.data.warp import COLUMNS, TILT_X, TURN, AugmentConfig, Warp, grid, homographies, render

STILL = AugmentConfig.window(1.0, p_flip=0.0)
seeds = st.integers(0, 2**63)


def smooth(n: int, side: int, channels: int = 3) -> Tensor:
    "Pictures uint8 (n, side, side, channels) of a few slow waves each, so that two ways to interpolate agree."
    rng = np.random.default_rng(3)
    y, x = np.mgrid[0:side, 0:side] / side
    waves = rng.uniform(-5, 5, (n, channels, 2, 3)) @ np.stack([x, y, np.ones_like(x)]).reshape(3, -1)
    return torch.from_numpy((127.5 + 60 * np.sin(waves).sum(2)).astype(np.uint8)).view(n, channels, side, side).permute(
        0, 2, 3, 1
    )  # fmt: skip


def noise(n: int, side: int, channels: int = 3) -> Tensor:
    return torch.from_numpy(np.random.default_rng(5).integers(0, 256, (n, side, side, channels), dtype=np.uint8))


def numbers(n: int, seed: int = 0) -> Tensor:
    return draws(seed, 0, n, COLUMNS).double()


def planes(x: Tensor) -> list[list[Image.Image]]:
    "Each channel of each picture as a Pillow image of floats, which Pillow interpolates without rounding."
    return [[Image.fromarray(one[..., c].numpy().astype(np.float32)) for c in range(one.shape[-1])] for one in x]


def pixel_maps(maps: Tensor, side: int, size: int) -> np.ndarray:
    "The same maps between pixel coordinates, as Pillow wants them: the eight numbers of each, over the ninth."
    to_unit = np.array([[2 / size, 0, -1], [0, 2 / size, -1], [0, 0, 1]])
    to_pixels = np.array([[side / 2, 0, side / 2], [0, side / 2, side / 2], [0, 0, 1]])
    pixels = to_pixels @ maps.double().numpy() @ to_unit
    return (pixels / pixels[:, 2:, 2:]).reshape(-1, 9)[:, :8]


@pytest.mark.parametrize("config", [AugmentConfig(p_affine=1), AugmentConfig(max_warp=0.0), STILL], ids=str)
def test_whole_transform_is_pillows_perspective(config: AugmentConfig) -> None:
    side, size, x = 60, 48, smooth(12, 60)
    maps = homographies(numbers(12), config)
    found = render(x, maps, None, size, affine=not config.max_warp).numpy()
    places = (grid(maps, size, False).abs() < 1 - 2 / side).all(-1).numpy()  # Pillow knows no reflection
    assert places.mean() > 0.7
    for inside, ours, channels, numbers8 in zip(places, found, planes(x), pixel_maps(maps, side, size)):
        for c, plane in enumerate(channels):
            args = (size, size), Image.Transform.PERSPECTIVE, numbers8.tolist(), Image.Resampling.BILINEAR
            np.testing.assert_allclose(ours[..., c][inside], np.asarray(plane.transform(*args))[inside], atol=0.02)


def test_a_turn_is_pillows_rotation() -> None:
    config = AugmentConfig(p_flip=0, scale=(1, 1), ratio=(1, 1), max_zoom=1, max_warp=0, max_rotate=40, p_affine=1)
    x, random = smooth(9, 41), numbers(9)
    found, angles = render(x, homographies(random, config), None, 41).numpy(), 80 * random[:, TURN].numpy() - 40
    y, across = np.mgrid[-20:21, -20:21]
    middle = y**2 + across**2 < 18**2
    for ours, angle, channels in zip(found, angles, planes(x)):
        theirs = np.stack([np.asarray(p.rotate(angle, Image.Resampling.BILINEAR)) for p in channels], -1)
        np.testing.assert_allclose(ours[middle], theirs[middle], atol=0.02)


def test_a_crop_is_pillows_crop_and_resize_up_to_the_border() -> None:
    config = AugmentConfig(p_flip=0, scale=(0.2, 0.5), max_zoom=1.0, max_rotate=0.0, max_warp=0.0)
    x, maps = smooth(10, 40), homographies(numbers(10), config)
    maps[0] = torch.tensor([[0.5, 0, -0.5], [0, 0.5, 0.5], [0, 0, 1]])  # a corner: the border is repeated
    for ours, channels, m in zip(render(x, maps, None, 40, affine=True).numpy(), planes(x), maps.double().numpy()):
        width, height = 20 * m[0, 0], 20 * m[1, 1]
        left, top = 20 * (1 + m[0, 2]) - width, 20 * (1 + m[1, 2]) - height
        box = (max(left, 0.0), max(top, 0.0), min(left + 2 * width, 40.0), min(top + 2 * height, 40.0))
        inner = (
            slice(2, -2) if left > 0 and top > 0 and left + 2 * width < 40 else slice(None)
        )  # Pillow stops at the box
        for c, plane in enumerate(channels):
            theirs = np.asarray(plane.resize((40, 40), Image.Resampling.BILINEAR, box))
            np.testing.assert_allclose(ours[inner, inner, c], theirs[inner, inner], atol=0.02)


@given(seeds)
def test_the_grid_is_torchs_and_the_homogeneous_formula_in_float64(seed: int) -> None:
    flat = homographies(numbers(3, seed), AugmentConfig(max_warp=0.0))
    expected = F.affine_grid(flat[:, :2].double(), [3, 1, 7, 7], align_corners=False)
    torch.testing.assert_close(grid(flat, 7, True).double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(grid(flat, 7, False).double(), expected, atol=1e-6, rtol=0)
    tilted = homographies(numbers(3, seed), AugmentConfig(max_warp=0.4))
    centres = (2 * torch.arange(5).double() + 1) / 5 - 1
    places = torch.stack([*torch.meshgrid(centres, centres, indexing="xy"), torch.ones(5, 5).double()])
    x, y, w = torch.einsum("nij,jab->inab", tilted.double(), places)
    assert (w > 0).all()
    torch.testing.assert_close(grid(tilted, 5, False).double(), torch.stack((x / w, y / w), -1), atol=1e-5, rtol=1e-5)


def test_one_picture_in_float64_is_the_same() -> None:
    x, config = noise(6, 20), AugmentConfig(p_affine=1.0)
    maps = homographies(numbers(6), config)
    batch = render(x, maps, None, 16)
    for ours, picture, m in zip(batch, x, maps):
        planes64 = picture.permute(2, 0, 1)[None].double()
        one = F.grid_sample(planes64, grid(m[None].double(), 16, False), "bilinear", "reflection", False)
        torch.testing.assert_close(ours.permute(2, 0, 1)[None].double(), one, atol=0.01, rtol=0)


@pytest.mark.parametrize("side", [9, 64])
def test_nothing_to_do_is_the_identity_and_a_flip_is_exact(side: int) -> None:
    x = noise(4, side)
    same = Warp(side, 0, STILL)(x, True, 0)
    torch.testing.assert_close(same, x.float(), atol=0.01, rtol=0)
    assert torch.equal(same.round().byte(), x)
    flipped = Warp(side, 0, AugmentConfig.window(1.0, p_flip=1.0))(x, True, 0)
    assert torch.equal(flipped.round().byte(), x.flip(2))


def test_beyond_the_border_the_picture_is_reflected() -> None:
    x, out = noise(2, 8), torch.diag(torch.tensor([2.0, 2.0, 1.0])).expand(2, 3, 3)
    expected = np.pad(x.numpy(), ((0, 0), (4, 4), (4, 4), (0, 0)), mode="symmetric")
    np.testing.assert_allclose(render(x, out, None, 16).numpy(), expected, atol=0.01)


@pytest.mark.parametrize("finer", [2, 3])
def test_much_smaller_results_average_every_stored_pixel(finer: int) -> None:
    x = noise(2, 12 * finer)
    blocks = x.double().view(2, 12, finer, 12, finer, 3).mean((2, 4))
    small = Warp(12, 0, STILL)(x, True, 0)
    torch.testing.assert_close(small.double(), blocks, atol=0.01, rtol=0)
    theirs = np.stack([np.asarray(p.resize((12, 12), Image.Resampling.BOX)) for p in planes(x)[0]], -1)
    np.testing.assert_allclose(small[0].numpy(), theirs, atol=0.01)


@pytest.mark.parametrize("along", [0, 1])
def test_a_tilt_moves_the_corners_as_it_says(along: int) -> None:
    config = AugmentConfig(p_flip=0, scale=(1, 1), ratio=(1, 1), max_zoom=1, max_rotate=0, max_warp=0.3, p_affine=1)
    random = torch.full((1, COLUMNS), 0.5).double()
    random[0, TILT_X + along] = 0.75  # by half of max_warp
    corners = torch.tensor([[-1, -1, 1], [1, -1, 1], [-1, 1, 1], [1, 1, 1]]).float().T
    *places, w = (homographies(random, config) @ corners)[0]
    places = [place / w for place in places]
    torch.testing.assert_close(places[along], corners[along])
    torch.testing.assert_close(places[1 - along], corners[1 - along] * (1 - 0.15 * corners[along]))


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.35, 1.0), (0.9, 1.0)])
def test_crops_have_the_areas_and_ratios_asked_for_and_are_inside(scale: tuple[float, float]) -> None:
    config = AugmentConfig(scale=scale, max_zoom=1.0, max_rotate=0.0, max_warp=0.0)
    m = homographies(numbers(20000), config).double()
    width, height, x, y = m[:, 0, 0].abs(), m[:, 1, 1], m[:, 0, 2], m[:, 1, 2]
    assert (x.abs() + width).max() < 1 + 1e-5 and (y.abs() + height).max() < 1 + 1e-5
    area, ratio = width * height, (width / height).log()
    uniform = (torch.linspace(*scale, 20000, dtype=torch.float64) - area.sort().values).abs().max()
    assert uniform < 0.012 * (scale[1] - scale[0])  # Kolmogorov's 1% limit
    assert ratio.abs().max() <= math.log(4 / 3) + 1e-6 and abs(float(ratio.mean())) < 0.01
    free = ratio[area < 0.75]  # where no ratio is too long for the picture
    if len(free):
        even = torch.linspace(-1, 1, len(free), dtype=torch.float64) * math.log(4 / 3)
        assert (even - free.sort().values).abs().max() < 2 * 1.63 * math.log(4 / 3) / len(free) ** 0.5
    assert (m[:, 0, 0] < 0).double().mean().item() == pytest.approx(0.5, abs=0.015)
    for place, side in ((x, width), (y, height)):
        share = place[side < 0.99] / (1 - side[side < 0.99])
        assert share.std().item() == pytest.approx(3**-0.5, abs=0.02)


def test_each_change_befalls_its_share_and_leaves_the_others_alone() -> None:
    random = numbers(4000)
    base = AugmentConfig(max_rotate=0.0, max_warp=0.0, max_zoom=1.0)
    turned = AugmentConfig(max_rotate=10.0, max_warp=0.0, max_zoom=1.0, p_affine=0.3)
    plain, m = homographies(random, base), homographies(random, turned)
    same = (plain == m).flatten(1).all(1)
    assert same.double().mean().item() == pytest.approx(0.7, abs=0.03)
    angles = torch.atan2(m[:, 1, 0], m[:, 0, 0].abs()).abs() * 180 / math.pi
    torch.testing.assert_close(m[:, :2, :2].det(), plain[:, :2, :2].det())
    assert 9 < angles.max() < 13  # the window's own shape shears the angle a little


def test_zoom_shrinks_the_window() -> None:
    config = AugmentConfig(scale=(1, 1), ratio=(1, 1), max_zoom=1.5, max_rotate=0.0, max_warp=0.0, p_affine=1.0)
    zooms = 1 / homographies(numbers(4000), config)[:, 1, 1]
    assert 1 <= zooms.min() < 1.01 and 1.49 < zooms.max() < 1.5001
    assert zooms.mean().item() == pytest.approx(1.25, abs=0.01)


@given(seeds, st.integers(0, 1000), st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_parts_of_a_batch_get_what_the_whole_gives_them(seed: int, step: int, sizes: list[int]) -> None:
    warp, x = Warp(6, seed, AugmentConfig()), noise(sum(sizes), 9)
    whole, rows = warp(x, True, step), torch.arange(sum(sizes))
    parts = [warp(part, True, step, where) for part, where in zip(x.split(sizes), rows.split(sizes))]
    assert torch.equal(torch.cat(parts), whole)
    backwards = warp(x.flip(0), True, step, rows.flip(0))
    assert torch.equal(backwards.flip(0), whole)


def test_a_step_is_repeatable_and_the_next_differs() -> None:
    warp, x = Warp(8, 1, AugmentConfig()), noise(5, 12)
    assert torch.equal(warp(x, True, 4), warp(x, True, 4))
    assert not torch.equal(warp(x, True, 4), warp(x, True, 5))
    assert not torch.equal(warp(x, True, 4), Warp(8, 2, AugmentConfig())(x, True, 4))


@pytest.mark.parametrize(
    "config", [AugmentConfig(), AugmentConfig(max_warp=0.0), STILL], ids=["tilt", "affine", "still"]
)
@pytest.mark.parametrize("size", [5, 16, 20, 33])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_shapes_and_types_are_fixed_for_no_pictures_too(config: AugmentConfig, size: int, channels: int) -> None:
    warp = Warp(16, 0, config)
    warp.train_size = size
    for n in (0, 1, 3):
        y = warp(noise(n, 20, channels), True, 2)
        assert y.shape == (n, size, size, channels) and y.dtype is torch.float32
        assert warp(noise(n, 20, channels), False, 2).shape == (n, 16, 16, channels)
        assert not n or (y.min() >= 0 and y.max() <= 255.001)


def test_the_device_part_is_one_graph() -> None:
    compiled = torch.compile(render, backend="eager", fullgraph=True)
    x, maps = noise(3, 20), homographies(numbers(3), AugmentConfig())
    tables = torch.rand(3, 256)
    assert torch.equal(compiled(x, maps, tables, 8), render(x, maps, tables, 8))


def test_a_wide_picture_is_turned_without_being_sheared() -> None:
    config = AugmentConfig(p_flip=0, scale=(1, 1), ratio=(1, 1), max_zoom=1, max_warp=0, max_rotate=90, p_affine=1)
    m = homographies(numbers(50), config, aspect=2.0)[:, :2, :2].double()
    to_pixels = torch.diag(torch.tensor([2.0, 1.0])).double()
    turn = to_pixels @ m @ to_pixels.inverse()
    torch.testing.assert_close(turn @ turn.mT, torch.eye(2).double().expand(50, 2, 2), atol=1e-6, rtol=0)
