"The terminal of a run: a table like fastai's, above one progress bar for the whole gang."

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast


class Terminal:
    "Prints rows; draws the bar (fastprogress) below them where there is a terminal to draw it on."

    def __init__(self) -> None:
        self.bar: Any = None

    def open_bar(self, total: int) -> None:
        "Show a bar of `total` batches, once the gang works."
        if sys.stdout.isatty():
            from fastprogress.fastprogress import ConsoleProgressBar

            self.bar = ConsoleProgressBar(range(total), total=total, leave=False)
            self.bar.update(0)

    def advance(self, done: int) -> None:
        "Move the bar to `done` batches."
        if self.bar is not None and done:
            self.bar.update(done)

    def close_bar(self) -> None:
        "Wipe the bar, and forget it."
        self.clear()
        self.bar = None

    def row(self, cells: Sequence[str]) -> None:
        "Print one line of the table."
        self.write("".join(f"{cell:<12}" for cell in cells).rstrip())

    def write(self, text: str) -> None:
        "Print text in place of the bar, which comes back below it with the next batch."
        self.clear()
        print(text, flush=True)

    def clear(self) -> None:
        "Wipe the bar's line."
        if self.bar is not None:
            print("\r" + " " * self.bar.max_len, end="\r", flush=True)


class Enduring:
    """A text stream that drops what its reader, its terminal or its disk doesn't take: a run outlives all three.

    The first time, `warn` is told why.
    """

    def __init__(self, stream: TextIO, warn: Callable[[OSError], object] | None = None) -> None:
        self._stream, self._warn = stream, warn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._losses():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._losses():
            self._stream.flush()

    @contextmanager
    def _losses(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            warn, self._warn = self._warn, None
            if warn:
                warn(error)


@contextmanager
def enduring_output() -> Iterator[None]:
    "Have the process's output and errors endure: a closed terminal, the end of a pipe, a full disk behind `> log`."
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        sys.stdout = cast(TextIO, Enduring(before[0] or nowhere, _tell_of_losses))
        sys.stderr = cast(TextIO, Enduring(before[1] or nowhere))
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            for stream in filter(None, before):
                _let_go(stream, nowhere)


def _tell_of_losses(error: OSError) -> None:
    told = "warning: what is printed can't be written: {}; the run goes on, and its folder has what it comes to"
    print(told.format(error.strerror or error), file=sys.stderr, flush=True)


def _let_go(stream: TextIO, nowhere: TextIO) -> None:
    "What a stream still holds goes nowhere if it can't go out: Python would fail on it as it exits."
    try:
        stream.flush()
    except OSError:
        os.dup2(nowhere.fileno(), stream.fileno())
        stream.flush()


def download_bar() -> Any:
    "A function of (what, done, total) that shows the progress of a download, an extraction or a generation."
    shown = {"what": "", "percent": -1}

    def show(what: str, done: int, total: int) -> None:
        percent = 100 * done // total if total else -1
        if (what, percent) == (shown["what"], shown["percent"]):
            return
        new_line = what != shown["what"]
        shown.update(what=what, percent=percent)
        if sys.stdout.isatty():
            print(f"\r{what}: {percent}%\033[K" if total else f"\r{what}: {done}\033[K", end="", flush=True)
            if total and done >= total:
                print(flush=True)
        elif new_line:
            print(f"{what} ...", flush=True)

    return show
