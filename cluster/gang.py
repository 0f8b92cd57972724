"The gang: all workers of a run, driven as one. LocalGang is one worker in this very process, without Ray."

from __future__ import annotations

import os
import socket
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from cluster.comms import PeerLost, Solo
from cluster.worker import Chunk, Job, Report, Worker
from learner.data.loader import usable_cores
from learner.errors import UserError

IN_FLIGHT = 2  # chunks: while the driver reads one report, every worker is busy with the next chunk


@dataclass(frozen=True)
class Failure:
    """What went wrong in one rank, as text, since exceptions do not travel well.

    `kind` is user (a UserError: its message says all), error (a bug: `trace` says where), died (the process is gone)
    or peer (a consequence of another rank's failure).
    """

    rank: int
    host: str
    pid: int
    kind: str
    message: str
    trace: str = ""

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        "The failure of this process."
        kind = "user" if isinstance(error, UserError) else "peer" if isinstance(error, PeerLost) else "error"
        message = str(error) if kind == "user" else f"{type(error).__name__}: {error}"
        return cls(rank, socket.gethostname(), os.getpid(), kind, message, traceback.format_exc())

    def __str__(self) -> str:
        where = f"rank {self.rank} (host {self.host}, pid {self.pid})"
        return f"{where}: {self.message}" + (f"\n{self.trace.rstrip()}" if self.kind == "error" else "")


class WorkersFailed(UserError):
    "One or more workers failed; the root cause comes first, and ranks that only lost touch with it are counted."

    def __init__(self, failures: Iterable[Failure]) -> None:
        gravity = ["user", "error", "died", "peer"]
        self.failures = sorted(failures, key=lambda failure: (gravity.index(failure.kind), failure.rank))
        causes = [failure for failure in self.failures if failure.kind != "peer"] or self.failures[:1]
        others = len(self.failures) - len(causes)
        lost = f"\n({others} more lost touch with a failed worker)" if others else ""
        super().__init__("a worker failed: " + "\n".join(map(str, causes)) + lost)


@dataclass(frozen=True)
class Seat:
    "A rank's place in the gang: its number among all, its number among those of its node, and how many these are."

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def threads(self) -> int:
        "Its share of the node's processors, so that the workers together don't want more than there are."
        return max(1, usable_cores() // self.local_world_size)

    def environment(self) -> dict[str, str]:
        "The variables that torchrun sets, but for the master's address."
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return {name: str(getattr(self, name.lower())) for name in names}

    def log_file(self, folder: Path) -> Path:
        "Where what the rank prints is kept."
        return folder / f"rank_{self.rank}.log"

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} (pid {os.getpid()}, {self.threads} threads)"


class Gang(Protocol):
    "What the driver may ask of its workers."

    world_size: int

    def stream(self, chunks: Iterable[Chunk]) -> Iterator[list[Report]]:
        "Run the chunks in order, `IN_FLIGHT` at a time; for each, the reports of all ranks. Raises WorkersFailed."
        ...

    def call(self, method: str, *args: Any) -> list[Any]:
        "Call a method of every Worker; the results by rank. Raises WorkersFailed."
        ...

    def call_first(self, method: str, *args: Any) -> Any:
        "As `call`, of rank 0 alone, and only its result."
        ...

    def close(self) -> None:
        "Stop all workers, whatever they are doing."
        ...


def pipelined(send: Any, receive: Any, chunks: Iterable[Chunk]) -> Iterator[list[Report]]:
    "Send each chunk as soon as fewer than `IN_FLIGHT` are out; what is out when the caller stops early is awaited."
    out: deque[Any] = deque()
    try:
        for chunk in chunks:
            out.append(send(chunk))
            if len(out) == IN_FLIGHT:
                yield receive(out.popleft())
        while out:
            yield receive(out.popleft())
    except GeneratorExit:
        while out:
            receive(out.popleft())
        raise


class LocalGang:
    "One worker in the driver's process: exceptions and breakpoints are where they happen."

    world_size = 1

    def __init__(self, job: Job, device: str, log_folder: Path) -> None:
        seat = Seat(0, 1, 0, 1)
        os.environ |= seat.environment()
        torch.set_num_threads(seat.threads)
        self.worker = Worker(job, Solo(), torch.device(device), seat.threads)
        seat.log_file(log_folder).write_text(f"{seat} on {device}: in the driver's process, which has the terminal\n")

    def stream(self, chunks: Iterable[Chunk]) -> Iterator[list[Report]]:
        "See Gang."
        for chunk in chunks:
            yield self.call("run", chunk)

    def call(self, method: str, *args: Any) -> list[Any]:
        "See Gang."
        return [self.call_first(method, *args)]

    def call_first(self, method: str, *args: Any) -> Any:
        "See Gang."
        return getattr(self.worker, method)(*args)

    def close(self) -> None:
        "See Gang."
        self.worker.close()
