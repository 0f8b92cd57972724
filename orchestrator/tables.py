"Tables of what a model made of a dataset: as rows of text, for the terminal and for CSV files."

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from learner.data.files import Labelled
from learner.interpret import Confused, Outcomes
from learner.metrics import per_class

Row = Sequence[str]


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
    "The rows as lines of aligned columns, the first to the left and the others to the right."
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def write_csv(file: Path, rows: Iterable[Row]) -> None:
    "Write the rows as CSV; a file name that is not UTF-8 keeps its bytes."
    with open(file, "w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        csv.writer(stream).writerows(rows)
