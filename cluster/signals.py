"Signals that would end this process, at moments in which they would do harm, and those that others are not to hear."

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def uninterrupted() -> Iterator[None]:
    "Let Ctrl-C, SIGTERM and SIGHUP wait until this is over: it takes a moment, and half of it would leave a mess."
    if threading.current_thread() is not threading.main_thread():  # where none of them arrives
        yield
        return
    noted: list[int] = []
    heard = [number for number in TO_END if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, lambda number, frame: noted.append(number)) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if noted:
            signal.raise_signal(noted[0])


def hear_again() -> None:
    "Have signals do what Python says that they do: Ray's end has a SIGTERM kill the process, and Python not know it."
    if threading.current_thread() is threading.main_thread():
        for number in TO_END:
            signal.signal(number, signal.getsignal(number))


@contextmanager
def keep_signals() -> Iterator[None]:
    """Around Ray's start: let Ctrl-C wait until it is over, and put the caller's way to end by SIGTERM back behind it.

    Ray starts processes, in whose hooks an exception is lost; and it takes SIGTERM for itself, to print a stack and to
    skip our clean-up.
    """
    if threading.current_thread() is not threading.main_thread():  # where neither Ray nor we may set them
        yield
        return
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    terminate, interrupt = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, note)
    try:
        yield
    except SystemExit as ended:
        if ended.code == signal.SIGTERM:  # Ray's way was taken meanwhile
            if callable(terminate):
                terminate(signal.SIGTERM, None)
            raise SystemExit(128 + signal.SIGTERM) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, terminate)
        signal.signal(signal.SIGINT, interrupt)
    if noted:
        raise KeyboardInterrupt


@contextmanager
def shielded() -> Iterator[None]:
    """Have no process or thread that is started meanwhile hear of SIGTERM and SIGHUP, as Ray's do not hear of Ctrl-C.

    A service manager sends the one to all processes of a run at once, a terminal that is closed the other, and the
    driver, for whom they are, needs the others to save the run.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
