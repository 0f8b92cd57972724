"The pictures of a run, as matplotlib figures; matplotlib is imported by the first that is drawn."

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
