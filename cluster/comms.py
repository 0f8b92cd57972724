"How ranks talk: sums, broadcasts and barriers of one rank (Solo) or many (Group). Sole importer of torch.distributed."

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=10)
MEETING = 30.0  # seconds for all ranks to be there; they are told at the same time, when all are up
UNREACHABLE = 15.0  # seconds without an answer after which a machine counts as cut off
CALLED_OFF = "called off"  # the key under which the driver says so of a meeting


class PeerLost(Exception):
    "A collective failed because another rank left it: a consequence of that rank's trouble, never the root cause."


class Comm(Protocol):
    "What a rank may ask of the others; `seconds` is the time spent on it so far, `waiting` whether it is at it now."

    rank: int
    world_size: int
    seconds: float
    waiting: bool

    def sum_(self, tensor: Tensor) -> None:
        "Replace `tensor` (any shape and dtype, equal on all ranks) by its sum over all ranks."

    def start_sum_(self, tensor: Tensor) -> None:
        "As `sum_`, in the background: `tensor` is the sum once `finish` has returned, and no one's till then."

    def finish(self) -> None:
        "Wait for all that `start_sum_` started."

    def broadcast_(self, tensor: Tensor) -> None:
        "Replace `tensor` by rank 0's."

    def barrier(self) -> None:
        "Return once every rank is here."

    def close(self) -> None:
        "Leave; a rank that still waits for this one fails at once instead of waiting on."


class Solo:
    "One rank alone: each collective is the identity."

    rank, world_size, seconds, waiting = 0, 1, 0.0, False

    def sum_(self, tensor: Tensor) -> None:
        "Nothing to add."

    def start_sum_(self, tensor: Tensor) -> None:
        "Nothing to add, in the background."

    def finish(self) -> None:
        "Nothing was started."

    def broadcast_(self, tensor: Tensor) -> None:
        "Rank 0's tensor is this one."

    def barrier(self) -> None:
        "Everyone is here."

    def close(self) -> None:
        "Nobody to leave."


@dataclass(frozen=True)
class Meeting:
    "Where the ranks of a group find each other: the address of a store, and a name for this group in it."

    host: str
    port: int
    group: str = "0"


class Store:
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


def _meet(store: dist.Store, keys: list[str]) -> None:
    "Wait until all these are written; RuntimeError if they never will be."
    deadline = time.monotonic() + MEETING
    while not store.check(keys):
        if store.check([CALLED_OFF]):
            raise RuntimeError("the meeting is called off")
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all ranks were there within {MEETING:g} s")
        time.sleep(0.005)


class StoreClient:
    """A rank's own line to the Store, which a thread of its own may use. Raises PeerLost if the store is gone.

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
            raise PeerLost(f"the driver's store is gone: {error}") from error
        return self._is_there(question)

    def is_off(self, group: str) -> bool:
        "Whether the driver has called that group off."
        return self._is_there(f"{group}/{CALLED_OFF}")

    def _is_there(self, key: str) -> bool:
        try:
            return bool(self._store.check([key]))
        except RuntimeError as error:
            raise PeerLost(f"the driver's store is gone: {error}") from error


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


class Group:
    """Many ranks, one process each: `backend` is nccl (a GPU a rank) or gloo (CPU; GPUs too, shared if need be).

    Raises PeerLost where a rank can't be reached.
    """

    def __init__(self, rank: int, world_size: int, meeting: Meeting, backend: str) -> None:
        self.rank, self.world_size, self.seconds, self.waiting = rank, world_size, 0.0, False
        self.name, self._started, self._lines = meeting.group, list[Any](), list[socket.socket]()
        if meeting.host.startswith("127."):
            for library in ("GLOO", "NCCL"):
                os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
        store = dist.TCPStore(meeting.host, meeting.port, is_master=False, timeout=TIMEOUT)
        named = dist.PrefixStore(meeting.group, store)
        named.set(f"here/{rank}", "")
        # before gloo's own meeting, from which nothing could free a rank if another one never came
        self._wait(lambda: _meet(named, [f"here/{other}" for other in range(world_size)]))
        before = connections()
        self._wait(
            lambda: dist.init_process_group(backend, store=named, rank=rank, world_size=world_size, timeout=TIMEOUT)
        )
        self._lines = handles(connections() - before)
        self._token = torch.zeros(1, device="cuda" if backend == "nccl" else "cpu")

    def sum_(self, tensor: Tensor) -> None:
        "See Comm."
        self._wait(lambda: dist.all_reduce(tensor))

    def start_sum_(self, tensor: Tensor) -> None:
        "See Comm."
        self._wait(lambda: self._started.append(dist.all_reduce(tensor, async_op=True)))

    def finish(self) -> None:
        "See Comm."
        while self._started:
            self._wait(lambda: self._started[0].wait())  # no name but this holds it, once it has failed
            self._started.pop(0)

    def broadcast_(self, tensor: Tensor) -> None:
        "See Comm."
        self._wait(lambda: dist.broadcast(tensor, src=0))

    def barrier(self) -> None:
        "See Comm."
        self.sum_(self._token)
        self._token.zero_()

    def let_go(self) -> None:
        """From another thread: have the collective that this rank waits in fail, since another will never come to it.

        A process that died has closed its connections; one whose machine or network is gone has not, and gloo has no
        way to give up. So the connections are shut here, of which `_lines` are second handles.
        """
        for line in self._lines:
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        "See Comm."
        self._started.clear()  # each holds the connections open, and the others would wait for this rank
        for line in self._lines:
            line.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _wait(self, collective: Callable[[], Any]) -> None:
        started, self.waiting = time.perf_counter(), True
        try:
            collective()
        except (RuntimeError, ValueError) as error:
            raise PeerLost(f"rank {self.rank} lost touch with the others: {error}") from error
        finally:
            self.seconds, self.waiting = self.seconds + time.perf_counter() - started, False
