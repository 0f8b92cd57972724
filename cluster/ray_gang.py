"RayGang: one Ray actor a worker, ranked, watched, and replaced when it fails: the others hold all that it held."

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.calls import Asked, Calls, failed
from cluster.checkpoint import spoiled
from cluster.crew import Crew, Member, Workers
from cluster.faults import (
    Failure,
    Incident,
    NoneLeft,
    Tolerance,
    WorkersFailed,
    agree,
    holders,
    unfit,
    verdict,
)
from cluster.gang import Seat
from cluster.meeting import KeyStore
from cluster.messages import Chunk, Job, Report
from cluster.ray_cluster import JoinedCluster, OwnCluster
from cluster.signals import uninterrupted
from cluster.worker_process import Location

IN_FLIGHT = 2  # chunks: while the driver reads one report, every worker is busy with the next chunk
SALVAGE = 60.0  # seconds for the state of a survivor to come over, when all else has failed


class RayGang:
    """Workers as Ray actors: see Gang. Raises UserError or WorkersFailed where they can't be had.

    A failed rank is replaced in the midst of `stream` and `call`, as far as `tolerance` goes, and `notice` is told.
    `done` is told each part of the start when it is over: "Ray", "workers", "process group and model".
    """

    def __init__(
        self,
        job: Job,
        workers: Workers,
        log_folder: Path,
        tolerance: Tolerance | None = None,
        notice: Callable[[str], object] = print,
        done: Callable[[str], object] = lambda part: None,
    ) -> None:
        self.tolerance, self.notice, self.done = tolerance or Tolerance(), notice, done
        self.log_folder, self.generation = os.path.abspath(log_folder), 0
        self.incidents: list[Incident] = []
        self.vain: list[Incident] = []  # those of ranks that only joined: they count for others who join
        self.newest: set[Member] = set()
        processes = workers.count + self.tolerance.spares
        gpus = math.ceil(processes * workers.gpus_each)
        self.cluster = JoinedCluster(workers.address) if workers.address else OwnCluster(processes, gpus)
        self.ray = self.cluster.ray
        done("Ray")
        try:
            self.store = KeyStore(self.cluster.host)
            self.crew = Crew(self.ray, workers, self.tolerance.spares, self.store.meeting, self.log_folder)
            self.calls = Calls(self.crew, self.store)
            self.start(job, workers.count)
        except BaseException:
            self.close()
            raise

    @property
    def seated(self) -> list[Member]:
        "The workers, by rank."
        return self.crew.seated

    @property
    def world_size(self) -> int:
        "How many workers have a seat."
        return len(self.seated)

    @property
    def locations(self) -> list[Location]:
        "Where the workers are, by rank."
        return [member.location for member in self.seated]

    def start(self, job: Job, world_size: int) -> None:
        "Seat that many processes, or at least as many as will do, and give them a job; what they did is forgotten."
        self.job, self.wanted = self.ray.put(job), world_size
        self.skips_bad_images = job.skip_bad_images
        self.incidents, self.vain, self.newest = [], [], set()
        self.calls.steps.clear()
        self.crew.seat(world_size, self.tolerance.wait)
        self.done("workers")
        while failures := self._regroup():  # nobody holds a state yet: all can begin anew
            told = "; ".join(self._make_up_for(failures))
            self.notice(f"{told}. {self.world_size} workers begin the job anew")
        self.done("process group and model")

    def stream(self, chunks: Iterable[Chunk]) -> Iterator[list[Report]]:
        "See Gang."
        todo, again, sent = iter(chunks), deque[Chunk](), deque[tuple[Chunk, Asked]]()
        try:
            while True:
                while len(sent) < IN_FLIGHT and (chunk := again.popleft() if again else next(todo, None)):
                    sent.append((chunk, self.calls.ask("run", chunk)))
                if not sent:
                    return
                chunk, asked = sent.popleft()
                results = self._answers(asked)
                if failures := failed(results):
                    under_way = [(chunk, results), *((chunk, self._answers(asked)) for chunk, asked in sent)]
                    failures = [failure for _, results in under_way for failure in failed(results)]
                    sent.clear()
                    found = agree([(chunk, list(results.values())) for chunk, results in under_way])
                    self.newest = set()  # no state is where the driver is, until that knows of all that is done
                    yield from (self._whole(reports, lost) for reports, lost in found.done)
                    self._repair(failures, found.lead)
                    again.extendleft(reversed(found.rest))
                else:
                    self.calls.learn(list(results.values()))
                    yield list(results.values())
        except GeneratorExit:
            for _, asked in sent:
                self._answers(asked)
            raise

    def call(self, method: str, *args: Any) -> list[Any]:
        "See Gang."
        shared = [self.calls.put(arg) if isinstance(arg, dict) else arg for arg in args]
        return list(self._insist(lambda: self.calls.ask(method, *shared)).values())

    def call_first(self, method: str, *args: Any) -> Any:
        "See Gang."
        return self._insist(lambda: self.calls.ask(method, *args, ranks=[0]))[0]

    def grow(self) -> None:
        "See Gang: seat workers that have come up since there were too few, as many as there are."
        while self.world_size < self.wanted and (member := self.crew.take(0.0)):
            before, self.newest = self.world_size, set(self.seated)
            self.seated.append(member)
            if failures := self._regroup():
                self._repair(failures, [rank for rank, one in enumerate(self.seated) if one in self.newest])
            if self.world_size > before:
                self.notice(f"a worker has joined: {self.world_size} of {self.wanted} go on")

    def heed(self, stop: Callable[[], bool]) -> None:
        "See Gang."
        self.crew.stop = stop

    def salvage(self) -> dict[str, Any] | None:
        "See Gang: the newest state that a survivor holds, once the gang has failed; None if there is none."
        for member in self.newest & set(self.seated):
            try:
                snapshot = self.ray.get(member.actor.call.remote("snapshot"), timeout=SALVAGE)
            except self.ray.exceptions.RayError:
                continue
            if isinstance(snapshot, dict) and not spoiled(snapshot):
                return snapshot
        return None

    def close(self) -> None:
        "See Gang."
        with uninterrupted():
            if hasattr(self, "crew"):
                self.crew.close()
            self.cluster.close()

    def _answers(self, asked: Asked) -> dict[int, Any]:
        return self.calls.answers(asked, self.tolerance.hang_after)

    def _insist(self, ask: Callable[[], Asked]) -> dict[int, Any]:
        "Ask, and where ranks fail have them replaced and ask again."
        while failures := failed(results := self._answers(ask())):
            self._repair(failures, holders([[results.get(rank) for rank in range(self.world_size)]]))
        return results

    def _whole(self, reports: list[Report], lost: list[int]) -> list[Report]:
        "The reports of what is done, with the unreadable images that ranks which are gone could not name any more."
        if not self.skips_bad_images or not lost:
            return reports
        first = reports[0]
        found = [bad for rank in lost for bad in self._unreadable([one.rank for one in reports], first.chunk, rank)]
        return [replace(first, bad_images=first.bad_images + found), *reports[1:]]

    def _unreadable(self, witnesses: Sequence[int], chunk: Chunk, lost: int) -> list[tuple[str, str]]:
        "What the rank that is lost has left out of a chunk, as the first of the witnesses that lives finds it."
        failures = list[Failure]()
        for rank in witnesses:
            answers = self._answers(self.calls.ask("unreadable", chunk, lost, self.world_size, ranks=[rank]))
            if not failed(answers):
                return answers[rank]
            failures += failed(answers)
        raise NoneLeft(failures)  # the newest state went with them

    def _repair(self, failures: Sequence[Failure], lead: Sequence[int]) -> None:
        """Replace the ranks that failed, or do without, and form a group of all that agrees on the newest state.

        The ranks in `lead` hold it. Raises WorkersFailed where the tolerance is at its end, NoneLeft without a lead.
        """
        began = time.monotonic()
        self.newest = {self.seated[rank] for rank in lead}
        told, step = list[str](), -1
        while failures:
            step = max(step, *(failure.step for failure in failures))
            told += self._make_up_for(failures, holding=True)
            failures = self._regroup()
        self.notice(
            f"{'; '.join(told)}. {self.world_size} workers go on with the next step, "
            f"{time.monotonic() - began:.2f} s later" + (f" (after step {step})" if step >= 0 else "")
        )

    def _make_up_for(self, failures: Sequence[Failure], holding: bool = False) -> list[str]:
        """Replace the ranks that failed, or do without, as far as the tolerance goes; what is to be said of them.

        Where there is a state that ranks are `holding`, one of them must be left.
        """
        culprits = list({f.rank: f for f in reversed(failures) if f.kind != "peer"}.values()) or [failures[0]]
        joining = [rank for rank, member in enumerate(self.seated) if not member.at_work]
        fewest = self.tolerance.min_workers if holding else self.crew.workers.at_least or self.wanted
        before = [*self.incidents, *self.vain]
        empty = unfit(culprits, before, self.tolerance, joining, self.world_size - fewest, self.incidents)
        others = [failure for failure in culprits if failure.rank not in empty]
        at_work = [failure for failure in others if failure.rank not in joining]
        reason = verdict(others, self.incidents if others == at_work else before, self.tolerance)
        (self.incidents if at_work or not holding else self.vain).append(culprits)
        if reason is not None:
            raise WorkersFailed(failures, reason)
        gone = {self.seated[failure.rank] for failure in culprits if failure.kind != "peer"}
        if holding and not self.newest - gone:
            raise NoneLeft(failures)  # but `salvage` asks them
        self.newest -= gone
        for rank in empty:
            self.seated[rank].unfit = True
        self._replace(gone, failures)
        return [f"{failure}".splitlines()[0] for failure in culprits]

    def _replace(self, gone: set[Member], failures: Sequence[Failure]) -> None:
        "Seat others for those that are gone, as far as there are any; WorkersFailed where too few are left, or a stop."
        self.crew.replace(gone, self.tolerance.wait)
        if self.crew.stop():
            raise WorkersFailed(failures, "it was not replaced, since the run is to stop")
        if self.world_size < self.tolerance.min_workers:
            raise WorkersFailed(failures, f"{self.world_size} workers are fewer than --min-workers allows")

    def _regroup(self) -> list[Failure]:
        "Form a group of all that are seated, and have all take over the newest state; what went wrong."
        self.generation += 1
        self.calls.group = f"{self.generation}"
        meeting = replace(self.store.meeting, group=self.calls.group)
        nodes = [member.location.node for member in self.seated]
        asked = {}
        for rank, member in enumerate(self.seated):
            node = nodes[rank]
            seat = Seat(rank, self.world_size, nodes[:rank].count(node), nodes.count(node))
            if member.at_work:
                asked[rank] = member.actor.rejoin.remote(seat, meeting)
            else:
                asked[rank] = member.actor.start.remote(seat, self.job, meeting, bool(self.newest))
        if failures := failed(self._answers(asked)):
            return failures
        return self._hand_over()

    def _hand_over(self) -> list[Failure]:
        "Give the newest state to those that lack it; what went wrong."
        lacking = [rank for rank, member in enumerate(self.seated) if self.newest and member not in self.newest]
        if lacking:
            source = next(rank for rank, member in enumerate(self.seated) if member in self.newest)
            snapshot = self.calls.ask("snapshot", ranks=[source])
            answers = self._answers(snapshot)
            if failures := failed(answers):
                return failures
            state = snapshot[source]
            if self.seated[source].location.node != self.store.meeting.host:  # which may be cut off before they have it
                state = self.calls.put(answers[source])
            if failures := failed(self._answers(self.calls.ask("load", state, ranks=lacking))):
                return failures
        for member in self.seated:
            member.at_work = True
        self.newest = set(self.seated)
        return []
