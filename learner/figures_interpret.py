"The pictures of what a model made of a dataset, as matplotlib figures; matplotlib is imported by the first drawn."

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from learner.figures import drawable
from learner.interpret import Confused
from learner.metrics import per_class

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERED = 30  # classes: of more, the cells of a confusion matrix are too small for numbers, and for every name
BARS = 40
PLAIN: dict[str, Any] = {"parse_math": False}  # a class may be called $x^$, which is no formula


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


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="tight")
