"""Many image files at once: by simplejpeg, an extra (`pip install orchestrator[fast]`), where it is installed.

It hands a JPEG to libjpeg-turbo with less ado than Pillow, and pictures of one size are resized in one call: together
more than twice as fast on a core as one file after the other by Pillow, which decodes whatever is left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image

from learner.data.images import BadImage, decode, resized
from learner.reading import read_bytes

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

AT_ONCE = 32  # pictures: the memory of more would no longer be in the processor's cache
MAX_PIXELS = 2**24  # of all that are decoded at once; one picture may have more
MAX_BYTES = 2**23  # of a file; larger ones are left to Pillow, which takes one after the other


def decoder_version() -> str:
    "What the pixels that `decode_all` makes may depend on."
    by = {"Pillow": PIL, "torch": torch} | ({"simplejpeg": simplejpeg} if simplejpeg else {})
    return ", ".join(f"{name} {module.__version__}" for name, module in by.items())


@dataclass(frozen=True)
class Jpeg:
    "A file's bytes, the row it is for, and the height and width at which it is to be decoded: 1/`factor` of its own."

    row: int
    data: bytes
    height: int
    width: int
    factor: int


def decode_all(files: Sequence[str], out: NDArray[np.uint8]) -> dict[int, BadImage]:
    """Fill each row of `out`, (n, size, size, channels), with its file's picture; those that are none, by row.

    As `decode`: simplejpeg, where it is at work, decodes at the same scale by the same library, and both resize alike.
    """
    done = _decode_fast(files, out) if simplejpeg and out.shape[-1] == 3 else set()
    bad = {}
    for row in sorted(set(range(len(files))) - done):
        try:
            out[row] = decode(files[row], out.shape[1], channels=out.shape[-1])
        except BadImage as error:
            bad[row] = error
    return bad


def _decode_fast(files: Sequence[str], out: NDArray[np.uint8]) -> set[int]:
    "Fill the rows whose files are plain, sound JPEGs; which these are."
    by_shape: dict[tuple[int, int], list[Jpeg]] = defaultdict(list)
    for row, file in enumerate(files):
        if jpeg := _open(row, file, out.shape[1]):
            by_shape[jpeg.height, jpeg.width].append(jpeg)
    done: set[int] = set()
    for (height, width), alike in by_shape.items():
        at_once = max(1, min(AT_ONCE, MAX_PIXELS // (height * width)))
        for first in range(0, len(alike), at_once):
            done |= _decode_alike(alike[first : first + at_once], out)
    return done


def _open(row: int, file: str, size: int) -> Jpeg | None:
    try:
        data = read_bytes(file, MAX_BYTES)
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except (OSError, ValueError):
        return None
    if space not in ("YCbCr", "Gray") or height * width > (Image.MAX_IMAGE_PIXELS or float("inf")):
        return None
    times = min(width // (2 * size), height // (2 * size))  # the scales that Pillow's draft has
    factor = max(scale for scale in (1, 2, 4, 8) if scale <= max(1, times))
    return Jpeg(row, data, -(-height // factor), -(-width // factor), factor)


def _decode_alike(jpegs: Sequence[Jpeg], out: NDArray[np.uint8]) -> set[int]:
    "JPEGs of one size into one buffer, and from there resized all at once; the rows of those that were sound."
    height, width, size = jpegs[0].height, jpegs[0].width, out.shape[1]
    whole = np.empty((len(jpegs), height, width, 3), np.uint8)
    rows: list[int] = []
    for jpeg in jpegs:
        least = {"min_height": height, "min_width": width, "min_factor": jpeg.factor} if jpeg.factor > 1 else {}
        try:
            simplejpeg.decode_jpeg(jpeg.data, buffer=whole[len(rows)], **least)
            rows.append(jpeg.row)
        except ValueError:
            continue  # Pillow says what is wrong with it, or makes do with it
    if rows:
        out[rows] = resized(whole[: len(rows)], size)
    return set(rows)
