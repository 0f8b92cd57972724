"Which images there are, which train and which validate, and what their labels are."

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from learner.errors import UsageError

EXTENSIONS = frozenset((".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))
TRAIN_NAMES = ("train", "training")
VALID_NAMES = ("valid", "val", "validation", "test", "testing")


def image_files(root: str | Path) -> list[str]:
    """All image files below `root`, sorted, so that every machine has the same order; hidden ones are left out.

    os.scandir knows from the directory what is a file, and asks the disk for nothing else. Links to folders are not
    followed. Raises UsageError where a folder can't be read.
    """
    found: list[str] = []
    folders = [os.fspath(root)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                        found.append(entry.path)
        except OSError as error:
            raise UsageError(f"{error.filename} can't be listed: {error.strerror}; pass a folder of images") from error
    return sorted(found)


def parent_label(file: str) -> str:
    "The name of the folder that the file lies in."
    return PurePath(file).parent.name


@dataclass(frozen=True)
class Vocab:
    "Class names in order; a class's number is its place."

    classes: tuple[str, ...]

    @classmethod
    def of(cls, labels: Iterable[str]) -> Vocab:
        "The sorted set of the training labels."
        return cls(tuple(sorted(set(labels))))

    def __len__(self) -> int:
        return len(self.classes)

    def encode(self, files: Sequence[str], labels: Sequence[str]) -> list[int]:
        "Class numbers of `labels`; UsageError names the first file whose label was never trained on."
        numbers = {name: i for i, name in enumerate(self.classes)}
        for file, label in zip(files, labels, strict=True):
            if label not in numbers:
                close = difflib.get_close_matches(label, self.classes, 1)
                hint = f" (nearest: {close[0]!r})" if close else ""
                raise UsageError(
                    f"{file} is labelled {label!r}, which no training image is{hint}; the classes are "
                    f"{', '.join(self.classes[:20])}; rename its folder or add training images of that class"
                )
        return [numbers[label] for label in labels]


@dataclass(frozen=True)
class Labelled:
    "Image files and their class numbers, in the same order."

    files: tuple[str, ...]
    targets: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.files)


@dataclass(frozen=True)
class Split:
    "A dataset: its training part, its validation part, and the classes of both."

    train: Labelled
    valid: Labelled
    vocab: Vocab


def _part(names: tuple[str, ...], folders: list[str]) -> str | None:
    return next((folder for name in names for folder in folders if folder.lower() == name), None)


def grandparent_split(root: str | Path) -> tuple[list[str], list[str]] | None:
    """Files below `root`/train and `root`/valid, or folders named alike; None where it has neither.

    Raises UsageError where it has only one of them.
    """
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    train, valid = _part(TRAIN_NAMES, folders), _part(VALID_NAMES, folders)
    if train is None and valid is None:
        return None
    if train is None or valid is None:
        lacking, names = ("training", TRAIN_NAMES) if train is None else ("validation", VALID_NAMES)
        there = valid if train is None else train
        raise UsageError(
            f"{root} has {there}/ but no {lacking} part ({', '.join(f'{name}/' for name in names)}); "
            f"add one, or pass {Path(root, str(there))} to split that folder at random"
        )
    return image_files(Path(root, train)), image_files(Path(root, valid))


def random_split(files: Sequence[str], valid_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    "A random `valid_fraction` of the files validates (at least one), the others train; both keep their order."
    order = np.random.default_rng(seed).permutation(len(files))
    held_out = set(order[: max(1, round(len(files) * valid_fraction))].tolist())
    train = [file for i, file in enumerate(files) if i not in held_out]
    return train, [files[i] for i in sorted(held_out)]


def open_split(root: str | Path, seed: int, valid_fraction: float = 0.2) -> Split:
    """The dataset below a folder: split by grandparent folder, or at random by `seed` where there is only one.

    Labels are parent folders, and the classes are those of the training part. Raises UsageError for a folder that
    does not exist, has no images, lacks a part or a second class, or validates a class that was never trained.
    """
    if not Path(root).is_dir():
        raise UsageError(f"{root} is no folder; pass one that holds train/CLASS/*.jpg and valid/CLASS/*.jpg")
    parts = grandparent_split(root)
    if parts is None:
        parts = random_split(_some(image_files(root), root), valid_fraction, seed)
    train, valid = (
        _some(files, f"the {name} part of {root}") for files, name in zip(parts, ("training", "validation"))
    )
    vocab = Vocab.of(map(parent_label, train))
    if len(vocab) < 2:
        raise UsageError(
            f"{root} has only one class, {vocab.classes[0]!r}: a classifier needs two or more; "
            "images are labelled by the folder that they lie in"
        )
    return Split(_labelled(train, vocab), _labelled(valid, vocab), vocab)


def _some(files: list[str], place: object) -> list[str]:
    if not files:
        raise UsageError(f"{place} has no images ({', '.join(sorted(EXTENSIONS))}); is it the right folder?")
    return files


def _labelled(files: list[str], vocab: Vocab) -> Labelled:
    return Labelled(tuple(files), tuple(vocab.encode(files, [parent_label(file) for file in files])))
