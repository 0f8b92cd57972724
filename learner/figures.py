"The pictures of a run and of what a model made of a dataset, as matplotlib figures, which the first drawn imports."

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

from learner.interpret import Confused
from learner.metrics import per_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERED = 30  # classes: of more, the cells of a confusion matrix are too small for numbers, and for every name
BARS = 40
PLAIN: dict[str, bool] = {"parse_math": False}  # a class may be called $x^$, which is no formula


def image_grid(images: np.ndarray, titles: Sequence[str], columns: int = 8) -> Figure:
    """Images uint8 (n, h, w, 3), or (n, h, w, 1) in grey, in a grid, each under its title.

    All share their axes, in which an image is as wide as 1: with axes for each, 32 took a second to draw.
    """
    rows = -(-len(images) // columns)
    head = 0.05 + 0.1 * max((title.count("\n") + 1 for title in titles), default=1)
    width, height = 1.06, images.shape[1] / images.shape[2] + head
    figure = _figure(1.5 * width * columns, 1.5 * height * rows, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    for place, (image, title) in enumerate(zip(images, titles, strict=True)):
        top, left = place // columns * height + head, place % columns * width + 0.03
        box = left, left + 1, top + height - head, top
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=box)
        text = drawable(title)  # a class may be called $x^$, which is no formula
        axes.text(left + 0.5, top - 0.03, text, fontsize=8, ha="center", va="bottom", parse_math=False)
    axes.set(xlim=(0, width * columns), ylim=(height * rows, 0))
    return figure


def drawable(text: str) -> str:
    "The text with a ? for what can't be encoded, as a folder's name may have it: matplotlib fails on that."
    return text.encode("utf-8", "replace").decode()


def show_batch(batch: tuple[Tensor, Tensor], classes: Sequence[str], n: int = 32) -> Figure:
    "The first `n` pictures of a batch, inputs uint8 (n, h, w, channels) and targets, under the names of their classes."
    inputs, targets = (part[:n].cpu() for part in batch)
    return image_grid(inputs.numpy(), [classes[target] for target in targets.tolist()])


def confusion_matrix(confusion: Tensor, classes: Sequence[str]) -> Figure:
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
    return figure


def confused_pairs(pairs: Sequence[Confused], classes: Sequence[str]) -> Figure:
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
    return figure


def class_bars(confusion: Tensor, classes: Sequence[str]) -> Figure:
    "Precision, recall and F1 of each class that occurs, the lowest F1 first; of many classes the lowest alone."
    table = per_class(confusion)
    order = [i for i in table["f1"].argsort(stable=True).tolist() if table["support"][i]][:BARS]
    figure = _figure(8, 1.5 + 0.45 * len(order))
    axes = figure.add_subplot()
    for number, (name, marker) in enumerate({"precision": "<", "recall": ">", "f1": "o"}.items()):
        axes.plot(table[name][order].numpy(), range(len(order)), marker, label=name, alpha=0.8, markersize=6 + number)
    names = [f"{shortened(classes[i])} ({int(table['support'][i])})" for i in order]
    axes.set_yticks(range(len(order)), names, **PLAIN)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.4)
    axes.set_xlim(-0.02, 1.02)
    cut = f"; of {len(classes)} classes those of the lowest f1" if len(order) == BARS else ""
    axes.set_xlabel(f"in brackets: images of the class{cut}")
    axes.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


def shortened(name: str, length: int = 24) -> str:
    "A name that can be drawn, and leaves room for the picture."
    name = drawable(name)
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _cells(confusion: Tensor) -> list[tuple[tuple[int, int], int]]:
    "Row, column and count of the cells that are not zero."
    return [((row, column), int(confusion[row, column])) for row, column in confusion.nonzero().tolist()]


def lr_curve(lrs: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], suggestion: float) -> Figure:
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
    return figure


def _figure(width: float, height: float, layout: Literal["tight"] | None = "tight") -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)
