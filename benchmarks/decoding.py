"Decoding on one core, by way and size, from JPEGs of Imagenette's real sizes and aspects, made on the spot."

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.accuracy import DATA
from benchmarks.timing import interleaved, quotients, shown
from learner.data import decoder
from learner.data.decoder import decode_all
from learner.data.files import open_split
from learner.data.sources import resolve

N, ROUNDS, BATCH = 256, 9, 128
ASPECTS = (4 / 3, 4 / 3, 4 / 3, 3 / 2, 3 / 4, 1.0, 4 / 3, 5 / 4)  # the short side is 160 in Imagenette's own archive
Way = Callable[[], object]


def photographs(folder: Path) -> list[str]:
    "Photographs with these aspects, the short side 160, as JPEGs of quality 80 without sampling of their own."
    split = open_split(resolve(str(DATA), Path("~/.cache/orchestrator").expanduser()), 42)
    files = split.train.files[:: len(split.train) // N][:N]
    made = []
    for number, file in enumerate(files):
        aspect = ASPECTS[number % len(ASPECTS)]
        size = (round(160 * aspect), 160) if aspect >= 1 else (160, round(160 / aspect))
        with Image.open(file) as image:
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=80)
        made.append(str(folder / f"{number}.jpg"))
    return made


def books(files: Sequence[str], size: int) -> None:
    "As the book's chapter does: resized, converted, and made floats between 0 and 1."
    for file in files:
        with Image.open(file) as image:
            torch.from_numpy(
                np.array(image.resize((size, size), Image.Resampling.BICUBIC).convert("RGB"))
            ).float() / 255


def ours(files: Sequence[str], size: int, simplejpeg: object) -> None:
    "Batches by `decode_all`, with simplejpeg or without."
    out, installed = np.empty((BATCH, size, size, 3), np.uint8), decoder.simplejpeg
    decoder.simplejpeg = simplejpeg
    try:
        for first in range(0, len(files), BATCH):
            decode_all(files[first : first + BATCH], out)
    finally:
        decoder.simplejpeg = installed


def each_by_simplejpeg(files: Sequence[str], size: int) -> None:
    "One file after the other, resized by torch."
    for file in files:
        image = torch.from_numpy(decoder.simplejpeg.decode_jpeg(Path(file).read_bytes()))
        F.interpolate(image.permute(2, 0, 1)[None], (size, size), mode="bicubic", antialias=True)


def ways(files: Sequence[str], size: int) -> dict[str, Way]:
    "What is compared."
    table: dict[str, Way] = {
        "the book's": lambda: books(files, size),
        "ours, Pillow": lambda: ours(files, size, None),
    }
    if decoder.simplejpeg:
        table["simplejpeg, each resized by torch"] = lambda: each_by_simplejpeg(files, size)
        table["ours, simplejpeg"] = lambda: ours(files, size, decoder.simplejpeg)
        table["libjpeg-turbo alone, without resizing"] = lambda: [
            decoder.simplejpeg.decode_jpeg(Path(file).read_bytes()) for file in files
        ]
    return table


def by_book(file: str, size: int) -> np.ndarray:
    "The bytes of the book's way, before they are floats."
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def apart(files: Sequence[str], size: int) -> str:
    "How far our pixels are from the book's."
    out = np.empty((len(files), size, size, 3), np.uint8)
    decode_all(files, out)
    distance = np.abs(out.astype(int) - np.stack([by_book(file, size) for file in files]))
    return f"{size} px: at most {distance.max()} levels, {100 * (distance > 0).mean():.2f}% of values differ"


def run() -> str:
    "A table of speeds and their ratios to the book's."
    if not DATA.exists():
        sys.exit(f"error: {DATA} is missing; this benchmark needs it")
    torch.set_num_threads(1)
    lines = ["| to | way | images/s | times the book's speed |", "| --- | --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as folder:
        files, notes = photographs(Path(folder)), []
        for size in (64, 128):
            seconds = interleaved(ways(files, size), ROUNDS)
            for way, times in seconds.items():
                ratio = shown(quotients(seconds, "the book's", way))
                lines.append(f"| {size} px | {way} | {N / sorted(times)[ROUNDS // 2]:.0f} | {ratio} |")
            notes.append(apart(files, size))
    missing = "" if decoder.simplejpeg else "simplejpeg is not installed here: `pip install .[fast]` shows its rows. "
    return f"""\
{N} photographs of Imagenette, given aspects of 3:2 to 3:4 and a short side of 160 as in its original archive (the copy
at hand has squares only), decoded from files by one thread; medians (quartiles) of {ROUNDS} interleaved rounds.
{missing}The aim is 3.5 times the book's speed with the fast decoder. Our pixels against the book's: {"; ".join(notes)}.

""" + "\n".join(lines)
