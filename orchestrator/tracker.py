"Tracker: what people see of a run: TensorBoard (sole importer), history.csv, the table and the bar."

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from cluster.worker import Report
from learner.callbacks.activations import BINS, LIMIT, layer_stats
from learner.metrics import accuracy
from orchestrator.phases import Phases
from orchestrator.run_folder import RunFolder
from orchestrator.tally import Tally, layer_sums
from orchestrator.terminal import Terminal

METRIC = accuracy.__name__
AMPLE = 0.2  # seconds of a chunk: the next one, which is under way by then, lasts about as long
QUEUE = 1000  # events, a chunk's steps: with TensorBoard's own 10 the driver waits for its thread at each further one
COLUMNS = ("epoch", "train_loss", "valid_loss", METRIC, "images/s", "time")


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
        self.batches = self.faults = 0
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
            for number, (loss, hypers) in enumerate(zip(reports[0].losses, chunk.hypers)):
                self.board.add_scalars(
                    chunk.step + number,
                    {"train/loss": loss, "train/momentum": 0.0} | {f"train/{k}": v for k, v in hypers.items()},
                )
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
        self._catch_up()
        learned, measured = train.means(), valid.means()
        row = {
            "epoch": epoch,
            "train_loss": learned["loss"],
            "valid_loss": measured["loss"],
            METRIC: measured[METRIC],
            "lr": lr,
            "images_per_second": train.images_per_second(),
            "seconds": train.elapsed + valid.elapsed,
        }
        self.record(f"{self.folder.path}", self._restore)
        self.record("history.csv", self.folder.add_history, row)
        scalars = {f"epoch/{key}": row[key] for key in ("train_loss", "valid_loss", METRIC)}
        scalars[f"epoch/train_{METRIC}"] = learned[METRIC]
        self.board.add_scalars(step, {**scalars, **speed(train)})
        minutes, seconds = divmod(round(row["seconds"]), 60)
        losses = (f"{row[key]:.6f}" for key in ("train_loss", "valid_loss", METRIC))
        self.terminal.row([f"{epoch}", *losses, f"{row['images_per_second']:.0f}", f"{minutes:02d}:{seconds:02d}"])
        for rank, times in train.slow().items():
            self.terminal.write(f"rank {rank} is slow: it works {times:.0f} times as long as the others at an image")
        self.board.flush()
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
            self.board.add(
                "histogram_raw",
                f"activations/{name}",
                -LIMIT,
                LIMIT,
                count,
                total,
                squares,
                edges,
                sums[4:].tolist(),
                step,
            )
            stats = layer_stats(torch.from_numpy(sums)[None])
            for key in ("mean", "std", "near_zero"):
                self.board.add("scalar", f"activations_{key}/{name}", getattr(stats, key).item(), step)

    def picture(self, tag: str, picture: Image, step: int = 0) -> None:
        "Put a picture into TensorBoard. Raises OSError: a disk that is full by the first step is not for a run."
        self.board.writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")
        self.board.writer.flush()

    def text(self, tag: str, text: str) -> None:
        "Put Markdown into TensorBoard."
        self.board.add("text", tag, text)

    def fault(self, text: str) -> None:
        "Note a fault that was made up for."
        self.faults += 1
        self.terminal.write(f"fault {self.faults}: {text}")
        self.record("faults.log", self.folder.add_fault, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")
        self.board.add("text", "faults", text, self.faults)
        self.board.flush()

    def close(self) -> None:
        "Wipe the bar, and write out what is buffered."
        self.terminal.clear()
        self.board.close()


class Board:
    """TensorBoard's files in a folder; `first_step` has it forget what earlier files have from there on.

    Where the disk refuses one, `warn` is told, and the next `flush` begins another: what came in between is lost.
    """

    def __init__(self, folder: Path, warn: Callable[[str], object], first_step: int | None = None) -> None:
        self.folder, self.warn, self.lost = folder, warn, False
        self._open(first_step)

    def _open(self, first_step: int | None = None) -> None:
        await_new_second(self.folder)
        self.writer = SummaryWriter(str(self.folder), purge_step=first_step, max_queue=QUEUE)
        self.lost = False

    def add(self, kind: str, *args: Any, **kwargs: Any) -> None:
        "What SummaryWriter calls add_`kind`."
        if not self.lost:
            with self._warned():
                getattr(self.writer, f"add_{kind}")(*args, **kwargs)

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        "As one event: SummaryWriter's own would be one for each, and take twice the time, every step."
        if not self.lost:
            with self._warned():
                event = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
                self.writer._get_file_writer().add_summary(event, step)

    def flush(self) -> None:
        "Have all on the disk."
        with self._warned():
            if self.lost:
                with suppress(OSError):
                    self.writer.close()
                self._open()
            self.writer.flush()

    def close(self) -> None:
        "The end of it."
        self.flush()
        if not self.lost:
            with self._warned():
                self.writer.close()

    @contextmanager
    def _warned(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost = True
            self.warn(f"warning: {self.folder} could not be written: {error.strerror or error}; its curves have a gap")


def await_new_second(folder: Path) -> None:
    "Let a second begin that no event file is named after: TensorBoard reads a run's files in the order of their names."
    while any(folder.glob(f"*.tfevents.{int(time.time())}.*")):
        time.sleep(0.02)


def speed(tally: Tally) -> dict[str, float]:
    "The scalars about speed: images/s in all and of each rank, and the fractions of time spent waiting."
    scalars = {f"speed/images_per_second_rank_{rank}": each for rank, each in tally.worker_speed().items()}
    scalars["speed/images_per_second"] = tally.images_per_second()
    return scalars | {f"speed/waiting_for_{part}": tally.waiting(part) for part in ("data", "communication")}


def add_pictures(run: Path, pictures: Mapping[str, Image]) -> None:
    "Put pictures, by their tags, into the TensorBoard of a run that is finished."
    with SummaryWriter(str(run / "tensorboard")) as board:
        for tag, picture in pictures.items():
            board.add_image(tag, np.asarray(picture), dataformats="HWC")
