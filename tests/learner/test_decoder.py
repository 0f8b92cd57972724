"Many files at once give what one by one gives, with simplejpeg or without; the same are refused."

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from learner.data import decoder
from learner.data.decoder import decode_all, decoder_version
from learner.data.images import decode

SIZE = 32
fast = pytest.mark.skipif(decoder.simplejpeg is None, reason="simplejpeg is not installed")


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    "Waves of all lengths with a little noise: what a photograph has."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(rng.normal(0, 0.3) * y + rng.normal(0, 0.3) * x + phase) for phase in rng.uniform(0, 6, 12)]
    colours = np.stack([sum(waves[c::3]) for c in range(3)], -1)
    return Image.fromarray((128 + 25 * colours + rng.normal(0, 4, colours.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    "JPEGs of several shapes, sampled in each way, some grey or progressive; then other formats; then what is broken."
    folder, made = tmp_path_factory.mktemp("pictures"), list[Path]()
    shapes = [(40, 40), (40, 60), (33, 32), (31, 50), (150, 100), (400, 300), (700, 530), (32, 32), (40, 60)]
    for number, shape in enumerate(shapes):
        made.append(folder / f"{number}.jpg")
        image = picture(*shape, seed=number).convert("L" if number % 4 == 3 else "RGB")
        image.save(made[-1], quality=80, subsampling=number % 3, progressive=number % 2 == 1)
    made += [folder / "cmyk.jpg", folder / "a.png", folder / "cut.jpg", folder / "empty.jpg", folder / "missing.jpg"]
    picture(40, 50).convert("CMYK").save(made[-5])
    picture(40, 50).save(made[-4])
    made[-3].write_bytes(made[4].read_bytes()[:-2000])
    made[-2].touch()
    return [str(file) for file in made]


def test_without_simplejpeg_all_is_pillows(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "simplejpeg", None)
    out = np.empty((len(files), SIZE, SIZE, 3), np.uint8)
    bad = decode_all(files, out)
    assert sorted(bad) == list(range(len(files) - 3, len(files)))
    assert [error.file for error in bad.values()] == files[-3:]
    for file, row in zip(files[:-3], out):
        np.testing.assert_array_equal(row, decode(file, SIZE))


def all_by_pillow(file: str, size: int) -> np.ndarray:
    "At the scale that `decode` takes, in colour, and resized by Pillow too."
    with Image.open(file) as image:
        image.draft(None, (2 * size, 2 * size))
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [20, SIZE, 64])
def test_pixels_are_up_to_five_levels_off_those_resized_by_pillow(files: list[str], size: int) -> None:
    out = np.empty((len(files), size, size, 3), np.uint8)
    decode_all(files, out)
    slow = np.stack([all_by_pillow(file, size) for file in files[:-3]])
    apart = np.abs(out[:-3].astype(int) - slow)
    assert apart.max() <= 5
    assert (apart > 0).mean() < 0.03


@fast
@pytest.mark.parametrize("size", [20, SIZE, 64])
def test_simplejpeg_gives_the_very_pixels(files: list[str], size: int) -> None:
    out = np.empty((len(files), size, size, 3), np.uint8)
    bad = decode_all(files, out)
    assert sorted(bad) == list(range(len(files) - 3, len(files)))
    np.testing.assert_array_equal(out[:-3], np.stack([decode(file, size) for file in files[:-3]]))
    assert decode_all(files, np.empty((len(files), size, size, 1), np.uint8)).keys() == bad.keys(), "grey is Pillow's"


@pytest.mark.parametrize("by", ["Pillow", pytest.param("simplejpeg", marks=fast)])
def test_the_same_files_in_another_batch_give_the_same_pixels(
    by: str, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "Pillow":
        monkeypatch.setattr(decoder, "simplejpeg", None)
    sound = files[:-3]
    whole, parts = (np.empty((3 * len(sound), SIZE, SIZE, 3), np.uint8) for _ in range(2))
    decode_all(sound * 3, whole)
    for row, file in enumerate(sound * 3):
        decode_all([file], parts[row : row + 1])
    np.testing.assert_array_equal(whole, parts)


@pytest.mark.parametrize("by", ["Pillow", pytest.param("simplejpeg", marks=fast)])
def test_jpegs_of_one_shape_are_resized_together(by: str, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "Pillow":
        monkeypatch.setattr(decoder, "simplejpeg", None)
    else:
        simplejpeg = Mock(wraps=decoder.simplejpeg)
        monkeypatch.setattr(decoder, "simplejpeg", simplejpeg)
    resized = Mock(side_effect=decoder.resized)
    monkeypatch.setattr(decoder, "resized", resized)
    monkeypatch.setattr(decoder, "decode", lambda *_, **__: pytest.fail("one by one"))
    jpegs = files[:9]  # of which two have one shape
    decode_all(jpegs * 3, np.empty((27, SIZE, SIZE, 3), np.uint8))
    assert resized.call_count == 8
    assert by == "Pillow" or simplejpeg.decode_jpeg.call_count == 27


@fast
def test_an_image_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(60, 60).save(tmp_path / "large.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3599)
    bad = decode_all([str(tmp_path / "large.jpg")], np.empty((1, SIZE, SIZE, 3), np.uint8))
    assert "60x60 pixels" in bad[0].reason


def test_the_version_names_all_that_pixels_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    there = decoder_version()
    assert (
        "Pillow" in there
        and f"torch {torch.__version__}" in there
        and ("simplejpeg" in there) == (decoder.simplejpeg is not None)
    )
    monkeypatch.setattr(decoder, "simplejpeg", None)
    assert (decoder_version() == there) == (not there.count("simplejpeg"))
