"Labels: what class a file's name stands for: by its folder, by a pattern, by a CSV table, or by any function."

from __future__ import annotations

import csv
import io
import posixpath
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from learner.errors import CONTROL, UsageError, UserError, shown
from learner.reading import opened

# A name is a file's path below the dataset's folder, with forward slashes: the same on every machine.
Labeller = Callable[[str], str]

IS_VALID = "is_valid"
LIST_LIMIT = 2**29  # bytes
TABLE = r"(?P<table>.+\.(?i:csv))(:(?P<column>.+))?"
YES_NO = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class NoAnswer(UserError):
    "What was asked of one file (its label, its part) has no answer; says why, and what to do."


def ask_all(names: Sequence[str], question: Callable[[str], Any], what: str) -> list[Any]:
    "The answer for each name; UsageError counts those without one, and gives the first and its reason."
    answers: list[Any] = []
    lacking: list[tuple[str, NoAnswer]] = []
    for name in names:
        try:
            answers.append(question(name))
        except NoAnswer as error:
            lacking.append((name, error))
    if lacking:
        name, reason = lacking[0]
        raise UsageError(f"{len(lacking)} of {len(names)} images have no {what}; the first, {name}: {reason}")
    return answers


def label_all(names: Sequence[str], get_y: Labeller) -> list[str]:
    "The label of each name; UsageError where some have none, or an empty one."

    def label(name: str) -> str:
        found = get_y(name)
        if not isinstance(found, str) or not found.strip():
            raise NoAnswer(f"its label is {found!r}, and must be a text that is not empty")
        if re.search(CONTROL, found):
            raise NoAnswer(f"its label is {shown(repr(found))}, which has control characters; call it otherwise")
        return found

    return ask_all(names, label, "label")


def parent_label(name: str) -> str:
    "The name of the folder that the file lies in."
    folder = posixpath.basename(posixpath.dirname(name))
    if not folder:
        raise NoAnswer(
            "it lies in no folder that could be its label; "
            "move it into its class's, or label by name (--label-regex) or by table (--labels-csv)"
        )
    return folder


def matching(pattern: str) -> Labeller:
    r"""The label is the first group of `pattern`, searched in the file's name: `(.+)_\d+.jpg$` labels the pets.

    A pattern with a slash is searched in the path from the dataset's folder on instead, such as /images/pug_1.jpg.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"the label pattern '{pattern}' is no regular expression: {error}") from error
    if not compiled.groups:
        raise UsageError(
            f"the label pattern '{pattern}' has no group: put the label in round brackets, as in (.+)_\\d+.jpg$"
        )

    def label(name: str) -> str:
        found = compiled.search(f"/{name}" if "/" in pattern else posixpath.basename(name))
        if found is None:
            raise NoAnswer(f"the pattern '{pattern}' does not match; correct it, or move such files out")
        return found[1]

    return label


@dataclass(frozen=True)
class Table:
    "A CSV file: its first column names files, by their paths below the dataset's folder; the others tell of them."

    file: str
    columns: tuple[str, ...]
    rows: dict[str, list[str]]

    def labels(self, column: str | None = None) -> Labeller:
        "The label is what stands in `column`, which may be left out where there is only one beside is_valid."
        choices = [name for name in self.columns if name != IS_VALID]
        if column is None and len(choices) != 1:
            raise UsageError(
                f"{self.file} has {len(choices)} columns of labels ({', '.join(choices)}); "
                f"name the one you mean: {self.file}:COLUMN"
            )
        return self._cell(choices[0] if column is None else column)

    def is_valid(self, column: str = IS_VALID) -> Callable[[str], bool]:
        "Whether a file validates (True) or trains (False)."
        cell = self._cell(column)

        def ask(name: str) -> bool:
            answer = cell(name)
            if answer.lower() not in YES_NO:
                raise NoAnswer(f"{self.file} has {answer!r} as its {column}, which must be True or False")
            return YES_NO[answer.lower()]

        return ask

    def _cell(self, column: str) -> Callable[[str], str]:
        if column not in self.columns:
            raise UsageError(f"{self.file} has no column {column!r}; its columns are {', '.join(self.columns)}")
        place = self.columns.index(column)

        def cell(name: str) -> str:
            if name not in self.rows:
                raise NoAnswer(f"{self.file} has no row for it; add one, or remove the file")
            return self.rows[name][place]

        return cell


def read_table(file: str | Path) -> Table:
    "Read a CSV file whose first line names the columns; UsageError if it is none, or has two rows for one file."
    try:
        with opened(file, LIST_LIMIT) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
            header, *lines = [row for row in csv.reader(text) if any(map(str.strip, row))] or [[]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{file} can't be read: {getattr(error, 'strerror', None) or error}") from error
    if len(header) < 2:
        raise UsageError(f"{file} is no table: its first line must name the columns, with commas between: path,label")
    if twice := [name for name, after in pairwise(sorted(name.strip() for name in header[1:])) if name == after != ""]:
        raise UsageError(f"{file} has two columns {twice[0]!r}; rename one")
    rows: dict[str, list[str]] = {}
    for row in lines:
        name = tidy(row[0])
        if len(row) != len(header):
            raise UsageError(f"{file} has {len(row)} values for {name}, but {len(header)} columns; complete the row")
        if name in rows:
            raise UsageError(f"{file} has two rows for {name}; remove one")
        rows[name] = [cell.strip() for cell in row[1:]]
    return Table(str(file), tuple(name.strip() for name in header[1:]), rows)


def split_column(text: str) -> tuple[str, str | None]:
    "FILE.csv:COLUMN as both, FILE.csv with None; UsageError for anything else."
    found = re.fullmatch(TABLE, text)
    if found is None:
        raise UsageError(f"labels from {text} are not possible: it must be FILE.csv or FILE.csv:COLUMN")
    return found["table"], found["column"]


def check_labelling(pattern: str | None, table: str | None) -> None:
    "Raise UsageError if the label pattern is none, the table no FILE.csv[:COLUMN], or if both are given."
    if pattern is not None and table is not None:
        raise UsageError("labels come from the names (--label-regex) or from a table (--labels-csv); give only one")
    if pattern is not None:
        matching(pattern)
    if table is not None:
        split_column(table)


def tidy(name: str) -> str:
    "A path in a list as files are named: no ./ before it, no spaces around it."
    return PurePosixPath(name.strip()).as_posix()


def refuse_strangers(file: str, listed: Iterable[str], names: Collection[str]) -> None:
    "Raise UsageError if what `file` lists is not all in `names`, the images that there are."
    known = set(names)
    if strangers := [name for name in listed if name not in known]:
        example = next(iter(names), None)
        hint = f"; paths are relative to the dataset's folder, as in {example}" if example else ""
        raise UsageError(
            f"{file} names {len(strangers)} images that are not there, the first {strangers[0]}{hint}; correct the list"
        )
