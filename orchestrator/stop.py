"Stop: Ctrl-C and SIGTERM as a wish that is granted between two steps."

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Self


class Interrupted(Exception):
    "The run ended because it was asked to, after saving where it stood; `code` is the exit code."

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Stop:
    """While open, the first Ctrl-C or SIGTERM is only noted: called, it says whether one came, and `code` how to exit.

    A Ctrl-C after that raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.code = 0

    def __enter__(self) -> Self:
        signals = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._note) for number in signals}
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
