"One image file to RGB bytes of a given size."

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from learner.errors import UserError


class BadImage(UserError):
    "A file that is no readable image; `file` and `reason` say which and why."

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file} is no readable image: {reason}; mend it or remove it")
        self.file, self.reason = file, reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.file, self.reason)


def decode(file: str, size: int) -> NDArray[np.uint8]:
    """The image squashed to a square, uint8 (size, size, 3), whatever its mode: grey, palette, CMYK, transparent ...

    A JPEG is decoded at a half, quarter or eighth where that is still twice the target or more: the bicubic filter
    then sees enough pixels that nobody can tell. Raises BadImage for a file that is missing, empty, truncated, not an
    image, or so large that it must be an attack.
    """
    try:
        with Image.open(file) as image:
            _check_area(image)
            image.draft(None, (2 * size, 2 * size))
            return np.asarray(to_rgb(image).resize((size, size), Image.Resampling.BICUBIC))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly everything, SyntaxError and struct.error included
        raise BadImage(file, _reason(file, error)) from error


def _check_area(image: Image.Image) -> None:
    # Pillow warns, and refuses only twice as much; to turn its warning into an error is not safe in threads
    if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels, over {Image.MAX_IMAGE_PIXELS}")


def to_rgb(image: Image.Image) -> Image.Image:
    "Any mode as RGB: 16-bit grey is scaled to 8 bits, transparency laid over white."
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(file: str, error: Exception) -> str:
    try:
        if os.path.getsize(file) == 0:
            return "the file is empty"
    except OSError as missing:
        return missing.strerror or str(missing)
    return str(error).replace(f" {file!r}", "") or type(error).__name__
