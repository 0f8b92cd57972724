"TrackResults: the loss and metrics of each epoch, summed over samples."

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from learner.errors import UserError
from learner.learner import Callback
from learner.metrics import Sums, accuracy, means

Metric = Callable[[Tensor, Tensor], Tensor]


OWN = ("epoch", "loss", "valid_loss", "time")  # what a row has besides metrics and train_...


def total(column: list[Tensor]) -> float:
    "The sum of scalars, in float64."
    return float(torch.stack(column).double().sum()) if column else 0.0


class TrackResults(Callback):
    """Sum the loss and `metrics` (functions that give a batch's sum) and, each epoch, write a row of their means.

    Rows go to the learner's `write_row`, where a callback such as Progress has put one, else to `print`; they are kept
    in `history`. UserError for metrics without names, or of a name that a row has already.
    """

    def __init__(self, metrics: Mapping[str, Metric] | None = None) -> None:
        if metrics is not None and not isinstance(metrics, Mapping):
            raise UserError(f"metrics {metrics!r} have no names: give them as {{'accuracy': accuracy}}")
        self.metrics = {"accuracy": accuracy} if metrics is None else dict(metrics)
        if taken := [name for name in self.metrics if name in OWN or name.startswith("train_")]:
            raise UserError(
                f"a metric can't be called {taken[0]!r}, as something else in a row is: choose another name"
            )
        self.history: list[dict[str, float]] = []
        self.row: dict[str, float] = {}

    def before_fit(self) -> None:
        "Start a table."
        self.history, self.row = [], {}
        self._write(["epoch", "train_loss", "valid_loss", *self.metrics, "time"])

    def before_epoch(self) -> None:
        "Forget the batches before, and start a row and the clock at the first part of an epoch that takes place."
        self.reset()
        if self.model.training or not self.row:
            self.started, self.row = time.perf_counter(), {"epoch": float(self.epoch)}

    def reset(self) -> None:
        "Forget the batches so far."
        self.losses: list[Tensor] = []
        self.ns: list[int] = []
        self.sums: dict[str, list[Tensor]] = {name: [] for name in self.metrics}

    def after_batch(self) -> None:
        "Keep the sum of the batch's losses, its size, and its metrics' sums: on the device, nobody waits for them."
        self.losses.append(self.learner.loss_total())
        self.ns.append(len(self.batch[1]))
        for name, metric in self.metrics.items():
            self.sums[name].append(torch.as_tensor(metric(self.preds.detach(), self.batch[1])))

    def totals(self) -> Sums:
        "The sums and counts since `reset`, as numbers."
        columns = {"loss": self.losses, **self.sums}
        return {key: (total(column), float(sum(self.ns))) for key, column in columns.items()}

    def after_epoch(self) -> None:
        "Average; write the row when the validation, or a training without one, is complete."
        part = "train" if self.model.training else "valid"
        results = means(self.totals())
        self.row[f"{part}_loss"] = results.pop("loss", float("nan"))
        self.row |= {f"train_{key}" if self.model.training else key: value for key, value in results.items()}
        if not self.model.training or self.dls.valid is None:
            self.row["time"] = time.perf_counter() - self.started
            self.history.append(self.row)
            shown = ("train_loss", "valid_loss", *self.metrics, "time")
            self._write([f"{self.epoch}", *(f"{self.row.get(key, float('nan')):.6f}" for key in shown)])
            self.row = {}

    def _write(self, cells: Sequence[str]) -> None:
        write_row = getattr(self.learner, "write_row", None)
        if write_row is not None:
            write_row(cells)
        else:
            print("".join(f"{cell:<12}" for cell in cells))
