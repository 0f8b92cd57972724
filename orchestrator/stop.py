"Stop: Ctrl-C, SIGTERM and the end of the terminal as a wish that is granted between two steps."

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

from cluster.signals import TO_END


class Interrupted(Exception):
    "The run ended because it was asked to, after saving where it stood; `code` is the exit code."

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Stop:
    """While open, the first Ctrl-C, SIGTERM or SIGHUP is noted: called, it says if one came, and `code` how to exit.

    A Ctrl-C after that raises KeyboardInterrupt at once. What is ignored (SIGHUP under nohup) stays so. Behind a stop
    that was asked for, signals come `too_late`.
    """

    def __init__(self) -> None:
        self.code = 0

    def __enter__(self) -> Self:
        heard = [n for n in TO_END if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.code:
            too_late()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.code and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.code = not self.code, 128 + number
        if first:
            print("\nstopping between two steps (Ctrl-C again: at once) ...", file=sys.stderr, flush=True)

    def __call__(self) -> bool:
        return bool(self.code)


def too_late() -> None:
    "From here on, what is left to do is over in a moment, and worth more than to end at once."
    for number in TO_END:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def signals_as_before() -> Iterator[None]:
    "Have signals do afterwards what they do now."
    before = {number: signal.getsignal(number) for number in TO_END}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
