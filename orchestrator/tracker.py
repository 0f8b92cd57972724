"Tracker: what people see of a run: TensorBoard, history.csv, the table and the bar."

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from cluster.messages import Report
from cluster.rank_learner import METRICS
from learner.callbacks.activations import BINS, LIMIT, layer_stats
from orchestrator.board import Board
from orchestrator.phases import Phases
from orchestrator.run_folder import RunFolder
from orchestrator.tally import Tally, layer_sums
from orchestrator.terminal import Terminal

AMPLE = 0.2  # seconds of a chunk: the next one, which is under way by then, lasts about as long
COLUMNS = ("epoch", "train_loss", "valid_loss", *METRICS, "images/s", "time")


class Tracker:
    """Takes the ranks' reports as they come; writes steps as they are done and a row for each epoch.

    All scalars are drawn over steps, an epoch's at its last one, so that a run that resumes at `first_step` can have
    TensorBoard forget whatever was written from there on.
    """

    def __init__(self, folder: RunFolder, terminal: Terminal, first_step: int | None = None) -> None:
        self.folder, self.terminal = folder, terminal
        self.board = Board(folder.path / "tensorboard", terminal.write, first_step)
        self.bad_images = folder.bad_images()  # of a run that is resumed
        self.notes: set[str] = set()
        self.batches = self.faults = self.logged = 0
        self.phases: Phases | None = None  # until the first step is done
        self.at_leisure: list[Callable[[], object]] = []  # what is still to be done, while the workers go on

    def start(self, total_batches: int, done: int = 0) -> None:
        "Begin the table, and a bar of all training and validation batches, of which some may be done."
        self.batches = done
        self.terminal.row(COLUMNS)
        self.terminal.open_bar(total_batches)
        self.terminal.advance(done)

    def chunk(self, reports: Sequence[Report]) -> None:
        "Note one chunk of all ranks: per step its loss and hyperparameters, and the images that were left out."
        chunk = reports[0].chunk
        if chunk.train:
            rows = zip(reports[0].losses, chunk.hypers)
            self.board.add_steps(chunk.step, (step_scalars(loss, hypers) for loss, hypers in rows))
            if self.phases is None and reports[0].seconds["total"] >= AMPLE:
                self._catch_up()
            self._note_start()
        for step, layers in layer_sums(reports).items():
            self._activations(step, layers)
        self.batches += len(chunk.hypers)
        self.terminal.advance(self.batches)
        self._note_bad([bad for report in reports for bad in report.bad_images])
        for note in (note for report in reports for note in report.notes if note not in self.notes):
            self.notes.add(note)
            self.terminal.write(f"note: {note}")

    def _catch_up(self) -> None:
        if self.at_leisure:
            self.board.renew()
        while self.at_leisure:
            self.at_leisure.pop(0)()

    def _note_start(self) -> None:
        if self.phases is not None:
            self.phases.done("first step")
            self.record("startup.json", self.folder.write_json, "startup.json", self.phases.seconds)
            self.text("startup", str(self.phases))
            self.phases = None

    def _note_bad(self, bad: list[tuple[str, str]]) -> None:
        new = {file: reason for file, reason in bad if file not in self.bad_images}
        for file, reason in new.items():
            self.terminal.write(f"skipped {file}: {reason}")
        if new:
            self.bad_images |= new
            self.record("bad_images.csv", self.folder.add_bad_images, sorted(self.bad_images.items()))

    def epoch(self, epoch: int, step: int, lr: float, train: Tally, valid: Tally) -> dict[str, Any]:
        "Write the epoch's row everywhere, and return it."
        learned, measured = train.means(), valid.means()
        row = {
            "epoch": epoch,
            "train_loss": learned["loss"],
            "valid_loss": measured["loss"],
            **{name: measured[name] for name in METRICS},
            "lr": lr,
            "images_per_second": train.images_per_second(),
            "seconds": train.elapsed + valid.elapsed,
        }
        self.record(f"{self.folder.path}", self._restore)
        self._catch_up()
        self.record("history.csv", self.folder.add_history, row)
        scalars = {f"epoch/{key}": row[key] for key in ("train_loss", "valid_loss", *METRICS)}
        scalars |= {f"epoch/train_{name}": learned[name] for name in METRICS}
        self.board.add_steps(step, [{**scalars, **speed(train)}])
        minutes, seconds = divmod(round(row["seconds"]), 60)
        losses = (f"{row[key]:.6f}" for key in ("train_loss", "valid_loss", *METRICS))
        self.terminal.row([f"{epoch}", *losses, f"{row['images_per_second']:.0f}", f"{minutes:02d}:{seconds:02d}"])
        if (compiling := train.longest("compiling")) >= 1:
            self.terminal.write(f"note: epoch {epoch} includes {compiling:.1f} s of compiling")
        for rank, times in train.slow().items():
            self.terminal.write(f"rank {rank} is slow: it works {times:.0f} times as long as the others at an image")
        self.board.renew()
        return row

    def record(self, what: str, write: Callable[..., object], *args: Any) -> bool:
        "Write something; where the disk refuses, say so, and go on: a run is worth more than what is told of it."
        try:
            write(*args)
            return True
        except OSError as error:
            self.terminal.write(f"warning: {what} could not be written: {error.strerror or error}; training goes on")
            return False

    def _restore(self) -> None:
        if self.folder.restore():
            self.board.lost = True
            self.fault(f"{self.folder.path} was gone: it is made again, its logs and curves begin anew")

    def _activations(self, step: int, layers: Mapping[str, np.ndarray]) -> None:
        "What each layer gave for a global batch: a histogram, and how its mean, spread and zeros move."
        edges = np.linspace(-LIMIT, LIMIT, BINS + 1)[1:].tolist()
        for name, sums in layers.items():
            count, total, squares = sums[:3]
            counts = sums[4:].tolist()
            name_and_numbers = (f"activations/{name}", -LIMIT, LIMIT, count, total, squares, edges, counts)
            self.board.add("histogram_raw", step, *name_and_numbers)
            stats = layer_stats(torch.from_numpy(sums)[None])
            for key in ("mean", "std", "near_zero"):
                self.board.add("scalar", step, f"activations_{key}/{name}", getattr(stats, key).item())

    def picture(self, tag: str, picture: Image, step: int = 0) -> None:
        "Put a picture into TensorBoard. Raises OSError: a disk that is full by the first step is not for a run."
        self.board.picture(tag, picture, step)

    def text(self, tag: str, text: str) -> None:
        "Put Markdown into TensorBoard."
        self.board.add("text", 0, tag, text)

    def fault(self, text: str) -> None:
        "Note a fault that was made up for."
        self.faults += 1
        self.terminal.write(f"fault {self.faults}: {text}")
        self.log_fault(text)

    def log_fault(self, text: str) -> None:
        "Note what the terminal is told by others: in logs/faults.log, and in TensorBoard."
        self.logged += 1
        self.record("faults.log", self.folder.add_fault, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")
        self.board.renew()
        self.board.add("text", self.logged, "faults", text)

    def close(self) -> None:
        "Wipe the bar, and write out what is buffered."
        self.terminal.clear()
        self.board.close()


def step_scalars(loss: float, hypers: Mapping[str, float]) -> dict[str, float]:
    "The scalars of a step."
    return {"train/loss": loss, "train/momentum": 0.0} | {f"train/{name}": value for name, value in hypers.items()}


def speed(tally: Tally) -> dict[str, float]:
    "The scalars about speed: images/s in all and of each rank, and the fractions of time spent waiting."
    scalars = {f"speed/images_per_second_rank_{rank}": each for rank, each in tally.worker_speed().items()}
    scalars["speed/images_per_second"] = tally.images_per_second()
    return scalars | {f"speed/waiting_for_{part}": tally.waiting(part) for part in ("data", "communication")}
