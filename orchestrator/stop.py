"Stop: Ctrl-C, SIGTERM and the end of the terminal as a wish that is granted between two steps."

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Self

TO_END = (signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    "The run ended because it was asked to, after saving where it stood; `code` is the exit code."

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Stop:
    """While open, the first Ctrl-C, SIGTERM or SIGHUP is noted: called, it says if one came, and `code` how to exit.

    A Ctrl-C after that raises KeyboardInterrupt at once. What is ignored (SIGHUP under nohup) stays so.
    """

    def __init__(self) -> None:
        self.code = 0

    def __enter__(self) -> Self:
        heard = [number for number in TO_END if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, *heard)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.code and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.code = 128 + number
        print("\nstopping between two steps (Ctrl-C again: at once) ...", file=sys.stderr, flush=True)

    def __call__(self) -> bool:
        return bool(self.code)
