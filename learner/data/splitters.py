"""Splitters: which files train and which validate.

A splitter gets the files' names (paths below the dataset's folder) and the labeller, which it asks only if it needs
labels; it gives the numbers of those that train and of those that validate. It is a pure function of these and of a
seed, so that all machines split alike. A file may be in neither part.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Collection, Sequence
from itertools import compress
from pathlib import Path

import numpy as np

from learner.data.labels import (
    IS_VALID,
    LIST_LIMIT,
    TABLE,
    Labeller,
    Table,
    ask_all,
    label_all,
    read_table,
    refuse_strangers,
    tidy,
)
from learner.errors import UsageError
from learner.reading import expanded, read_bytes

Parts = tuple[Sequence[int], Sequence[int]]
Splitter = Callable[[Sequence[str], Labeller], Parts]

TRAIN_NAMES = ("train", "training")
VALID_NAMES = ("valid", "val", "validation", "test", "testing")
PART_NAMES = frozenset((*TRAIN_NAMES, *VALID_NAMES))

SPLIT = re.compile(
    r"auto|grandparent|(?P<kind>random|stratified)(:(?P<share>0?\.\d*[1-9]\d*))?"
    rf"|(?P<list>.+\.(?i:txt))|{TABLE}"
)
SPLIT_RULE = (
    "auto, grandparent, random or stratified (with a share as in random:0.2), "
    "or a file, FILE.txt with the paths that validate or FILE.csv[:COLUMN]"
)


def grandparent(names: Sequence[str], get_y: Labeller) -> Parts:
    "Files below train/ train, those below valid/ (or a folder named alike) validate; all others are left out."
    tops = _tops(names)
    found = [_first(wanted, set(tops)) for wanted in (TRAIN_NAMES, VALID_NAMES)]
    for folder, part, wanted in zip(found, ("training", "validation"), (TRAIN_NAMES, VALID_NAMES)):
        if folder is None:
            there = next((f"; there is {one}/ alone" for one in found if one), "")
            folders = ", ".join(f"{name}/" for name in wanted)
            raise UsageError(
                f"no folder of a {part} part ({folders}) has images{there}; add some, or split at random (random:0.2)"
            )
    train, valid = ([i for i, top in enumerate(tops) if top == folder] for folder in found)
    return train, valid


def has_parts(names: Sequence[str]) -> bool:
    "Whether there are images in train/ or valid/, or in a folder named alike."
    return any(top.lower() in PART_NAMES for top in set(_tops(names)))


def _tops(names: Sequence[str]) -> list[str]:
    "Each name's first folder; where one folder that is no part holds all, the first below that."
    shared = posixpath.commonprefix((min(names, default=""), max(names, default=""))).split("/")[:-1]
    level = next((depth for depth, folder in enumerate(shared) if folder.lower() in PART_NAMES), len(shared))
    return ["".join(name.split("/", level + 1)[level:-1]) for name in names]


def _first(wanted: Sequence[str], folders: Collection[str]) -> str | None:
    return next((folder for name in wanted for folder in sorted(folders) if folder.lower() == name), None)


def automatic(seed: int, fraction: float = 0.2) -> Splitter:
    """By grandparent folder where there is train/ or valid/ or one named alike, else at random.

    UsageError where such folders lie deeper, beside or below others: at random, what is to validate might train.
    """

    def split(names: Sequence[str], get_y: Labeller) -> Parts:
        if has_parts(names):
            return grandparent(names, get_y)
        if hidden := next((name for name in names if PART_NAMES.intersection(name.lower().split("/")[:-1])), None):
            raise UsageError(
                f"which images validate is not clear: {hidden} lies in a part's folder, but below one that others are "
                "not in; name the folder above such folders (--data), or split otherwise (random:0.2)"
            )
        return at_random(fraction, seed)(names, get_y)

    return split


def at_random(fraction: float, seed: int) -> Splitter:
    "A random `fraction` of all images validates, and at least one; but the first drawn of each class trains."

    def split(names: Sequence[str], get_y: Labeller) -> Parts:
        labels = label_all(names, get_y)
        order = np.random.default_rng(seed).permutation(len(names)).tolist()
        first = {labels[i]: i for i in reversed(order)}
        free = [i for i in order if i != first[labels[i]]]
        if not free:
            raise UsageError(_too_few(labels))
        return _parts(len(names), free[: max(1, round(len(names) * fraction))])

    return split


def stratified(fraction: float, seed: int) -> Splitter:
    "A random `fraction` of each class validates, exact to one image; a class never validates as a whole."

    def split(names: Sequence[str], get_y: Labeller) -> Parts:
        labels = label_all(names, get_y)
        members: dict[str, list[int]] = {label: [] for label in sorted(set(labels))}
        for i in np.random.default_rng(seed).permutation(len(names)).tolist():
            members[labels[i]].append(i)
        counts = quotas([len(each) for each in members.values()], fraction)
        if not any(counts):
            raise UsageError(_too_few(labels))
        return _parts(len(names), [i for each, n in zip(members.values(), counts) for i in each[:n]])

    return split


def quotas(sizes: Sequence[int], fraction: float) -> list[int]:
    "How many of each class validate: its share rounded down, and one more where most was cut off, to the whole share."
    counts = [min(int(n * fraction), n - 1) for n in sizes]
    missing = max(1, round(sum(sizes) * fraction)) - sum(counts)
    most_cut = sorted(range(len(sizes)), key=lambda i: counts[i] - sizes[i] * fraction)
    for i in [i for i in most_cut if counts[i] + 1 < sizes[i]][: max(0, missing)]:
        counts[i] += 1
    return counts


def where(is_valid: Callable[[str], bool]) -> Splitter:
    "Images validate where `is_valid` of their name is true, else they train."

    def split(names: Sequence[str], get_y: Labeller) -> Parts:
        answers = ask_all(names, is_valid, "part")
        return _parts(len(names), list(compress(range(len(names)), answers)))

    return split


def listed(validating: Collection[str], file: str = "the list") -> Splitter:
    "The images named in `validating` (which `file` held, as errors say) validate, the others train."
    wanted = set(validating)

    def split(names: Sequence[str], get_y: Labeller) -> Parts:
        refuse_strangers(file, validating, names)
        return where(wanted.__contains__)(names, get_y)

    return split


def by_table(table: Table, column: str = IS_VALID) -> Splitter:
    "Images validate where the table's column says so."
    is_valid = table.is_valid(column)

    def split(names: Sequence[str], get_y: Labeller) -> Parts:
        refuse_strangers(table.file, table.rows, names)
        return where(is_valid)(names, get_y)

    return split


def make_splitter(text: str, seed: int, root: str | Path = ".") -> Splitter:
    "The splitter that a text such as random:0.2 means; a file is looked for as named, then below `root`."
    found = SPLIT.fullmatch(text)
    if found is None:
        raise UsageError(f"a split by {text} is not possible: it must be {SPLIT_RULE}")
    if found["list"]:
        return listed(read_list(locate(found["list"], root)), found["list"])
    if found["table"]:
        return by_table(read_table(locate(found["table"], root)), found["column"] or IS_VALID)
    if found["kind"]:
        make = at_random if found["kind"] == "random" else stratified
        return make(float(found["share"] or 0.2), seed)
    return grandparent if text == "grandparent" else automatic(seed)


def read_list(file: str | Path) -> list[str]:
    "The paths in a text file, one a line."
    try:
        lines = read_bytes(file, LIST_LIMIT).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} can't be read: {getattr(error, 'strerror', None) or error}") from error
    return [tidy(line) for line in lines if line.strip()]


def locate(file: str, root: str | Path) -> Path:
    "A file as named, or where there is none, below `root`."
    path = expanded(file)
    return path if path.exists() or not (below := Path(root, file)).exists() else below


def _parts(n: int, valid: Sequence[int]) -> Parts:
    held_out = set(valid)
    return [i for i in range(n) if i not in held_out], sorted(held_out)


def _too_few(labels: Sequence[str]) -> str:
    n = len(set(labels))
    all_of_them = f"the class {labels[0]!r} has only one," if n == 1 else f"each of the {n} classes has only one"
    example = f", as {labels[0]!r} has," if n > 1 else ""
    return (
        f"none of {len(labels)} images can validate: {all_of_them}{example} and that one must train; are they labelled "
        "as you mean? If so, add images"
    )
