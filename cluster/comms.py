"How ranks talk: sums and broadcasts of one rank (Solo) or many (Group, NcclGroup), by torch.distributed."

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from threading import Lock, Thread
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.torch_version import TorchVersion

from cluster.meeting import CALLED_OFF, Meeting, address_of, connections, cut_off, handles, interface_to, meet

TIMEOUT = timedelta(days=1)  # the driver tells who hangs, and frees the others, long before
CONNECTING = 5.0  # seconds for the others' addresses, which are there: it takes milliseconds; gloo connects for 5 times
NCCL_ADDRESS = 20.0  # ... for rank 0's, which NCCL may look for first
ON_ERRORS = {  # of NCCL's or the GPU's: torch would end the process, or wait for minutes, and ask others to do the same
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
}

OWN_TROUBLE = (torch.AcceleratorError, torch.OutOfMemoryError)  # of the rank's own GPU, wherever it comes to light


class PeerLost(Exception):
    "A collective failed because another rank left it: a consequence of that rank's trouble, never the root cause."


class Unreachable(Exception):
    "Other ranks can't be reached from here, though all reach the driver; without this one, those that are left can."


class Comm(Protocol):
    "What a rank may ask of the others; `seconds` is the time spent on it so far, `waiting` whether it is at it now."

    rank: int
    world_size: int
    seconds: float
    waiting: bool

    def sum_(self, tensor: Tensor) -> None:
        """Replace `tensor` (any shape and dtype, equal on all ranks) by its sum over all ranks.

        A GPU does so in the order of its work. Nothing that is to last may be made of the sum before `finish`.
        """

    def start_sum_(self, tensor: Tensor) -> None:
        "As `sum_`, in the background: `tensor` is the sum once `finish` has returned, and no one's till then."

    def finish(self) -> None:
        "Wait for all that was started; from here on, every sum and broadcast before is known to be whole."

    def broadcast_(self, tensor: Tensor) -> None:
        "Replace `tensor` by rank 0's."

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

    def close(self) -> None:
        "Nobody to leave."


class Group:
    """Many ranks, one process each, over gloo (CPUs; GPUs too, shared if need be). For nccl, see NcclGroup.

    Raises PeerLost where a rank can't be reached, and what is wrong with the own GPU as it is.
    """

    # the gloo of torch 2.8 keeps the first timeout for all sums
    connecting = timedelta(seconds=CONNECTING) if TorchVersion(torch.__version__) >= "2.9" else TIMEOUT

    def __init__(self, rank: int, world_size: int, meeting: Meeting, backend: str = "gloo") -> None:
        self.rank, self.world_size, self.seconds, self.waiting = rank, world_size, 0.0, False
        self.name, self._started, self._lines = meeting.group, list[Any](), list[socket.socket]()
        if interface := interface_to(meeting.host):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if interface == "lo":  # NCCL knows networks, and uses several; but here nobody is to listen on one
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        store = dist.TCPStore(meeting.host, meeting.port, is_master=False, timeout=TIMEOUT)
        self._store = named = dist.PrefixStore(meeting.group, store)
        lost = set[tuple[int, int]]()
        # before gloo's own meeting, from which nothing could free a rank if another one never came
        self._wait(lambda: lost.update(meet(named, rank, world_size, self._address())))
        self._refuse(lost)
        before = connections()
        self._wait(lambda: self._connect(backend))
        self._lines = handles(connections() - before)

    def _address(self) -> str | None:
        "Where the other machines reach this rank; None where there are none."
        interface = os.environ.get("GLOO_SOCKET_IFNAME", "lo").split(",")[0]
        return None if interface == "lo" else address_of(interface)

    def _refuse(self, lost: set[tuple[int, int]]) -> None:
        "Begin no group of ranks that can't all reach each other."
        if self.rank in cut_off(lost):
            whom = sorted({other for pair in lost if self.rank in pair for other in pair} - {self.rank})
            raise Unreachable(f"no connection to rank {', '.join(map(str, whom))}, though all reach the driver")
        if lost:
            raise PeerLost(f"rank {self.rank} lost touch with the others: some ranks can't reach each other")

    def _connect(self, backend: str, device: torch.device | None = None) -> None:
        """One that dies in this very moment is waited for in vain, and nothing but gloo's own timeout ends that.

        The ranks find each other's addresses under a number that torch gives the group: how many this process has begun
        since it last ended one. Who could not connect would count on, and never again find others, whose number is 0.
        """
        dist.distributed_c10d._world.group_count = 0
        dist.init_process_group(
            backend,
            store=self._store,
            rank=self.rank,
            world_size=self.world_size,
            timeout=self.connecting,
            device_id=device,
        )
        if self.connecting != TIMEOUT:
            # the first is the name that torch 2.15 wants, the other all that those before it have
            set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
            set_timeout(TIMEOUT)

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

    def let_go(self) -> None:
        """From another thread: have the collective that this rank waits in fail, since another will never come to it.

        A process that died has closed its connections; one whose machine or network is gone has not, and gloo has no
        way to give up. So the connections are shut here, of which `_lines` are second handles.
        """
        for line in self._lines if self.waiting else ():
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        "See Comm."
        self._started.clear()  # each holds the connections open, and the others would wait for this rank
        for line in self._lines:
            line.close()
        if dist.is_initialized():
            self._end()

    def _end(self) -> None:
        dist.destroy_process_group()

    def _wait(self, collective: Callable[[], Any]) -> None:
        started, self.waiting = time.perf_counter(), True
        try:
            collective()
        except OWN_TROUBLE:
            raise
        except (RuntimeError, ValueError) as error:
            raise PeerLost(f"rank {self.rank} lost touch with the others: {error}") from error
        finally:
            self.seconds, self.waiting = self.seconds + time.perf_counter() - started, False


