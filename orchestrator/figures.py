"The pictures of a run, as matplotlib figures."

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure


def image_grid(images: np.ndarray, titles: Sequence[str], columns: int = 8) -> Figure:
    "Images uint8 (n, h, w, 3) in a grid, each under its title."
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.6 * columns, 1.8 * rows), layout="tight")
    for place, (image, title) in enumerate(zip(images, titles, strict=True), 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(image)
        axes.set_title(title, fontsize=8)
        axes.axis("off")
    return figure


def lr_curve(lrs: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], suggestion: float) -> Figure:
    "Loss against learning rate, raw and smoothed, with the suggested rate marked."
    figure = Figure(figsize=(7, 4), layout="tight")
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
