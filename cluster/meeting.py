"Where ranks meet: a store of keys and values that the driver hosts, and each rank's lines to it."

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

MEETING = 30.0  # seconds for all ranks to be there; they are told at the same time, when all are up
REACHING = 4.0  # seconds to connect to another rank: it takes milliseconds, or some seconds where packets get lost
UNREACHABLE = 15.0  # seconds without an answer after which a machine counts as cut off
SIOCGIFADDR = 0x8915  # of Linux: an interface's address
CALLED_OFF = "called off"  # the key under which it is said of a group that it will not be, or not go on


class StoreGone(Exception):
    "The driver's store does not answer: the driver, its machine or the way there is gone."


@dataclass(frozen=True)
class Meeting:
    "Where the ranks of a group find each other: the address of a store, and a name for this group in it."

    host: str
    port: int
    group: str = "0"


class KeyStore:
    """The key-value store in which ranks meet, hosted by the driver so that it outlives any of them.

    torch's own listener would bind every interface; the socket is bound here, to `host` alone, and handed over.
    """

    def __init__(self, host: str) -> None:
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.bind((host, 0))
        listener.listen(1024)
        self.meeting = Meeting(host, listener.getsockname()[1])
        # torch closes the descriptor with the store
        self._store = dist.TCPStore(
            host, self.meeting.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    def read(self, key: str) -> bytes:
        "What a rank has written under that key; nothing if it has not."
        return self._store.get(key) if self._store.check([key]) else b""

    def write(self, key: str, value: str) -> None:
        "Leave something for a rank to read."
        self._store.set(key, value)

    def call_off(self, group: str) -> None:
        "Let no rank wait any more for all of that group to be there: one will never come."
        self.write(f"{group}/{CALLED_OFF}", "1")


def await_keys(store: dist.Store, keys: list[str]) -> None:
    "Wait until all these are written; RuntimeError if they never will be."
    deadline = time.monotonic() + MEETING
    while not store.check(keys):
        if store.check([CALLED_OFF]):
            raise RuntimeError("the meeting is called off")
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all ranks were there within {MEETING:g} s")
        time.sleep(0.005)


def meet(store: dist.Store, rank: int, world_size: int, address: str | None) -> set[tuple[int, int]]:
    """Wait until all ranks are there; which of them can't connect to each other, as pairs that all ranks know.

    Each listens at its own `address` for the others; one without does not, and tries none. RuntimeError as await_keys.
    """
    ranks = range(world_size)
    here, lost = ([f"{what}/{one}" for one in ranks] for what in ("here", "lost"))
    if address is None:
        store.set(lost[rank], "")
        store.set(here[rank], "")
        await_keys(store, [*here, *lost])
    else:
        with socket.create_server((address, 0), backlog=world_size) as listener, ThreadPoolExecutor(64) as pool:
            store.set(here[rank], f"{address} {listener.getsockname()[1]}")
            await_keys(store, here)
            others = [other for other in ranks if other != rank]
            reached = pool.map(_reaches, [store.get(here[other]).decode() for other in others])
            store.set(lost[rank], " ".join(str(other) for other, fine in zip(others, reached) if not fine))
            await_keys(store, lost)
    return {(one, int(other)) for one in ranks for other in store.get(lost[one]).split()}


def _reaches(place: str) -> bool:
    "Whether a connection to a rank's address and port can be made."
    if place:
        host, port = place.split()
        try:
            socket.create_connection((host, int(port)), timeout=REACHING).close()
        except OSError:
            return False
    return True


def cut_off(pairs: Iterable[tuple[int, int]]) -> set[int]:
    """Of ranks that can't connect to each other, few without whom all others can.

    First those that miss most others, so that of two machines the one with fewer ranks goes; of equals the last.
    """
    left, found = {frozenset(pair) for pair in pairs}, set[int]()
    while left:
        missing = Counter(rank for pair in left for rank in pair)
        worst = max(missing, key=lambda rank: (missing[rank], rank))
        found.add(worst)
        left = {pair for pair in left if worst not in pair}
    return found


class KeyStoreClient:
    """A rank's own line to the KeyStore, which a thread of its own may use. Raises StoreGone where that is.

    Or if its machine has not answered for `UNREACHABLE` seconds; a driver that is stopped for a while still does.
    """

    def __init__(self, meeting: Meeting) -> None:
        before = connections()
        self._store = dist.TCPStore(meeting.host, meeting.port, is_master=False, timeout=timedelta(seconds=10))
        for line in handles(connections() - before):
            with line:
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * UNREACHABLE))
                line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # while it waits for an answer
                for option, value in ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 2)):
                    line.setsockopt(socket.IPPROTO_TCP, option, value)

    def exchange(self, key: str, value: str, question: str) -> bool:
        "Write `value` under `key`, and say whether `question` was written by somebody."
        try:
            self._store.set(key, value)
        except RuntimeError as error:
            raise StoreGone(f"the driver's store is gone: {error}") from error
        return self._is_there(question)

    def is_off(self, group: str) -> bool:
        "Whether the driver has called that group off."
        return self._is_there(f"{group}/{CALLED_OFF}")

    def _is_there(self, key: str) -> bool:
        try:
            return bool(self._store.check([key]))
        except RuntimeError as error:
            raise StoreGone(f"the driver's store is gone: {error}") from error


def connections() -> set[int]:
    "The descriptors of this process's connections over a network, and of no listener."
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed while we look
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as one:
                    if one.family != socket.AF_UNIX and not one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        found.add(int(name))
    return found


def handles(descriptors: Iterable[int]) -> list[socket.socket]:
    "Second handles of connections."
    found = []
    for one in descriptors:
        with suppress(OSError):  # closed by another thread, such as Ray's
            found.append(socket.socket(fileno=os.dup(one)))
    return found


def interface_to(host: str) -> str | None:
    """The network interface over which this machine reaches an IPv4 address; None where that can't be told.

    gloo would take the one that the machine's own name stands for, which is often the loopback, or nothing.
    """
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        own = probe.getsockname()[0]
        return next((name for _, name in socket.if_nameindex() if address_of(name) == own), None)
    return None


def address_of(interface: str) -> str | None:
    "The IPv4 address of a network interface; None if it has none, or there is no such interface."
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()))
        return socket.inet_ntoa(answer[20:24])
    return None
