"The pictures of a run and of what a model made of a dataset. Charts import matplotlib, the first of them."

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from learner.interpret import Confused
from learner.metrics import per_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERED = 30  # classes: of more, the cells of a confusion matrix are too small for numbers, and for every name
BARS = 40
SIDE = 128  # pixels: smaller images are enlarged
GAP = 8  # pixels
PLAIN: dict[str, bool] = {"parse_math": False}  # a class may be called $x^$, which is no formula


def image_grid(images: np.ndarray, titles: Sequence[str], columns: int = 8) -> Image.Image:
    """Images uint8 (n, h, w, 3), or (n, h, w, 1) in grey, in a grid, each under its title.

    Without matplotlib, which takes a second to import and draw: in a run, the driver draws it while its workers train.
    """
    font = _font(11)
    height, width = (side * -(-SIDE // images.shape[2]) for side in images.shape[1:3])
    head = 6 + 14 * max((title.count("\n") + 1 for title in titles), default=1)
    grid = Image.new("RGB", ((width + GAP) * columns, (head + height) * -(-len(images) // columns)), "white")
    for place, (image, title) in enumerate(zip(images, titles, strict=True)):
        cell = Image.new("RGB", (width, head + height), "white")
        text = "\n".join(_fitting(drawable(line), font, width) for line in title.split("\n"))
        ImageDraw.Draw(cell).text((width / 2, 2), text, "black", font, anchor="ma", align="center")
        shown = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        cell.paste(shown.resize((width, height), Image.Resampling.NEAREST), (0, head))
        grid.paste(cell, (place % columns * (width + GAP) + GAP // 2, place // columns * (head + height)))
    return grid


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    "The font that matplotlib brings; Pillow's own has no letters beyond ASCII."
    spec = find_spec("matplotlib")  # which does not import it
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    try:
        return ImageFont.truetype(str(folder / "mpl-data/fonts/ttf/DejaVuSans.ttf"), size)  # Pillow 10 takes no Path
    except OSError:
        return ImageFont.load_default(size)


def _fitting(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    "The line, or as much of it as can be drawn in so many pixels."
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line}…"


def drawable(text: str) -> str:
    "The text with a ? for what can't be encoded, as a folder's name may have it: matplotlib fails on that."
    return text.encode("utf-8", "replace").decode()


def show_batch(batch: tuple[Tensor, Tensor], classes: Sequence[str], n: int = 32) -> Image.Image:
    "The first `n` pictures of a batch, inputs uint8 (n, h, w, channels) and targets, under the names of their classes."
    inputs, targets = (part[:n].cpu() for part in batch)
    return image_grid(inputs.numpy(), [classes[target] for target in targets.tolist()])


def confusion_matrix(confusion: Tensor, classes: Sequence[str]) -> Image.Image:
    "How often each class (row) was taken for each (column), coloured by the share of the row."
    n = len(classes)
    side = min(4 + 0.35 * n, 16)
    figure = _figure(side, side)
    axes = figure.add_subplot()
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    places = range(0, n, -(-n // NUMBERED))
    names = [shortened(classes[i]) for i in places]
    axes.set_xticks(places, names, rotation=90, **PLAIN)
    axes.set_yticks(places, names, **PLAIN)
    axes.set(xlabel="predicted", ylabel="actual")
    if n <= NUMBERED:
        for (row, column), count in _cells(confusion):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count}", ha="center", va="center", fontsize=8, color=colour)
    return _drawn(figure)


def confused_pairs(pairs: Sequence[Confused], classes: Sequence[str]) -> Image.Image:
    "A bar for each pair of classes: how often the first was taken for the second."
    names = [f"{shortened(classes[pair.actual])} taken for {shortened(classes[pair.predicted])}" for pair in pairs]
    figure = _figure(8, 1.5 + 0.25 * len(pairs))
    axes = figure.add_subplot()
    bars = axes.barh(range(len(pairs)), [pair.count for pair in pairs])
    axes.bar_label(bars, padding=3, fontsize=8)
    axes.set_yticks(range(len(pairs)), names, **PLAIN)
    axes.set_ylim(max(len(pairs), 1) - 0.4, -0.6)
    axes.set_xlabel("images" if pairs else "no image was taken for another class")
    axes.locator_params(axis="x", integer=True)
    return _drawn(figure)


def class_bars(confusion: Tensor, classes: Sequence[str]) -> Image.Image:
    "Precision, recall and F1 of each class that occurs, the lowest F1 first; of many classes the lowest alone."
    table = per_class(confusion)
    occurring = [i for i in table["f1"].argsort(stable=True).tolist() if table["support"][i]]
    order = occurring[:BARS]
    figure = _figure(8, 1.5 + 0.45 * len(order))
    axes = figure.add_subplot()
    for number, (name, marker) in enumerate({"precision": "<", "recall": ">", "f1": "o"}.items()):
        axes.plot(table[name][order].numpy(), range(len(order)), marker, label=name, alpha=0.8, markersize=6 + number)
    names = [f"{shortened(classes[i])} ({int(table['support'][i])})" for i in order]
    axes.set_yticks(range(len(order)), names, **PLAIN)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.4)
    axes.set_xlim(-0.02, 1.02)
    cut = f"; of {len(classes)} classes those of the lowest f1" if order != occurring else ""
    axes.set_xlabel(f"in brackets: images of the class{cut}")
    axes.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return _drawn(figure)


def shortened(name: str, length: int = 24) -> str:
    "A name that can be drawn, and leaves room for the picture."
    name = drawable(name)
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _cells(confusion: Tensor) -> list[tuple[tuple[int, int], int]]:
    "Row, column and count of the cells that are not zero."
    return [((row, column), int(confusion[row, column])) for row, column in confusion.nonzero().tolist()]


def lr_curve(
    lrs: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], suggestion: float
) -> Image.Image:
    "Loss against learning rate, raw and smoothed, with the suggested rate marked."
    figure = _figure(7, 4)
    axes = figure.add_subplot()
    axes.plot(lrs, losses, alpha=0.3, label="loss of the global batch")
    axes.plot(lrs, smoothed, label="smoothed")
    axes.axvline(suggestion, color="tab:red", linestyle="--", label=f"suggestion {suggestion:.2e}")
    low, high = min(smoothed), losses[0]
    axes.set(
        xscale="log", xlabel="learning rate", ylabel="loss", ylim=(low - 0.1 * (high - low), low + 2 * (high - low))
    )
    axes.legend()
    return _drawn(figure)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="tight")


def _drawn(figure: Figure) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # it is a box
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
