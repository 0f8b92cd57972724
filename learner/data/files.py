"Which images there are, which train and which validate, and what their labels are."

from __future__ import annotations

import difflib
import hashlib
import operator
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from learner.data.labels import Labeller, label_all, parent_label
from learner.data.splitters import PART_NAMES, Parts, Splitter, automatic, grandparent
from learner.errors import CONTROL, UsageError

EXTENSIONS = frozenset((".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))


def image_files(root: str | Path) -> list[str]:
    """All image files below `root`, sorted, so that every machine has the same order; hidden ones are left out.

    os.scandir knows from the directory what is a file, and asks the disk for nothing else. Links to folders are
    followed, but for those to what is found without them: no image has two names. Raises UsageError where a folder
    can't be read.
    """
    found: list[str] = []
    folders, known = [os.fspath(root)], [os.path.join(os.path.realpath(root), "")]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    linked = entry.is_symlink() and os.path.isdir(entry.path)
                    if entry.name.startswith(".") or (linked and not _leads_on(entry.path, known)):
                        continue
                    if linked or entry.is_dir(follow_symlinks=False):
                        folders.append(printable_path(entry.path))
                    elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                        found.append(printable_path(entry.path))
        except OSError as error:
            raise UsageError(f"{error.filename} can't be listed: {error.strerror}; pass a folder of images") from error
    return sorted(found)


def _leads_on(link: str, known: list[str]) -> bool:
    "Whether a link leads to a folder that is in none of the `known` ones and has none in it; then it is one of them."
    there = os.path.join(os.path.realpath(link), "")
    if any(there.startswith(one) or one.startswith(there) for one in known):
        return False
    known.append(there)
    return True


def printable_path(path: str) -> str:
    "The path; UsageError if it could drive a terminal, on which such names are shown, or end a line of a list."
    if not path.isprintable() and re.search(CONTROL, path):  # the first is quick, and wary of bytes that are no UTF-8
        raise UsageError(f"{path!r} has control characters in its name; rename it")
    return path


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
                advice = "correct its label, or let images of that class train"
                if label.lower() in PART_NAMES:
                    advice = "if these have no labels, leave them out: name the folder of those that train (--data)"
                raise UsageError(
                    f"{file} validates, and is labelled {label!r} as no training image is{hint}; the classes are "
                    f"{', '.join(self.classes[:20])}; {advice}"
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

    def digest(self, root: str | Path) -> str:
        "A hash of which images train and which validate, by their names below the folder `root`, and as what."
        above, digest = os.path.join(root, ""), hashlib.sha256()
        for part in (self.train, self.valid):
            told = (f"{file.removeprefix(above)}\0{target}" for file, target in zip(part.files, part.targets))
            digest.update("\0".join((f"{len(part)}", *told)).encode(errors="surrogateescape"))
        return digest.hexdigest()


def split_files(
    source: str | Path,
    get_items: Callable[[Any], Iterable[str | Path]] = image_files,
    get_y: Labeller = parent_label,
    splitter: Splitter = grandparent,
) -> Split:
    """The dataset that these steps make of `source`, a folder: its files, in order, split and labelled.

    `splitter` and `get_y` see names: the paths below the folder, with forward slashes. Classes are those of the
    training part. UsageError, which names the folder, where a step fails or something can't be trained on.
    """
    files, names = list_files(source, get_items)
    try:
        parts = check_parts(splitter(names, get_y), names)
        chosen = [*parts[0], *parts[1]]
        labels = label_all([names[i] for i in chosen], get_y)
        vocab = Vocab.of(labels[: len(parts[0])])
        if len(vocab) < 2:
            raise UsageError(
                f"only one class, {vocab.classes[0]!r}, and a classifier needs two or more; label the images by the "
                "folders that they lie in, by name (--label-regex) or by table (--labels-csv)"
            )
        targets = dict(zip(chosen, vocab.encode([names[i] for i in chosen], labels)))
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error
    train, valid = (Labelled(tuple(files[i] for i in part), tuple(targets[i] for i in part)) for part in parts)
    return Split(train, valid, vocab)


def list_files(
    source: str | Path, get_items: Callable[[Any], Iterable[str | Path]] = image_files
) -> tuple[list[str], list[str]]:
    "What `get_items` finds in the folder `source`, sorted: the files, and their names (paths below it)."
    if not Path(source).is_dir():
        raise UsageError(f"{source} is no folder; pass one that holds train/CLASS/*.jpg and valid/CLASS/*.jpg")
    root = Path(source)
    files = sorted(map(str, get_items(root)))
    if len(set(files)) < len(files):
        twice = next(file for file, after in pairwise(files) if file == after)
        raise UsageError(
            f"get_items names {len(files) - len(set(files))} files twice, the first {twice}; once is the most"
        )
    if not files:
        raise UsageError(f"{source} has no images ({', '.join(sorted(EXTENSIONS))}); is it the right folder?")
    above = os.path.join(root, "")
    return files, [file.removeprefix(above).replace(os.sep, "/") for file in files]


def check_parts(parts: Parts, names: Sequence[str]) -> Parts:
    "The parts, if both have images and none is named twice; else UsageError. Numbers may be tensors' or arrays'."
    try:
        parts = [_number(i) for i in parts[0]], [_number(i) for i in parts[1]]
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise UsageError(f"the splitter must give two lists of images' numbers, train and validate: {error}") from error
    for part, what in zip(parts, ("train", "validate")):
        if not len(part):
            raise UsageError(f"none of {len(names)} images is left to {what}; split them otherwise")
    if strays := [i for i in chain(*parts) if not 0 <= i < len(names)]:
        raise UsageError(f"the splitter names image {strays[0]}; they are numbered from 0 to {len(names) - 1}")
    if twice := [i for i, n in Counter(chain(*parts)).items() if n > 1]:
        raise UsageError(f"the splitter names {len(twice)} images twice, the first {names[twice[0]]}; once is the most")
    return parts


def _number(i: Any) -> int:
    if isinstance(i, bool) or "bool" in str(getattr(i, "dtype", "")):
        raise TypeError("True and False are none")
    return operator.index(i)


def open_split(root: str | Path, seed: int, valid_fraction: float = 0.2) -> Split:
    """The dataset below a folder: split by grandparent folder, or at random by `seed` where there is only one.

    Labels are parent folders, and the classes are those of the training part. Raises UsageError for a folder that
    does not exist, has no images, lacks a part or a second class, or validates a class that was never trained.
    """
    return split_files(root, splitter=automatic(seed, valid_fraction))
