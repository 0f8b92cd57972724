"Pulse: a rank's sign of life, several times a second, by which the driver tells a slow rank from a dead one."

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

from cluster.meeting import KeyStore, KeyStoreClient, Meeting, StoreGone

PERIOD = 0.2  # seconds between two signs
HELD_UP = 5 * PERIOD  # between two looks: then it is the driver that stood still, and nobody is to blame for that


@dataclass(frozen=True)
class Sign:
    "What a worker says of itself: `moves` counts all that it begins, `step` the optimizer's steps."

    moves: int = 0
    step: int = 0
    doing: str = "starting"


@dataclass(frozen=True)
class Life:
    "What is known of a worker: its last sign, and for how many seconds there was none, or none of progress."

    sign: Sign
    silent: float
    still: float


def start_pulse(
    meeting: Meeting, name: str, look: Callable[[], Sign], listen: Callable[[KeyStoreClient], object]
) -> None:
    """From a thread, tell the driver's store what `look` sees; write out all stacks when the driver asks for them.

    `listen` may ask the store for more. A process that can't reach the driver any more ends: nobody would ever tell it
    what to do, or to stop.
    """

    def beat() -> None:
        shown = False
        try:
            client = KeyStoreClient(meeting)
            for beat_number in count():
                sign = look()
                text = json.dumps([beat_number, sign.moves, sign.step, sign.doing])
                asked = client.exchange(_sign(name), text, _question(name))
                if asked and not shown:
                    shown = True
                    with suppress(OSError):  # a full disk
                        print("the driver asks what keeps this process; its threads are here:", file=sys.stderr)
                        faulthandler.dump_traceback(all_threads=True)
                listen(client)
                time.sleep(PERIOD)
        except StoreGone as error:
            with suppress(OSError):
                print(f"{error}; this process ends", file=sys.stderr, flush=True)
            os._exit(1)

    threading.Thread(target=beat, name="pulse", daemon=True).start()


class Watch:
    "The driver's view of the pulses: when each of them last came, and last showed progress, by the driver's clock."

    def __init__(self, store: KeyStore, clock: Callable[[], float] = time.monotonic) -> None:
        self.store, self.clock = store, clock
        self._seen: dict[str, tuple[bytes, Sign, float, float]] = {}
        self._looked: dict[str, float] = {}

    def expect(self, names: Iterable[str]) -> None:
        "Something was asked of these just now: only from here on do they stand still."
        now = self.clock()
        for name in names:
            text, sign, _, _ = self._seen.get(name, (b"", Sign(), now, now))
            self._seen[name] = text, sign, now, now
            self._looked[name] = now

    def look(self, name: str) -> Life:
        "The life of a worker, of which something is expected."
        now, text = self.clock(), self.store.read(_sign(name))
        before, sign, heard, moved = self._seen[name]
        gap, self._looked[name] = now - self._looked[name], now
        if gap > HELD_UP:
            heard, moved = heard + gap, moved + gap
        if text != before:
            new = Sign(*json.loads(text)[1:])
            moved = now if new != sign else moved
            sign, heard = new, now
        self._seen[name] = text, sign, heard, moved
        return Life(sign, now - heard, now - moved)

    def ask_for_stacks(self, name: str) -> None:
        "Have the worker write out where its threads are."
        self.store.write(_question(name), "1")


def _sign(name: str) -> str:
    return f"pulse/{name}"


def _question(name: str) -> str:
    return f"stacks/{name}"
