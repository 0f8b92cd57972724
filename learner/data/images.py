"One image file to bytes of a given size, in colour or in grey."

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from learner.errors import UsageError, UserError
from learner.reading import opened

# Pillow goes by what a file holds, whatever its name, and knows formats that call other programs (PostScript)
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")


class BadImage(UserError):
    "A file that is no readable image; `file` and `reason` say which and why."

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file} is no readable image: {reason}; mend it or remove it")
        self.file, self.reason = file, reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.file, self.reason)


def decode(file: str, size: int, channels: int = 3) -> NDArray[np.uint8]:
    """The image squashed to a square, uint8 (size, size, channels), whatever its mode: grey, palette, CMYK ...

    With 3 `channels` it is in colour, with 1 in grey. A JPEG is decoded at a half, quarter or eighth where that is
    still twice the target or more: the bicubic filter then sees enough pixels that nobody can tell. It is resized by
    `resized`, what has no loss by Pillow. As in fastai, it stays as it lies in the file: how the camera was held, which
    EXIF may tell, is not asked. Raises BadImage for a file that is missing, empty, truncated, not an image, of numbers
    that are no brightness, or so large that it must be an attack.
    """
    convert = converter(channels)
    with _opened(file) as image:
        _shrink(image, size)
        if not isinstance(image, JpegImageFile):
            return pixels_of(convert(image).resize((size, size), Image.Resampling.BICUBIC))
        return resized(pixels_of(convert(image))[None], size)[0]


def resized(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Pictures (n, height, width, channels) squashed to (n, size, size, channels).

    The filter is Pillow's bicubic, but torch needs a third of its time; up to 2 levels off, or 5 in tall pictures,
    which Pillow 13 resizes in the other direction first.
    """
    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    return F.interpolate(planes, (size, size), mode="bicubic", antialias=True).permute(0, 2, 3, 1).numpy()


def open_image(file: str, channels: int = 3) -> NDArray[np.uint8]:
    "The image as large as it is, uint8 (height, width, channels); for the rest as `decode`."
    convert = converter(channels)
    with _opened(file) as image:
        return pixels_of(convert(image))


@contextmanager
def _opened(file: str) -> Iterator[Image.Image]:
    "The image while it is read; whatever goes wrong there is a BadImage."
    try:
        with opened(file) as stream, Image.open(stream, formats=FORMATS) as image:
            _check_area(image)
            yield image
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly everything, SyntaxError and struct.error included
        raise BadImage(file, _reason(file, error)) from error


def open_jpeg(content: bytes, size: int) -> Image.Image:
    "The JPEG that `content` is, about to be decoded at the scale that `decode` takes; raises what Pillow may."
    image = Image.open(io.BytesIO(content), formats=("JPEG",))
    _check_area(image)
    _shrink(image, size)
    return image


def _shrink(image: Image.Image, size: int) -> None:
    "Have a JPEG decoded at the smallest scale that leaves twice the target's pixels a side."
    image.draft(None, (2 * size, 2 * size))


def pixels_of(image: Image.Image) -> NDArray[np.uint8]:
    "The bytes of a picture in colour or grey: (height, width, channels)."
    # np.asarray takes half as long again, and torch wants memory that may be written to
    return np.frombuffer(bytearray(image.tobytes()), np.uint8).reshape(image.height, image.width, -1)


def is_grey(pixels: Any) -> bool:
    "Whether bytes (..., 3), an array or a tensor, show no colour: then any channel is what `channels=1` gives."
    return bool((pixels == pixels[..., :1]).all())


def _check_area(image: Image.Image) -> None:
    # Pillow warns, and refuses only twice as much; to turn its warning into an error is not safe in threads
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels, over {Image.MAX_IMAGE_PIXELS}")


def converter(channels: int) -> Callable[[Image.Image], Image.Image]:
    "What makes pictures of any mode such with that many channels; UsageError but for 1 and 3."
    if channels not in (1, 3):
        raise UsageError(f"pictures can't have {channels} channels: it must be 1 (grey) or 3 (colour)")
    return to_rgb if channels == 3 else to_grey


def to_grey(image: Image.Image) -> Image.Image:
    "Any mode as 8-bit grey, by way of `to_rgb`."
    return image if image.mode == "L" and "transparency" not in image.info else to_rgb(image).convert("L")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB: 16-bit grey is scaled to 8 bits, transparency laid over white.

    ValueError for floating-point and 32-bit numbers, as TIFF may have them: nobody knows which of them is white.
    """
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError("its numbers are floating-point or have 32 bits, not 8 or 16, so that none is known as white")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(file: str, error: Exception) -> str:
    try:
        if os.path.getsize(file) == 0 and os.path.isfile(file):
            return "the file is empty"
    except OSError as missing:
        return missing.strerror or str(missing)
    return str(error).partition(" <_io.")[0] or type(error).__name__
