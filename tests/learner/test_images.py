"One file to RGB bytes: every kind of picture in plausible colours, and every kind of wreck refused by name."

import os
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from learner.data.images import BadImage, decode, is_grey, open_image, to_grey, to_rgb
from learner.errors import UsageError

RGB = (200, 100, 40)


def over_white(colour: int, alpha: int) -> float:
    return 255 + (colour - 255) * alpha / 255


def palette(transparent: bool) -> Image.Image:
    "A palette picture whose colour 1 is RGB, and transparent if asked for."
    image = Image.new("P", (20, 14), 1)
    image.putpalette([0, 0, 0, *RGB])
    if transparent:
        image.info["transparency"] = 1
    return image


def solid(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (20, 14), colour)


# What is saved, under which extension, and the colour that it must have.
PICTURES = {
    "rgb": (solid("RGB", RGB), "png", RGB),
    "jpeg": (solid("RGB", RGB), "jpg", RGB),
    "grey": (solid("L", 77), "png", (77,) * 3),
    "grey jpeg": (solid("L", 77), "jpg", (77,) * 3),
    "bilevel": (solid("1", 1), "png", (255,) * 3),
    "palette": (palette(False), "png", RGB),
    "transparent palette": (palette(True), "png", (255,) * 3),
    "gif": (palette(False), "gif", RGB),
    "transparent gif": (palette(True), "gif", (255,) * 3),
    "opaque": (solid("RGBA", (*RGB, 255)), "png", RGB),
    "half transparent": (solid("RGBA", (*RGB, 128)), "png", [over_white(c, 128) for c in RGB]),
    "invisible": (solid("RGBA", (*RGB, 0)), "webp", (255,) * 3),
    "grey and alpha": (solid("LA", (60, 102)), "png", [over_white(60, 102)] * 3),
    "cmyk": (solid("CMYK", (0, 51, 255, 51)), "tif", (204, 163, 0)),
    "cmyk jpeg": (solid("CMYK", (0, 51, 255, 51)), "jpg", (204, 163, 0)),
    "16 bits": (solid("I;16", 40000), "png", (40000 / 257,) * 3),
    "16-bit tiff": (solid("I;16", 40000), "tif", (40000 / 257,) * 3),
    "bitmap": (solid("RGB", RGB), "bmp", RGB),
    "pixmap": (solid("RGB", RGB), "ppm", RGB),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_each_kind_of_picture_becomes_rgb_bytes_of_its_colour(tmp_path: Path, kind: str) -> None:
    image, extension, colour = PICTURES[kind]
    file = str(tmp_path / f"x.{extension}")
    image.save(file)
    pixels = decode(file, 9)
    assert pixels.shape == (9, 9, 3) and pixels.dtype == np.uint8
    lossy = 3 if extension in ("jpg", "webp") else 1
    assert np.abs(pixels - np.array(colour)).max() <= lossy


def png(header: bytes, rows: bytes = b"") -> bytes:
    "A PNG of this IHDR and these filtered rows."
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    made = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


@pytest.mark.parametrize(
    ("colour_type", "pixel", "colour"),
    [(2, (51400, 25700, 10280), RGB), (4, (15420, 26214), [over_white(60, 102)] * 3)],
)
def test_16_bits_in_colour_and_with_alpha(tmp_path: Path, colour_type: int, pixel: tuple, colour) -> None:
    row = b"\0" + struct.pack(f">{len(pixel)}H", *pixel) * 4
    (tmp_path / "x.png").write_bytes(png(struct.pack(">IIBBBBB", 4, 4, 16, colour_type, 0, 0, 0), row * 4))
    assert np.abs(decode(str(tmp_path / "x.png"), 5) - np.array(colour)).max() <= 1


@given(st.integers(4, 80), st.integers(4, 80), st.integers(1, 40))
def test_a_picture_without_loss_is_the_bicubic_squash(tmp_path_factory, width, height, size) -> None:
    file = str(tmp_path_factory.mktemp("squash") / "x.png")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    image.save(file)
    np.testing.assert_array_equal(decode(file, size), np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("shape", [(300, 200), (64, 513), (1024, 768)])
def test_a_jpeg_decoded_at_a_fraction_looks_like_the_whole(tmp_path: Path, shape: tuple[int, int]) -> None:
    down, across = np.mgrid[0 : shape[0], 0 : shape[1]] / 40
    waves = np.stack([np.sin(down), np.cos(across), np.sin(down + across)], 2)
    file = str(tmp_path / "x.jpg")
    Image.fromarray((127.5 + 120 * waves).astype(np.uint8)).save(file, quality=95)
    with Image.open(file) as image:
        whole = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(decode(file, 32) - whole).mean() < 2


def noise_file(tmp_path: Path, extension: str) -> bytes:
    file = tmp_path / f"whole.{extension}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(file)
    return file.read_bytes()


@pytest.mark.parametrize("extension", ["jpg", "png", "gif", "bmp", "webp", "tif"])
def test_a_truncated_file_is_refused(tmp_path: Path, extension: str) -> None:
    file = tmp_path / f"half.{extension}"
    whole = noise_file(tmp_path, extension)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadImage) as caught:
        decode(str(file), 8)
    assert caught.value.file == str(file) and caught.value.reason


BOMBS = {f"{side}.png": png(struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) for side in (10_000, 60_000)}
WRECKS = {
    "empty.jpg": (b"", "the file is empty"),
    "text.jpg": (b"<html>404 Not Found</html>", "cannot identify image file"),
    "zeros.png": (bytes(1000), "cannot identify image file"),
    "10000.png": (BOMBS["10000.png"], "10000x10000 pixels"),
    "60000.png": (BOMBS["60000.png"], "decompression bomb"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", WRECKS)
def test_a_wreck_is_refused_with_its_name_and_the_reason(tmp_path: Path, name: str) -> None:
    content, reason = WRECKS[name]
    file = str(tmp_path / name)
    Path(file).write_bytes(content)
    with pytest.raises(BadImage) as caught:
        decode(file, 8)
    assert caught.value.file == file and reason in caught.value.reason
    assert str(caught.value).count(file) == 1 and reason in str(caught.value)


def test_what_is_missing_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match=r"gone\.jpg is no readable image: No such file"):
        decode(str(tmp_path / "gone.jpg"), 8)
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(BadImage, match=r"link\.jpg is no readable image: No such file"):
        decode(str(tmp_path / "link.jpg"), 8)
    with pytest.raises(BadImage, match=r"Is a directory"):
        decode(str(tmp_path), 8)


@given(st.data())
def test_a_damaged_file_is_decoded_or_refused_and_nothing_else(tmp_path_factory, data) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    extension = data.draw(st.sampled_from(["jpg", "png", "gif", "webp", "tif"]))
    content = bytearray(noise_file(folder, extension))
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=5)):
        content[place] = byte
    file = folder / f"damaged.{extension}"
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert decode(str(file), 8).shape == (8, 8, 3)
        except BadImage as error:
            assert error.file == str(file)


