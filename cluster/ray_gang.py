"RayGang: one Ray actor a worker, placed, ranked, watched and stopped."

from __future__ import annotations

import math
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cluster.comms import Group, Meeting, Store
from cluster.gang import Failure, Seat, WorkersFailed, pipelined
from cluster.ray_cluster import JoinedCluster, OwnCluster, in_bundle, node_address, require
from cluster.worker import Chunk, Job, Report, Worker
from learner.errors import UserError

GRACE = 2.0  # seconds in which other ranks may still tell the root cause, once one has failed
PLACEMENT_TIMEOUT = 60.0


@dataclass(frozen=True)
class Workers:
    "How many workers to start and on what: `gpus_each` is below 1 where they share cards, 0 for CPU workers."

    count: int
    gpus_each: float
    backend: str
    address: str | None = None


class WorkerProcess:
    "The plain class that Ray makes an actor of: a Worker in a process of its own, whose errors become Failures."

    def __init__(self) -> None:
        self.rank = -1
        self.worker: Worker | None = None

    def where(self) -> tuple[str, int, str]:
        "Host name, process number, and the address that tells this node from the others."
        return socket.gethostname(), os.getpid(), node_address()

    def start(self, seat: Seat, job: Job, meeting: Meeting, workers: Workers, log_folder: str) -> Failure | None:
        "Take the seat: log file, environment as torchrun sets it, threads, process group, Worker."
        self.rank = seat.rank
        try:
            if self.worker is not None:
                self.worker.close()
            redirect_output(seat.log_file(Path(log_folder)))
            os.environ |= {**seat.environment(), "MASTER_ADDR": meeting.host, "MASTER_PORT": f"{meeting.port}"}
            torch.set_num_threads(seat.threads)
            device = torch.device("cpu")
            if workers.gpus_each:  # Ray shows each worker its own GPU alone
                device = torch.device("cuda", 0)
                torch.cuda.set_device(device)
            comm = Group(seat.rank, seat.world_size, meeting, workers.backend)
            self.worker = Worker(job, comm, device, seat.threads)
            print(f"{seat} on {device}", flush=True)
            return None
        except Exception as error:
            return Failure.of(self.rank, error)

    def call(self, method: str, *args: Any) -> Any:
        "Call the Worker; on an error leave the group at once, so that no other rank waits for this one."
        assert self.worker is not None
        try:
            return getattr(self.worker, method)(*args)
        except Exception as error:
            failure = Failure.of(self.rank, error)
            print(failure.trace, file=sys.stderr, flush=True)
            self.worker.comm.close()
            return failure


def redirect_output(log: Path) -> None:
    "Send all that this process prints, C++ libraries included, to a file."
    log.parent.mkdir(parents=True, exist_ok=True)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    for stream in (1, 2):
        os.dup2(target, stream)
    os.close(target)


class RayGang:
    "Workers as Ray actors: see Gang. Raises UserError or WorkersFailed where they can't be had."

    def __init__(self, job: Job, workers: Workers, log_folder: Path) -> None:
        self.all_actors: list[Any] = []
        self.workers, self.log_folder, self.generation = workers, os.path.abspath(log_folder), 0
        self.places: list[tuple[str, int, str]] = []
        gpus = math.ceil(workers.count * workers.gpus_each)
        self.cluster = JoinedCluster(workers.address) if workers.address else OwnCluster(workers.count, gpus)
        self.ray = self.cluster.ray
        try:
            self.store = Store(self.cluster.host)
            self._place()
            self.start(job, workers.count)
        except BaseException:
            self.close()
            raise

    def _place(self) -> None:
        "One actor a bundle of a placement group, so that all start or none; ordered by node."
        workers = self.workers
        bundle = {"CPU": 1.0} | ({"GPU": workers.gpus_each} if workers.gpus_each else {})
        require(self.ray, {name: amount * workers.count for name, amount in bundle.items()}, workers.address)
        group = self.ray.util.placement_group([bundle] * workers.count, strategy="PACK")
        if not group.wait(PLACEMENT_TIMEOUT):
            raise UserError(
                f"{workers.count} workers with {bundle} each found no place within {PLACEMENT_TIMEOUT:g} s; "
                "is the cluster busy? Ask for fewer, or wait"
            )
        actor = self.ray.remote(max_restarts=0, max_task_retries=0)(WorkerProcess)
        for number in range(workers.count):
            options = {"num_cpus": 1, "num_gpus": workers.gpus_each, "scheduling_strategy": in_bundle(group, number)}
            self.all_actors.append(actor.options(**options).remote())
        self.places = [("unknown", 0, "")] * workers.count
        places = self._gather([a.where.remote() for a in self.all_actors])
        order = sorted(range(workers.count), key=lambda number: (places[number][2], number))
        self.all_actors = [self.all_actors[number] for number in order]
        self.places = [places[number] for number in order]

    def start(self, job: Job, world_size: int) -> None:
        "Form a group of the first `world_size` processes, and give it a job; what they did before is forgotten."
        self.world_size, self.generation = world_size, self.generation + 1
        self.actors = self.all_actors[:world_size]
        meeting = replace(self.store.meeting, group=f"{self.generation}")
        nodes = [node for _, _, node in self.places[:world_size]]
        shared = self.ray.put(job)
        refs = []
        for rank, actor in enumerate(self.actors):
            local_rank = nodes[:rank].count(nodes[rank])
            seat = Seat(rank, world_size, local_rank, nodes.count(nodes[rank]))
            refs.append(actor.start.remote(seat, shared, meeting, self.workers, self.log_folder))
        self._gather(refs)

    def stream(self, chunks: Iterable[Chunk]) -> Iterator[list[Report]]:
        "See Gang."
        return pipelined(lambda chunk: self._send("run", chunk), self._gather, chunks)

    def call(self, method: str, *args: Any) -> list[Any]:
        "See Gang."
        return self._gather(self._send(method, *args))

    def call_first(self, method: str, *args: Any) -> Any:
        "See Gang."
        return self._gather([self.actors[0].call.remote(method, *args)])[0]

    def _send(self, method: str, *args: Any) -> list[Any]:
        return [actor.call.remote(method, *args) for actor in self.actors]

    def _gather(self, refs: list[Any]) -> list[Any]:
        "The results by rank; once one rank has failed, the others get `GRACE` seconds to say why."
        ranks = {ref: rank for rank, ref in enumerate(refs)}
        results: list[Any] = [None] * len(refs)
        failures: list[Failure] = []
        deadline: float | None = None
        while ranks and (deadline is None or time.monotonic() < deadline):
            timeout = None if deadline is None else deadline - time.monotonic()
            done, _ = self.ray.wait(list(ranks), num_returns=1, timeout=timeout)
            for ref in done:
                rank = ranks.pop(ref)
                results[rank] = self._get(rank, ref)
                if isinstance(results[rank], Failure):
                    failures.append(results[rank])
                    deadline = deadline or time.monotonic() + GRACE
        if failures:
            raise WorkersFailed(failures)
        return results

    def _get(self, rank: int, ref: Any) -> Any:
        try:
            return self.ray.get(ref)
        except self.ray.exceptions.RayError as error:
            host, pid, _ = self.places[rank]
            text = str(error).strip().splitlines()
            return Failure(rank, host, pid, "died", f"the worker's process died: {text[0] if text else error!r}")

    def close(self) -> None:
        "See Gang."
        for actor in self.all_actors:
            self.ray.kill(actor)
        self.cluster.close()
