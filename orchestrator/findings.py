"Findings: an examination as pictures and as tables, by name."

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from learner.data.images import decode
from learner.figures import image_grid
from learner.figures_interpret import class_bars, confused_pairs, confusion_matrix, shortened
from learner.interpret import Outcomes, most_confused
from orchestrator.examine import Examined
from orchestrator.tables import Row, class_rows, confusion_rows, outcome_rows, pair_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEGIBLE = 160  # pixels: people see more than the model does in its small pictures


def figures(examined: Examined, top: int) -> dict[str, Figure]:
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


def loss_grid(examined: Examined, worst: Outcomes) -> Figure:
    "Images, squashed to a square as for the model, each under its loss, what was said of it, and what it is."
    files, classes = examined.labelled.files, examined.run.classes
    titles = [
        f"said {shortened(classes[predicted], 14)} {chance:.2f}\nis {shortened(classes[target], 14)}, loss {loss:.2f}"
        for predicted, target, chance, loss in zip(
            worst.predicted.tolist(), worst.targets.tolist(), worst.probabilities[:, 0].tolist(), worst.losses.tolist()
        )
    ]
    side, channels = max(LEGIBLE, examined.run.presize), examined.run.channels
    images = np.stack([decode(files[sample], side, channels=channels) for sample in worst.samples.tolist()])
    return image_grid(images, titles, columns=6)
