"""Checkpoints: a run's tensors and a JSON of where it stood, on disk, whole or not at all.

A checkpoint is a folder `step_N` with `state.safetensors` and `meta.json`. It is written under another name, forced to
the disk, and renamed; the JSON has a SHA-256 over the tensors and itself. So a checkpoint that bears its name is
complete, and one that the disk damaged later is seen and passed over. Nothing is unpickled.
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
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from learner.errors import UserError
from learner.reading import parse_object, read_bytes

STATE, META = "state.safetensors", "meta.json"
META_LIMIT = 2**26  # bytes


@dataclass(frozen=True)
class Checkpoint:
    "Tensors by name, what the driver wrote beside them, and the folder that they came from."

    step: int
    tensors: dict[str, np.ndarray]
    meta: dict[str, Any]
    folder: Path


class Checkpoints:
    "The checkpoints in one folder, of which the newest `keep` are kept."

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step`, in place of one that was there, then remove those that are too many.

        Raises OSError where the disk refuses; what was there before is still there then.
        """
        final, aside = self._path(step), self.folder / f".step_{step}.{os.getpid()}"
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
            if final.exists():
                shutil.rmtree(final)
            os.rename(aside, final)
            _sync(self.folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        self._prune()
        return final

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        "The newest checkpoint that is sound, or None; and a sentence about each newer one that is not."
        broken: list[str] = []
        for step in reversed(self.steps()):
            try:
                return self.load(step), broken
            except UserError as error:
                broken.append(str(error))
        return None, broken

    def load(self, step: int) -> Checkpoint:
        "Read and verify one; UserError says what is wrong with it."
        folder = self._path(step)
        try:
            meta = parse_object(read_bytes(folder / META, META_LIMIT))
            content = read_bytes(folder / STATE, memory_size() // 2)
            if meta.get("step") != step:
                raise ValueError(f"{META} does not describe step {step}")
            if meta.pop("sha256", None) != _digest(content, meta):
                raise ValueError(f"{STATE} or {META} is not what was written")
            return Checkpoint(step, load(content), meta, folder)
        except (OSError, ValueError, SafetensorError, KeyError) as error:  # KeyError: a dtype that numpy lacks
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"checkpoint {folder} can't be used: {reason}") from error

    def steps(self) -> list[int]:
        "The steps of which there are checkpoints, sound or not, in order."
        if not self.folder.is_dir():
            return []
        found = (re.fullmatch(r"step_(0|[1-9][0-9]{0,17})", name) for name in os.listdir(self.folder))
        return sorted(int(match[1]) for match in found if match)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def _prune(self) -> None:
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self._path(step), ignore_errors=True)


def memory_size() -> int:
    "Bytes of this machine's memory: a checkpoint is read as a whole."
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _digest(content: bytes, meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(content + json.dumps(meta, sort_keys=True).encode()).hexdigest()


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
