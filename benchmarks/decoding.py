"Decoding on one core, by way and size, from JPEGs of Imagenette's real sizes and aspects, made on the spot."

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.accuracy import DATA
from benchmarks.timing import aim, interleaved, quotients, shown
from learner.data import decoder
from learner.data.decoder import decode_all
from learner.data.files import open_split
from learner.data.sources import resolve

N, ROUNDS, BATCH = 256, 50, 128  # a round is a batch by each way in turn: shorter than the machine's moods
OURS, AIM = "ours, simplejpeg", 3.5
RAW = "libjpeg-turbo alone, the same scale, bytes in memory, one buffer"
ASPECTS = (4 / 3, 4 / 3, 4 / 3, 3 / 2, 3 / 4, 1.0, 4 / 3, 5 / 4)  # the short side is 160 in Imagenette's own archive
Way = Callable[[Sequence[str], int], object]


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


def ours(files: Sequence[str], size: int) -> None:
    "As a worker does it."
    decode_all(files, np.empty((len(files), size, size, 3), np.uint8))


def by_pillow(files: Sequence[str], size: int) -> None:
    "As a worker does it that has no simplejpeg."
    installed, decoder.simplejpeg = decoder.simplejpeg, None
    try:
        ours(files, size)
    finally:
        decoder.simplejpeg = installed


def each_by_simplejpeg(files: Sequence[str], size: int) -> None:
    "One file after the other, resized by torch."
    for file in files:
        image = torch.from_numpy(decoder.simplejpeg.decode_jpeg(Path(file).read_bytes()))
        F.interpolate(image.permute(2, 0, 1)[None], (size, size), mode="bicubic", antialias=True)


class Raw:
    "What no decoder by libjpeg-turbo can beat: nothing is read, resized or allocated."

    def __init__(self, files: Sequence[str], size: int) -> None:
        jpegs = {file: decoder._open(0, file, size, 3) for file in files}
        self.jpegs = {file: jpeg for file, jpeg in jpegs.items() if jpeg is not None}
        self.buffer = np.empty(max(3 * jpeg.height * jpeg.width for jpeg in self.jpegs.values()), np.uint8)

    def __call__(self, files: Sequence[str], size: int) -> None:
        "Decode."
        for jpeg in map(self.jpegs.__getitem__, files):
            jpeg.decode_into(self.buffer[: 3 * jpeg.height * jpeg.width].reshape(jpeg.height, jpeg.width, 3))


def ways(files: Sequence[str], size: int) -> dict[str, Callable[[], object]]:
    "What is compared; each call of one is its next batch of the files."
    table: dict[str, Way] = {"the book's": books, "ours, Pillow": by_pillow}
    if decoder.simplejpeg:
        table["simplejpeg, each resized by torch"] = each_by_simplejpeg
        table[OURS] = ours
        table[RAW] = Raw(files, size)
    batches = [files[first : first + BATCH] for first in range(0, len(files), BATCH)]
    return {name: partial(by_turns, way, cycle(batches), size) for name, way in table.items()}


def by_turns(way: Way, batches: Iterator[Sequence[str]], size: int) -> None:
    "Decode the next batch."
    way(next(batches), size)


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
    lines = ["| to | way | images/s | times the book's speed | aim | of the raw speed |", "| --- " * 6 + "|"]
    with tempfile.TemporaryDirectory() as folder:
        files, notes = photographs(Path(folder)), []
        for size in (64, 128):
            seconds = interleaved(ways(files, size), ROUNDS)
            for way, times in seconds.items():
                times_books = quotients(seconds, "the book's", way)
                cells = shown(times_books), aim(AIM, times_books, least=True) if way == OURS else ""
                share = f"{median(quotients(seconds, RAW, way)):.0%}" if RAW in seconds else ""
                lines.append(f"| {size} px | {way} | {BATCH / median(times):.0f} | {' | '.join(cells)} | {share} |")
            notes.append(apart(files, size))
    missing = "" if decoder.simplejpeg else "simplejpeg is not installed here: `pip install .[fast]` shows its rows. "
    return f"""\
{N} photographs of Imagenette, given aspects of 3:2 to 3:4 and a short side of 160 as in its original archive (the copy
at hand has squares only), decoded from files by one thread; medians (quartiles) of {ROUNDS} rounds, in each of which
every way has the same {BATCH} in turn.
{missing}What was tried where the aim is missed is in NOTES.md. Our pixels against the book's: {"; ".join(notes)}.

""" + "\n".join(lines)
