"The terminal of a run: a table like fastai's, above one progress bar for the whole gang."

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any


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