class NcclGroup(Group):
    """Many ranks over NCCL, a GPU each: as Group, though NCCL knows no failure.

    A sum of NCCL's is done by the GPUs, when the ranks' processes are long further on. If a rank dies, the others' GPUs
    wait for it without an end, until they are made to abort. But an aborted sum returns as if all were well, with part
    of what it should be, and leads those of other ranks to do the same. So whoever aborts has said so in the store
    before, and whoever has waited for a sum looks there behind it: if nobody had given up by then, the sum is whole.
    """

    connecting = TIMEOUT  # which is that of its sums too
    _ranks: dist.ProcessGroup | None = None  # torch's object of this group: a later one is no business of ours
    _aborting: Thread | None = None

    def __init__(self, rank: int, world_size: int, meeting: Meeting, backend: str = "nccl") -> None:
        for name, value in ON_ERRORS.items():
            os.environ.setdefault(name, value)
        super().__init__(rank, world_size, meeting, backend)
        self._one_by_one = Lock()  # to let go, which the pulse does, and to leave, which is for who computes
        self.waiting, self._ranks = False, dist.group.WORLD

    def _address(self) -> str | None:
        "Not to be tried: NCCL has networks of its own."
        return None

    def _connect(self, backend: str, device: torch.device | None = None) -> None:
        """At once, while all are there, for which torch wants to know the GPU.

        Else it would be in the first sum; if a rank never came to that, the others could not be made to abort. Nor can
        they while they wait for rank 0's address, which it leaves in the store.
        """
        self._store.set_timeout(timedelta(seconds=NCCL_ADDRESS))
        super()._connect(backend, torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else None)
        self._store.set_timeout(TIMEOUT)

    def finish(self) -> None:
        "See Comm. The time that counts is what the GPU has waited, its own work done, not the process for both."
        begun, done = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        before = self.seconds
        begun.record()
        super().finish()
        done.record()
        self.waiting = True
        done.synchronize()  # an error of the GPU's own comes out here, and is no peer's
        self._wait(self._refuse_parts)
        self.seconds, self.waiting = before + begun.elapsed_time(done) / 1000, False

    def _refuse_parts(self) -> None:
        if self._store.check([CALLED_OFF]):
            raise RuntimeError("the group is called off")

    def _wait(self, collective: Callable[[], Any]) -> None:
        super()._wait(collective)
        self.waiting = True  # till `finish`: a process that is ahead of its GPU may be held up anywhere

    def let_go(self) -> None:
        "See Group; also where this rank seems to wait for nothing but its GPU. In a thread, since it takes its time."
        with self._one_by_one:
            if self._aborting is None and (ranks := self._ranks) is not None:
                self._aborting = Thread(target=ranks.abort, name="abort", daemon=True)
                self._aborting.start()

    def _end(self) -> None:
        with suppress(RuntimeError):  # without a driver, nobody will go on
            self._store.set(CALLED_OFF, "1")
        with suppress(PeerLost, *OWN_TROUBLE):
            super()._wait(self._abort_all)

    def _abort_all(self) -> None:
        with self._one_by_one:
            self._ranks = None
        if self._aborting is not None:
            self._aborting.join()
        dist.distributed_c10d._abort_process_group()  # torch's other end would wait for sums that never come


GROUPS: dict[str, type[Group]] = {"gloo": Group, "nccl": NcclGroup}
