"The run directory: runs/NAME/version_N, and the files in it that people and other programs read."

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cluster.rank_learner import METRICS
from learner.errors import UsageError
from learner.reading import read_bytes

ASIDE = re.compile(r"\..+\.\d+")  # .NAME.PID: where this and cluster/checkpoint.py write what is to be NAME
MODEL, ABOUT, CONFIG = "model.safetensors", "model.json", "config.json"
LR_CURVE = "lr_finder.csv"
BAD_IMAGES = "bad_images.csv"
LIST_LIMIT = 2**28  # bytes
HISTORY = ("epoch", "train_loss", "valid_loss", *METRICS, "lr", "images_per_second", "seconds")


class RunFolder:
    "The directory of a run, new or begun before; it knows its own content, should the disk lose it."

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[Mapping[str, float | int]] = []
        self._texts: dict[str, bytes] = {}  # the JSON files
        self._claim: int | None = None  # the folder, opened and locked

    @classmethod
    def create(cls, parent: Path) -> RunFolder:
        "A new `parent`/version_N, with N one above the largest that is there; UsageError if it can't be."
        try:
            folder = cls(_new_version(parent))
            folder.logs.mkdir()
            folder.write_history([])
            return folder
        except OSError as error:
            raise UsageError(
                f"the run directory {parent} can't be written: {error.strerror}; name another with --runs DIR"
            ) from error

    def claim(self) -> None:
        "Have nobody else train here until `release`, or this process ends; UsageError where somebody does."
        with suppress(OSError):  # a folder that is gone, a file system without locks
            self._claim = os.open(self.path, os.O_RDONLY)
            try:
                fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"{self.path} is being trained by another process: wait for its end, or give this run a --name"
                ) from None

    def release(self) -> None:
        "Let others train here."
        with suppress(OSError):  # a disk that can only be read by now
            for aside in self.path.glob(f".model.*.{os.getpid()}"):  # reserved, and not needed
                aside.unlink(missing_ok=True)
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def sweep(self) -> None:
        "Remove what a driver that was killed had not finished writing."
        for path in [path for path in self.path.rglob(".*") if ASIDE.fullmatch(path.name)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def write_history(self, rows: Sequence[Mapping[str, float | int]]) -> None:
        "Begin history.csv anew with these rows."
        self._rows = list(rows)
        lines = [",".join(HISTORY), *(",".join(repr(row[key]) for key in HISTORY) for row in rows)]
        write_aside(self.path / "history.csv", "".join(f"{line}\r\n" for line in lines).encode())

    @property
    def logs(self) -> Path:
        "Where each rank's log file is."
        return self.path / "logs"

    def remove_unless_begun(self) -> None:
        "Remove the directory of a run of which no worker ever started, and so left no log."
        if self.logs.is_dir() and not any(self.logs.iterdir()):
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(OSError):  # it has other versions
                self.path.parent.rmdir()

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        "Write a JSON file that people can read."
        write_aside(self.path / name, _text(content))
        self._texts[name] = _text(content)  # only now: what was never there is not gone

    def restore(self) -> bool:
        "Make the directory and its JSON files again where somebody has removed them; whether that was so."
        gone = [name for name in self._texts if not (self.path / name).exists()]
        if gone:
            self.logs.mkdir(parents=True, exist_ok=True)
        for name in gone:
            write_aside(self.path / name, self._texts[name])
        return bool(gone)

    def add_history(self, row: Mapping[str, float | int]) -> None:
        "Add an epoch to history.csv, floats with all their digits; one that the disk refused comes with the next."
        self.write_history([*self._rows, row])

    def add_fault(self, line: str) -> None:
        "Append a line to logs/faults.log."
        with open(self.logs / "faults.log", "a") as file:
            file.write(f"{line}\n")

    def add_bad_images(self, bad: list[tuple[str, str]]) -> None:
        "List the images that were skipped, and why, in bad_images.csv."
        text = io.StringIO()
        csv.writer(text).writerows([("file", "reason"), *bad])
        write_aside(self.path / BAD_IMAGES, text.getvalue().encode(errors="surrogateescape"))  # names may be any bytes

    def bad_images(self) -> dict[str, str]:
        "What bad_images.csv lists, by file; nothing where it is not there, or is nothing that we have written."
        with suppress(OSError, csv.Error):
            text = read_bytes(self.path / BAD_IMAGES, LIST_LIMIT).decode(errors="surrogateescape")
            return dict(row for row in list(csv.reader(io.StringIO(text, newline="")))[1:] if len(row) == 2)
        return {}

    def has_model(self, tensors: dict[str, np.ndarray] | None) -> bool:
        "Whether this model was written, or any at all where it is not known which it should be."
        from safetensors.numpy import save

        with suppress(OSError):
            written = (self.path / MODEL).read_bytes()
            return tensors is None or written == save(tensors)
        return False

    def reserve_model(self, tensors: dict[str, np.ndarray], about: Mapping[str, Any]) -> None:
        "Take room for such a model now, which `write_model` fills: a disk that is full by then has it all the same."
        from safetensors.numpy import save

        for name, size in ((MODEL, len(save(tensors))), (ABOUT, len(_text(about)))):
            aside = _aside(self.path / name)
            try:
                with open(aside, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError:
                _forget(aside)
                raise

    def write_model(self, tensors: dict[str, np.ndarray], about: Mapping[str, Any]) -> None:
        "Write model.safetensors, and in model.json all else that prediction needs."
        from safetensors.numpy import save

        self.restore()
        write_aside(self.path / MODEL, save(tensors))
        self.write_json(ABOUT, about)


def versions(parent: Path) -> list[int]:
    "The numbers N of the `parent`/version_N that there are, in order."
    names = os.listdir(parent) if parent.is_dir() else []
    numbers = [name.removeprefix("version_") for name in names if name.startswith("version_")]
    return sorted(int(number) for number in numbers if number.isdecimal())


def _new_version(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        path = parent / f"version_{max(versions(parent), default=-1) + 1}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            continue  # another run took that number just now


def write_aside(path: Path, content: bytes) -> None:
    "Replace a file as a whole: under another name first, so that nobody ever reads half of it."
    aside = _aside(path)
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:  # in the room that it has, if any
            file.write(content)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        _forget(aside)
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk says no name of its own
        raise


def _forget(aside: Path) -> None:
    "Remove what is not to be; on a disk that can only be read by now, another error says so."
    with suppress(OSError):
        aside.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _text(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"
