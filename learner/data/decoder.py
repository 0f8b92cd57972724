"""Many image files at once: JPEGs of one size are resized in one call, and decoded by simplejpeg where it is installed.

It is an extra (`pip install orchestrator[fast]`), and hands a JPEG to libjpeg-turbo with less ado than Pillow: twice as
fast on a core, with the same pixels. What is no sound JPEG is left to `decode`, one file after the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image

from learner.data.images import BadImage, converter, decode, open_jpeg, pixels_of, resized
from learner.reading import read_bytes

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

AT_ONCE = 32  # pictures: the memory of more would no longer be in the processor's cache
MAX_PIXELS = 2**24  # of all that are decoded at once; one picture may have more
MAX_BYTES = 2**23  # of a file; larger ones are left to `decode`


def decoder_version() -> str:
    "What the pixels that `decode_all` makes may depend on."
    by = {"Pillow": PIL, "torch": torch} | ({"simplejpeg": simplejpeg} if simplejpeg else {})
    return ", ".join(f"{name} {module.__version__}" for name, module in by.items())


@dataclass(frozen=True)
class Jpeg:
    "The row that a file is for, the height and width at which it is decoded, and what does so, into an array."

    row: int
    height: int
    width: int
    decode_into: Callable[[NDArray[np.uint8]], object]


def decode_all(files: Sequence[str], out: NDArray[np.uint8]) -> dict[int, BadImage]:
    """Fill each row of `out`, (n, size, size, channels), with its file's picture; those that are none, by row.

    As `decode`: simplejpeg, where it is at work, decodes at the same scale by the same library, and all resize alike.
    """
    done = _decode_jpegs(files, out)
    bad = {}
    for row in sorted(set(range(len(files))) - done):
        try:
            out[row] = decode(files[row], out.shape[1], channels=out.shape[-1])
        except BadImage as error:
            bad[row] = error
    return bad


def _decode_jpegs(files: Sequence[str], out: NDArray[np.uint8]) -> set[int]:
    "Fill the rows whose files are plain, sound JPEGs; which these are."
    by_shape: dict[tuple[int, int], list[Jpeg]] = defaultdict(list)
    for row, file in enumerate(files):
        if jpeg := _open(row, file, *out.shape[2:]):
            by_shape[jpeg.height, jpeg.width].append(jpeg)
    done: set[int] = set()
    for (height, width), alike in by_shape.items():
        at_once = max(1, min(AT_ONCE, MAX_PIXELS // (height * width)))
        for first in range(0, len(alike), at_once):
            done |= _decode_alike(alike[first : first + at_once], out)
    return done


def _open(row: int, file: str, size: int, channels: int) -> Jpeg | None:
    try:
        data = read_bytes(file, MAX_BYTES)
        return (
            _by_simplejpeg(row, data, size) if simplejpeg and channels == 3 else _by_pillow(row, data, size, channels)
        )
    except Exception:  # simplejpeg's are ValueErrors, Pillow's anything; `decode` says what is wrong
        return None


def _by_pillow(row: int, data: bytes, size: int, channels: int) -> Jpeg:
    image = open_jpeg(data, size)

    def decode_into(pixels: NDArray[np.uint8]) -> None:
        with closing(image):  # it holds all of its pixels from here on
            pixels[:] = pixels_of(converter(channels)(image))

    return Jpeg(row, image.height, image.width, decode_into)


def _by_simplejpeg(row: int, data: bytes, size: int) -> Jpeg | None:
    height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    if space not in ("YCbCr", "Gray") or height * width > (Image.MAX_IMAGE_PIXELS or float("inf")):
        return None
    times = min(width // (2 * size), height // (2 * size))  # the scales that Pillow's draft has
    factor = max(scale for scale in (1, 2, 4, 8) if scale <= max(1, times))
    height, width = -(-height // factor), -(-width // factor)
    least = {"min_height": height, "min_width": width, "min_factor": factor} if factor > 1 else {}
    return Jpeg(row, height, width, lambda pixels: simplejpeg.decode_jpeg(data, buffer=pixels, **least))


def _decode_alike(jpegs: Sequence[Jpeg], out: NDArray[np.uint8]) -> set[int]:
    "JPEGs of one size into one buffer, and from there resized all at once; the rows of those that were sound."
    whole = np.empty((len(jpegs), jpegs[0].height, jpegs[0].width, out.shape[-1]), np.uint8)
    rows: list[int] = []
    for jpeg in jpegs:
        try:
            jpeg.decode_into(whole[len(rows)])
            rows.append(jpeg.row)
        except Exception:
            continue  # `decode` says what is wrong with it, or makes do with it
    if rows:
        out[rows] = resized(whole[: len(rows)], out.shape[1])
    return set(rows)
