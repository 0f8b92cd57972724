"""Owns `shapes`: a generated image dataset in Imagenette's layout, made in seconds where there is no network.

Ten classes of bright figures on dark, noisy, cluttered backgrounds. All figures have about the same area, any bright
colour and any place, so that no pixel and no mean colour tells the class; a linear model stays near 30% where
`simple_cnn` passes 95% in six epochs. The same seed gives the same files (under the same numpy and Pillow).
"""

import io
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

from learner.data.download import Progress, quiet
from learner.errors import UsageError

VERSION = 1  # part of the folder's name in the cache: raise it whenever a pixel changes
SPLITS = ("train", "val")
SEED, TRAIN, VALID = 42, 5000, 1000

Points = NDArray[np.float64]  # [n, 2], in a figure's own frame, about -1..1
Size = tuple[int, int]
Colour = tuple[int, ...]


def _round(corners: int, radius: float, at: tuple[float, float] = (0, 0)) -> Points:
    "A regular polygon, which many corners make a circle; its first corner points up."
    angle = 2 * math.pi * np.arange(corners) / corners
    return np.stack([np.sin(angle), -np.cos(angle)], axis=1) * radius + at


def _box(left: float, top: float, width: float, height: float) -> Points:
    right, bottom = left + width, top + height
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _star(points: int) -> Points:
    corners = _round(2 * points, 1.2)
    corners[1::2] *= 0.4
    return corners


def _zigzag(top: float, thickness: float) -> Points:
    x = np.linspace(-1, 1, 7)
    edge = np.stack([x, top + 0.5 * (np.arange(7) % 2)], axis=1)
    return np.concatenate([edge, edge[::-1] + np.array([0, thickness])])


# Class name to polygons. Their areas lie between 1.6 and 2.0: the amount of ink must not tell the class.
FIGURES: dict[str, list[Points]] = {
    "checkers": [_box(x, y, 0.6, 0.6) for x, y in [(-0.9, -0.9), (0.3, -0.9), (-0.3, -0.3), (-0.9, 0.3), (0.3, 0.3)]],
    "circle": [_round(32, 0.8)],
    "cross": [_box(-1, -0.25, 2, 0.5), _box(-0.25, -1, 0.5, 2)],
    "dots": [_round(10, 0.19, (x, y)) for x in (-0.75, -0.25, 0.25, 0.75) for y in (-0.75, -0.25, 0.25, 0.75)],
    "ring": [np.concatenate([_round(32, 1.0)[[*range(32), 0]], _round(32, 0.6)[[0, *range(31, -1, -1)]]])],
    "square": [_box(-0.7, -0.7, 1.4, 1.4)],
    "star": [_star(5)],
    "stripes": [_box(-0.9, y, 1.8, 0.25) for y in (-0.9, -0.385, 0.13, 0.645)],
    "triangle": [_round(3, 1.2)],
    "zigzag": [_zigzag(-0.8, 0.45), _zigzag(-0.1, 0.45)],
}
CLASSES = tuple(FIGURES)


def generate(
    folder: Path, seed: int = SEED, train: int = TRAIN, valid: int = VALID, progress: Progress = quiet
) -> None:
    "Write `train` and `valid` images as folder/{train,val}/CLASS/CLASS_NUMBER.JPEG."
    if seed < 0 or min(train, valid) < len(CLASSES):
        rule = f"the seed must be 0 or more, and each split needs an image of each of the {len(CLASSES)} classes"
        raise UsageError(f"shapes with seed={seed}, train={train}, valid={valid} cannot be made: {rule}")
    done = 0
    for split, count in zip(SPLITS, (train, valid), strict=True):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
        for index in range(count):
            name = CLASSES[index % len(CLASSES)]
            (folder / split / name / f"{name}_{index:05d}.JPEG").write_bytes(_jpeg(picture(seed, split, index)))
            done += 1
            progress("drawing shapes", done, train + valid)


