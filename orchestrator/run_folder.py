"The run directory: runs/NAME/version_N, and the files in it that people and other programs read."

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from learner.errors import UsageError

HISTORY = ("epoch", "train_loss", "valid_loss", "accuracy", "lr", "images_per_second", "seconds")


class RunFolder:
    "A new directory `runs`/`name`/version_N, with N one above the largest that is there; UsageError if it can't be."

    def __init__(self, runs: str, name: str) -> None:
        parent = Path(runs).expanduser() / name
        try:
            self.path = _new_version(parent)
            (self.path / "logs").mkdir()
            with open(self.path / "history.csv", "w") as file:
                csv.writer(file).writerow(HISTORY)
        except OSError as error:
            raise UsageError(
                f"the run directory {parent} can't be written: {error.strerror}; name another with --runs DIR"
            ) from error

    @property
    def logs(self) -> Path:
        "Where each rank's log file is."
        return self.path / "logs"

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        "Write a JSON file that people can read."
        write_aside(self.path / name, json.dumps(content, indent=2).encode() + b"\n")

    def add_history(self, row: Mapping[str, float | int]) -> None:
        "Append an epoch to history.csv, floats with all their digits."
        with open(self.path / "history.csv", "a") as file:
            csv.writer(file).writerow([repr(row[key]) for key in HISTORY])

    def add_bad_images(self, bad: list[tuple[str, str]]) -> None:
        "List the images that were skipped, and why, in bad_images.csv."
        with open(self.path / "bad_images.csv", "w") as file:
            csv.writer(file).writerows([("file", "reason"), *bad])

    def write_model(self, tensors: dict[str, np.ndarray], about: Mapping[str, Any]) -> None:
        "Write model.safetensors, and in model.json all else that prediction needs."
        from safetensors.numpy import save

        write_aside(self.path / "model.safetensors", save(tensors))
        self.write_json("model.json", about)


def _new_version(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        taken = [name.removeprefix("version_") for name in os.listdir(parent) if name.startswith("version_")]
        path = parent / f"version_{max([int(number) for number in taken if number.isdigit()], default=-1) + 1}"
        try:
            path.mkdir()
            return path
        except FileExistsError:
            continue  # another run took that number just now


def write_aside(path: Path, content: bytes) -> None:
    "Replace a file as a whole: under another name first, so that nobody ever reads half of it."
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
