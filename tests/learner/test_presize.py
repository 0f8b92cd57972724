"Presizing: how much of a long picture is kept before it is squashed."

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from learner.data.images import centre_box, decode

sides = st.integers(1, 5000)


@given(sides, sides, st.floats(1, 10))
def test_the_box_is_the_middle_and_as_large_as_the_ratio_allows(width: int, height: int, most: float) -> None:
    left, top, right, bottom = centre_box(width, height, most)
    assert left == pytest.approx(width - right) and top == pytest.approx(height - bottom)
    across, down = right - left, bottom - top
    assert max(across / down, down / across) == pytest.approx(min(most, max(width / height, height / width)))
    assert min(across, down) == pytest.approx(min(width, height)) and left >= 0 and top >= 0


@pytest.mark.parametrize("shape", [(40, 120), (120, 40), (50, 50)])
def test_the_ends_of_a_long_picture_are_cut_off_only_if_asked(tmp_path: Path, shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image, file = Image.fromarray(pixels), tmp_path / "long.png"
    image.save(file)
    squashed = np.asarray(image.resize((20, 20), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(decode(str(file), 20), squashed)
    short = min(shape)
    x, y = (shape[1] - short) // 2, (shape[0] - short) // 2
    centre = image.crop((x, y, x + short, y + short)).resize((20, 20), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(
        decode(str(file), 20, max_ratio=1.0).astype(int), np.asarray(centre).astype(int), atol=40
    )
    inside = decode(str(file), 20, max_ratio=1.0).astype(int)[
        3:-3, 3:-3
    ]  # at the cut, the filter sees what lies beyond it
    np.testing.assert_allclose(inside, np.asarray(centre).astype(int)[3:-3, 3:-3], atol=1)


@pytest.mark.parametrize("shape", [(40, 120), (121, 40), (50, 50), (1, 4)])
def test_so_are_those_of_a_long_jpeg(tmp_path: Path, shape: tuple[int, int]) -> None:
    file, across = tmp_path / "long.jpg", int(shape[1] > shape[0])
    ramp = np.linspace(0, 250, max(shape)).astype(np.uint8)
    Image.fromarray(np.broadcast_to(ramp[:, None] if not across else ramp, shape)).save(file, quality=95)
    middle = decode(str(file), 20, max_ratio=1.0)[..., 0].mean(1 - across)
    assert middle.mean() == pytest.approx(125, abs=3)
    if max(shape) > 50:
        assert middle[0] > 75 and middle[-1] < 175, "the ends"