def picture(seed: int, split: str, index: int) -> Image.Image:
    "Draw one image: its class is the index modulo ten, all else comes from (seed, split, index) alone."
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    size = _size(rng)
    dark = rng.integers(0, 110, 3)
    image = _background(rng, size, dark)
    _clutter(rng, image)
    image.paste(_bright(rng, dark), mask=_figure(rng, size, FIGURES[CLASSES[index % len(CLASSES)]]))
    return image.convert("L") if rng.random() < 0.04 else image  # Imagenette has its greyscale files too


def _jpeg(image: Image.Image) -> bytes:
    "Pillow, writing into a file by itself, does not see that a disk takes only the first half."
    content = io.BytesIO()
    image.save(content, "JPEG", quality=88)
    return content.getvalue()


def _size(rng: np.random.Generator) -> Size:
    width, height = rng.integers(80, 201, 2).tolist()
    longest = int(1.7 * min(width, height))
    return min(width, longest), min(height, longest)


def _background(rng: np.random.Generator, size: Size, dark: NDArray[np.int64]) -> Image.Image:
    "Soft patches around a dark colour, with grain."
    patches = np.clip(dark + rng.integers(-30, 31, (3, 3, 3)), 0, 255).astype(np.uint8)
    grain = Image.fromarray(rng.integers(0, rng.integers(2, 30), size[::-1], dtype=np.uint8))
    return ImageChops.add(
        Image.fromarray(patches).resize(size, Image.Resampling.BILINEAR), Image.merge("RGB", [grain] * 3)
    )


def _clutter(rng: np.random.Generator, image: Image.Image) -> None:
    "Draw up to three thin lines and three specks, which belong to no class."
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 4)):
        ends = rng.uniform(0, 1, (2, 2)) * image.size
        draw.line(ends.ravel().tolist(), fill=_colour(rng, 0, 160), width=int(rng.integers(1, 3)))
    for _ in range(rng.integers(0, 4)):
        speck = _round(5, rng.uniform(0.02, 0.05) * min(image.size)) + rng.uniform(0, 1, 2) * image.size
        draw.polygon(speck.ravel().tolist(), fill=_colour(rng, 0, 160))


def _figure(rng: np.random.Generator, size: Size, polygons: list[Points]) -> Image.Image:
    "Return a mask with the figure turned, stretched and placed at random within the image."
    mask = Image.new("L", (2 * size[0], 2 * size[1]))  # twice as large, then halved: smooth edges
    frame = _frame(rng, rng.uniform(0.27, 0.42) * min(mask.size))
    figure = [points @ frame for points in polygons]
    centre = np.array(mask.size) / 2
    reach = np.abs(np.concatenate(figure)).max(axis=0)
    place = centre + rng.uniform(-1, 1, 2) * np.maximum(centre - reach, 0)
    draw = ImageDraw.Draw(mask)
    for points in figure:
        draw.polygon((points + place).ravel().tolist(), fill=255)
    return mask.reduce(2)


def _frame(rng: np.random.Generator, radius: float) -> Points:
    "A random rotation and stretch. Figures stay near upright: their edges' directions are what a small CNN sees first."
    turn = rng.uniform(-0.3, 0.3)
    rotation = np.array([(math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn))])
    stretched: Points = radius * rng.uniform(0.9, 1.1, 2)[:, None] * rotation
    return stretched


def _bright(rng: np.random.Generator, dark: NDArray[np.int64]) -> Colour:
    "A colour well brighter than `dark`, so that figures stand out in greyscale as well."
    while True:
        colour = _colour(rng, 60, 256)
        if _luminance(colour) - _luminance(dark.tolist()) >= 100:
            return colour


def _colour(rng: np.random.Generator, low: int, high: int) -> Colour:
    return tuple(rng.integers(low, high, 3).tolist())


def _luminance(colour: Colour | list[int]) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
