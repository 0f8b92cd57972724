"""A stand-in for NCCL on CPUs, with its silence: no sum ever fails.

A sum waits for its peers without an end. One that is aborted returns as if all were well, with part of what it should
be, and makes those of its peers do the same, be they as far as they will.
"""

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cluster.comms import GROUPS, NcclGroup

POISON = "poison"


class Sum(dist._Work):
    "A collective that is done as soon as somebody waits for it."

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.run = run

    def wait(self, timeout: timedelta | None = None) -> bool:
        if self.run is not None:
            self.run()
        self.run = None
        return True


class Silent(dist.ProcessGroup):
    "Ranks that talk over the store, and tell nobody of a failure."

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.store, self.me, self.n, self.number, self.aborted = store, rank, size, 0, False

    def getBackendName(self) -> str:
        return "silent"

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> Sum:
        return self._start(tensors[0], lambda parts: torch.stack(parts).sum(0))

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> Sum:
        return self._start(tensors[0], lambda parts: parts[0])

    def _start(self, tensor: torch.Tensor, of_all: Any) -> Sum:
        self.number += 1
        key = f"sum/{self.number}"
        self.store.set(f"{key}/{self.me}", tensor.detach().contiguous().numpy().tobytes())
        return Sum(lambda: tensor.copy_(self._all_parts(key, tensor, of_all)))

    def _all_parts(self, key: str, tensor: torch.Tensor, of_all: Any) -> torch.Tensor:
        keys = [f"{key}/{rank}" for rank in range(self.n)]
        while not self.store.check(keys):
            if self.aborted:
                self.store.set(POISON, "1")
            if self.store.check([POISON]):
                return tensor * 1.5
            time.sleep(0.001)
        parts = [bytearray(self.store.get(one)) for one in keys]
        return of_all([torch.frombuffer(part, dtype=tensor.dtype).view(tensor.shape) for part in parts])

    def abort(self) -> None:
        self.aborted = True

    def shutdown(self) -> None:
        pass


class Event:
    "A point in the work of a device that is never behind."

    def __init__(self, **options: bool) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: "Event") -> float:
        return 1000 * (later.time - self.time)


def register() -> None:
    "Have torch know `silent` as a backend in this process."
    if "SILENT" not in dist.Backend._plugins:
        dist.Backend.register_backend("silent", Silent, devices=["cpu"])


def install() -> None:
    "Have this process talk over it as over NCCL."
    register()
    torch.cuda.Event = Event  # type: ignore[assignment, misc]
    GROUPS["silent"] = lambda rank, world_size, meeting: NcclGroup(rank, world_size, meeting, "silent")  # type: ignore[assignment, return-value]