def test_the_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BadImage("a.jpg", "too old")))
    assert (error.file, error.reason, str(error)) == ("a.jpg", "too old", str(BadImage("a.jpg", "too old")))


def test_decoding_leaves_the_warning_filters_of_other_threads_alone(tmp_path: Path, monkeypatch) -> None:
    solid("RGB", RGB).save(tmp_path / "x.png")
    during, really_open = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: during.append(list(warnings.filters)) or really_open(*a, **k))
    before = list(warnings.filters)
    decode(os.fspath(tmp_path / "x.png"), 8)
    assert during == [before]


def test_rgb_stays_itself() -> None:
    image = solid("RGB", RGB)
    assert to_rgb(image) is image


@pytest.mark.parametrize("kind", PICTURES)
def test_in_grey_each_kind_of_picture_has_one_channel_of_its_brightness(tmp_path: Path, kind: str) -> None:
    image, extension, colour = PICTURES[kind]
    file = str(tmp_path / f"x.{extension}")
    image.save(file)
    pixels = decode(file, 9, channels=1)
    assert pixels.shape == (9, 9, 1) and pixels.dtype == np.uint8
    assert np.abs(pixels - np.dot(colour, (0.299, 0.587, 0.114))).max() <= 3


@pytest.mark.parametrize("extension", ["png", "jpg"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_any_channel_of_a_grey_picture_is_that_picture_in_grey(tmp_path: Path, extension: str, mode: str) -> None:
    file = str(tmp_path / f"x.{extension}")
    noise = np.random.default_rng(0).integers(0, 256, (30, 40), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(file)
    colour, grey = decode(file, 16), decode(file, 16, channels=1)
    assert is_grey(colour)
    np.testing.assert_array_equal(colour[..., :1], grey)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_that_are_no_brightness_are_refused(tmp_path: Path, kind: type) -> None:
    Image.fromarray(np.linspace(0, 1, 20, dtype=np.float32).reshape(4, 5).astype(kind)).save(tmp_path / "x.tif")
    with pytest.raises(BadImage, match=r"x\.tif is no readable image: its numbers are floating-point or have 32 bits"):
        decode(str(tmp_path / "x.tif"), 8)
    wide = np.full((4, 5), 40_000, np.uint16)
    Image.fromarray(wide).save(tmp_path / "x.tif")
    assert (decode(str(tmp_path / "x.tif"), 8) == 40_000 >> 8).all()


def test_one_pixel_of_colour_is_no_grey(tmp_path: Path) -> None:
    pixels = np.full((2, 5, 5, 3), 7, np.uint8)
    assert is_grey(pixels)
    pixels[1, 4, 4, 2] = 8
    assert not is_grey(pixels)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_opened_as_large_as_it_is(tmp_path: Path, channels: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    pixels = open_image(str(tmp_path / "x.png"), channels)
    assert pixels.shape == (30, 40, channels)
    np.testing.assert_array_equal(
        pixels, np.asarray(Image.fromarray(noise).convert({1: "L", 3: "RGB"}[channels])).reshape(30, 40, -1)
    )


def test_an_opened_wreck_is_refused_like_a_decoded_one(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(noise_file(tmp_path, "jpg")[:500])
    with pytest.raises(BadImage, match=r"x\.jpg is no readable image: Truncated File Read"):
        open_image(str(tmp_path / "x.jpg"))


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_other_numbers_of_channels_are_refused(tmp_path: Path, channels: int) -> None:
    solid("RGB", RGB).save(tmp_path / "x.png")
    with pytest.raises(UsageError, match=f"can't have {channels} channels: it must be 1"):
        decode(str(tmp_path / "x.png"), 8, channels=channels)


def test_grey_stays_itself() -> None:
    image = solid("L", 5)
    assert to_grey(image) is image
