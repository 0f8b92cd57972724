"Board: the files that TensorBoard reads (sole importer)."

from __future__ import annotations

import errno
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary


class Board:
    """TensorBoard's files in a folder; `first_step` has it forget what earlier files have from there on.

    One is kept open, and what is added is there to be read at once: SummaryWriter takes ten times as long for a step,
    most of it to open its file anew. Where the disk refuses it, `warn` is told, and nothing is written until `renew`.
    """

    def __init__(self, folder: Path, warn: Callable[[str], object], first_step: int | None = None) -> None:
        self.folder, self.warn = folder, warn
        self._open(first_step)

    def _open(self, first_step: int | None = None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{new_second(self.folder):010d}.{socket.gethostname()}.{os.getpid()}"
        self.file = open(self.folder / name, "xb")  # noqa: SIM115
        self._write([event(file_version="brain.Event:2")])
        if first_step is not None:
            self._write([event(first_step, session_log=SessionLog(status=SessionLog.START))])
        self.lost = False

    def add(self, kind: str, step: int, *args: Any) -> None:
        "What torch.utils.tensorboard.summary calls `kind`."
        self._add([event(step, summary=getattr(summary, kind)(*args))])

    def add_steps(self, first: int, rows: Iterable[Mapping[str, float]]) -> None:
        "A row of scalars for each step from `first` on, as one event each."
        self._add(scalar_events(first, rows))

    def picture(self, tag: str, picture: Image, step: int = 0) -> None:
        "Raises OSError where the disk refuses it."
        self._write([event(step, summary=summary.image(tag, np.asarray(picture), dataformats="HWC"))])

    def renew(self) -> None:
        "If the file is lost, begin another."
        if self.lost:
            with self._warned():
                with suppress(OSError):
                    self.file.close()
                self._open()

    def close(self) -> None:
        "The end of it."
        with suppress(OSError) if self.lost else self._warned():
            self.file.close()

    def _add(self, events: Iterable[bytes]) -> None:
        if not self.lost:
            with self._warned():
                self._write(events)

    def _write(self, events: Iterable[bytes]) -> None:
        records = RecordWriter(self.file)
        try:
            for one in events:
                records.write(one)
            records.flush()
        except OSError as error:
            error.filename = self.file.name  # a full disk says no name of its own
            raise
        if not os.path.samestat(os.stat(self.file.name), os.fstat(self.file.fileno())):
            raise FileNotFoundError(errno.ENOENT, "another file has its name")  # ours takes all, but nobody will see it

    @contextmanager
    def _warned(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost = True
            self.warn(f"warning: {self.folder} could not be written: {error.strerror or error}; its curves have a gap")


def event(step: int = 0, **what: Any) -> bytes:
    "What happened at a step, now."
    return Event(wall_time=time.time(), step=step, **what).SerializeToString()


def scalar_events(first: int, rows: Iterable[Mapping[str, float]]) -> Iterator[bytes]:
    "An event for each row of scalars, at steps from `first` on; made of one message, which is most of the work."
    for tags, alike in groupby(enumerate(rows, first), lambda numbered: tuple(numbered[1])):
        message = Event(wall_time=time.time(), summary=Summary(value=[Summary.Value(tag=tag) for tag in tags]))
        values = list(message.summary.value)
        for message.step, row in alike:
            for value, number in zip(values, row.values()):
                value.simple_value = number
            yield message.SerializeToString()


def new_second(folder: Path) -> int:
    """What to name an event file after: now, or a second behind all that are there, whatever the clock says by now.

    TensorBoard reads a run's files in the order of their names.
    """
    there = (re.search(r"\.tfevents\.(\d{10})\.", path.name) for path in folder.glob("*.tfevents.*"))
    return max([int(time.time()), *(int(found[1]) + 1 for found in there if found)])


def add_pictures(run: Path, pictures: Mapping[str, Image]) -> None:
    """Put pictures, by their tags, beside the TensorBoard of a run, which may still be training.

    Beside, since TensorBoard never goes back to a file of a folder once there is a later one.
    """
    board = Board(run / "tensorboard" / "pictures", print)
    for tag, picture in pictures.items():
        board.picture(tag, picture)
    board.close()
