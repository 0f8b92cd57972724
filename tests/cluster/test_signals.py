"Signals that have to wait, and that are not lost."

import signal
import threading
from collections.abc import Iterator

import pytest

from cluster.signals import TO_END, hear_again, uninterrupted


@pytest.fixture(autouse=True)
def heard() -> Iterator[list[int]]:
    "The signals that came to their owner."
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in TO_END}
    yield came
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_waits_until_all_is_done(heard: list[int]) -> None:
    "Only the first is told: one is enough to end a process."
    with uninterrupted():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert heard == []
    assert heard == [signal.SIGTERM]
    signal.raise_signal(signal.SIGINT)
    assert heard == [signal.SIGTERM, signal.SIGINT], "and from then on at once"


def test_it_comes_also_behind_an_error(heard: list[int]) -> None:
    with pytest.raises(ZeroDivisionError), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        1 / 0  # noqa: B018
    assert heard == [signal.SIGINT]


def test_what_is_ignored_stays_so(heard: list[int]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with uninterrupted():
        signal.raise_signal(signal.SIGHUP)
    assert heard == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_thread_leaves_signals_alone() -> None:
    "It may not set any."
    before, done = [signal.getsignal(number) for number in TO_END], []

    def close() -> None:
        with uninterrupted():
            hear_again()
            done.append([signal.getsignal(number) for number in TO_END])

    thread = threading.Thread(target=close)
    thread.start()
    thread.join()
    assert done == [before]


def test_all_is_heard_again(heard: list[int]) -> None:
    hear_again()
    for number in TO_END:
        signal.raise_signal(number)
    assert heard == list(TO_END)
