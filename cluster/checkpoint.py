"""Checkpoints: a run's tensors and a JSON of where it stood, on disk, whole or not at all.

A checkpoint is a folder `step_N` with `state.safetensors` and `meta.json`. It is written under another name, forced to
the disk, and renamed; the JSON has a SHA-256 over the tensors and itself. So a checkpoint that bears its name is
complete, and one that the disk damaged later is seen and passed over. A step that is written again is `step_N.1`, then
`step_N.2`, and only then is the older one removed: at no moment is there none. Nothing is unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from learner.errors import UserError
from learner.memory import memory_size
from learner.reading import parse_object, read_bytes

STATE, META = "state.safetensors", "meta.json"
META_LIMIT = 2**26  # bytes
NAME = re.compile(r"step_(0|[1-9][0-9]{0,17})(?:\.([1-9][0-9]{0,8}))?")


class Entry(NamedTuple):
    "A checkpoint by its name: of which step, how many were there of it before, and its folder."

    step: int
    again: int
    folder: Path


@dataclass(frozen=True)
class Checkpoint:
    "Tensors by name, what the driver wrote beside them, and the folder that they came from."

    step: int
    tensors: dict[str, np.ndarray]
    meta: dict[str, Any]
    folder: Path


class Checkpoints:
    "The checkpoints in one folder, of which the newest `keep` are kept, and that of the best step."

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any], best: int = 0) -> Path:
        """Write the checkpoint of `step`, then remove one of that step that was there, and those that are too many.

        That of the step `best` is not among these.

        Raises OSError where the disk refuses; what was there before is still there then.
        """
        again = max((entry.again for entry in self._entries() if entry.step == step), default=-1) + 1
        final = self.folder / (f"step_{step}.{again}" if again else f"step_{step}")
        aside = self.folder / f".step_{step}.{os.getpid()}"
        content = save(dict(tensors))
        about = {**meta, "step": step}
        about["sha256"] = _digest(content, about)
        try:
            aside.mkdir(parents=True)
            if shutil.disk_usage(aside).free < len(content):  # what others write meanwhile shall not lack that room
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(aside))
            _write(aside / STATE, content)
            _write(aside / META, json.dumps(about).encode())
            _sync(aside)
            os.rename(aside, final)
            _sync(self.folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        self._prune(step, best)
        return final

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        "The newest checkpoint that is sound, or None; and a sentence about each newer one that is not."
        broken: list[str] = []
        for entry in reversed(self._entries()):
            try:
                return _read(entry), broken
            except UserError as error:
                broken.append(str(error))
        return None, broken

    def load(self, step: int) -> Checkpoint:
        "Read and verify that of a step which was written last; UserError says what is wrong with it."
        written = [entry for entry in self._entries() if entry.step == step]
        return _read(written[-1] if written else Entry(step, 0, self.folder / f"step_{step}"))

    def steps(self) -> list[int]:
        "The steps of which there are checkpoints, sound or not, in order."
        return sorted({entry.step for entry in self._entries()})

    def _entries(self) -> list[Entry]:
        "What bears the name of a checkpoint, the newest last."
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        found = (NAME.fullmatch(name) for name in names)
        return sorted(Entry(int(name[1]), int(name[2] or 0), self.folder / name[0]) for name in found if name)

    def _prune(self, step: int, best: int) -> None:
        """Of the steps up to the one just written keep the newest `keep` and the best, as they were written last.

        Later ones are passed over as broken, or are gone by the time that the run gets there again: not to be counted.
        """
        newest = {entry.step: entry.folder for entry in self._entries() if entry.step <= step}
        kept = [*list(newest.values())[-self.keep :], newest.get(best) if best else None]
        for entry in self._entries():
            if entry.step <= step and entry.folder not in kept:
                shutil.rmtree(entry.folder, ignore_errors=True)


def _read(entry: Entry) -> Checkpoint:
    "Read and verify a checkpoint; UserError says what is wrong with it."
    folder, step = entry.folder, entry.step
    try:
        meta = parse_object(read_bytes(folder / META, META_LIMIT))
        content = read_bytes(folder / STATE, memory_size() // 2)  # it is read as a whole
        if meta.get("step") != step:
            raise ValueError(f"{META} does not describe step {step}")
        if meta.pop("sha256", None) != _digest(content, meta):
            raise ValueError(f"{STATE} or {META} is not what was written")
        return Checkpoint(step, load(content), meta, folder)
    except (OSError, ValueError, SafetensorError, KeyError) as error:  # KeyError: a dtype that numpy lacks
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"checkpoint {folder} can't be used: {reason}") from error


def spoiled(tensors: Mapping[str, np.ndarray]) -> str | None:
    "The name of the first tensor with a number that is not finite."
    floats = ((name, tensor) for name, tensor in tensors.items() if tensor.dtype.kind == "f")
    return next((name for name, tensor in floats if not np.isfinite(tensor).all()), None)


def _digest(content: bytes, meta: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(content)
    digest.update(json.dumps(meta, sort_keys=True).encode())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    "Force a folder's entries to the disk: a rename is durable only then."
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
