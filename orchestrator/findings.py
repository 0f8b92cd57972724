"Findings: an examination as pictures and as tables: rows of text, for the terminal and for CSV files."

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL.Image import Image
from torch import Tensor

from learner.data.files import Labelled
from learner.data.images import decode
from learner.figures import class_bars, confused_pairs, confusion_matrix, image_grid
from learner.interpret import Confused, Outcomes, most_confused
from learner.metrics import per_class
from orchestrator.examine import Examined

Row = Sequence[str]

LEGIBLE = 160  # pixels: people see more than the model does in its small pictures


def pictures(examined: Examined, top: int) -> dict[str, Image]:
    "The confusion matrix, the `top` most confused pairs, the images with the `top` largest losses, and the classes."
    classes, confusion = examined.run.classes, examined.confusion
    return {
        "confusion": confusion_matrix(confusion, classes),
        "most_confused": confused_pairs(most_confused(confusion, top), classes),
        "top_losses": loss_grid(examined, examined.outcomes.top_losses(top)),
        "classes": class_bars(confusion, classes),
    }


def tables(examined: Examined) -> dict[str, list[Row]]:
    "The same in numbers, all pairs and all images."
    classes, confusion = examined.run.classes, examined.confusion
    return {
        "confusion": confusion_rows(classes, confusion),
        "most_confused": pair_rows(classes, most_confused(confusion)),
        "top_losses": outcome_rows(classes, examined.outcomes.top_losses(), examined.labelled),
        "classes": class_rows(classes, confusion),
    }


def loss_grid(examined: Examined, worst: Outcomes) -> Image:
    "Images, squashed to a square as for the model, each under its loss, what was said of it, and what it is."
    files, classes = examined.labelled.files, examined.run.classes
    titles = [
        f"{chance:.2f} {classes[predicted]}\nloss {loss:.2f}, is {classes[target]}"
        for predicted, target, chance, loss in zip(
            worst.predicted.tolist(), worst.targets.tolist(), worst.probabilities[:, 0].tolist(), worst.losses.tolist()
        )
    ]
    side, channels = max(LEGIBLE, examined.run.presize), examined.run.channels
    images = np.stack([decode(files[sample], side, channels=channels) for sample in worst.samples.tolist()])
    return image_grid(images, titles, columns=6)


def class_rows(classes: Sequence[str], confusion: Tensor) -> list[Row]:
    "A heading, and for each class its precision, recall, F1 and number of images."
    table = per_class(confusion)
    numbers = zip(*(table[name].tolist() for name in ("precision", "recall", "f1", "support")))
    rows = [(name, *(f"{value:.4f}" for value in row[:3]), f"{row[3]}") for name, row in zip(classes, numbers)]
    return [("class", "precision", "recall", "f1", "images"), *rows]


def pair_rows(classes: Sequence[str], pairs: Iterable[Confused]) -> list[Row]:
    "A heading, and for each pair what was shown, what was said, and how often."
    rows = [(classes[pair.actual], classes[pair.predicted], f"{pair.count}") for pair in pairs]
    return [("actual", "predicted", "images"), *rows]


def outcome_rows(classes: Sequence[str], outcomes: Outcomes, labelled: Labelled) -> list[Row]:
    "A heading, and for each outcome its file, what it shows, what was said and how surely, and the loss."
    numbers = (outcomes.samples, outcomes.targets, outcomes.predicted, outcomes.probabilities[:, 0], outcomes.losses)
    rows = [
        (labelled.files[sample], classes[target], classes[predicted], f"{confidence:.6f}", f"{loss:.6f}")
        for sample, target, predicted, confidence, loss in zip(*(each.tolist() for each in numbers))
    ]
    return [("file", "actual", "predicted", "confidence", "loss"), *rows]


def confusion_rows(classes: Sequence[str], confusion: Tensor) -> list[Row]:
    "A heading of predicted classes, and for each actual class how often it was taken for them."
    rows = [(name, *map(str, counts)) for name, counts in zip(classes, confusion.tolist())]
    return [("actual \\ predicted", *classes), *rows]


def columns(rows: Sequence[Row]) -> str:
    "The rows as lines of aligned columns, those of numbers to the right."
    aligned = []
    for heading, *cells in zip(*rows):
        width, numbers = max(map(len, [heading, *cells])), all(cell.replace(".", "").isdigit() for cell in cells)
        aligned.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in (heading, *cells)])
    return "\n".join("  ".join(row).rstrip() for row in zip(*aligned))


def write_csv(file: Path, rows: Iterable[Row]) -> None:
    "Write the rows as CSV; a file name that is not UTF-8 keeps its bytes."
    with open(file, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        csv.writer(stream).writerows(rows)
