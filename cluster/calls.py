"Calls: what is asked of the ranks of a RayGang, and how each comes to an answer, be its process hung or gone."

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cluster.crew import Crew
from cluster.faults import Failure, deadlocked, hang_limit, hung
from cluster.meeting import KeyStore
from cluster.messages import Report
from cluster.pulse import PERIOD, Watch
from learner.errors import UserError

GRACE = 5.0  # seconds in which a rank that waits for one that failed is freed by that
STOPPING = 10.0  # seconds that a rank may stand still once the run is to stop, if not so long else
RECENT = 50  # chunks from which it is learnt how long steps last
NO_ROOM = "the model's state can't be sent: there is no room for it, in Ray's shared memory or on the disk of TMPDIR"

Asked = dict[int, Any]  # by rank, Ray's reference to the answer


class Calls:
    "Asks the seats of a crew, and waits for the answers, in which it watches those who owe one. `group` is theirs."

    def __init__(self, crew: Crew, store: KeyStore) -> None:
        self.crew, self.store, self.ray, self.group = crew, store, crew.ray, ""
        self.full = (self.ray.exceptions.OutOfDiskError, self.ray.exceptions.ObjectStoreFullError)
        self.watch = Watch(store)
        self.steps = defaultdict[int, deque[float]](lambda: deque(maxlen=RECENT))  # by world size, how long they last

    def ask(self, method: str, *args: Any, ranks: Iterable[int] | None = None) -> Asked:
        "Have these ranks, or all, call a method of their Worker."
        chosen = range(len(self.crew.seated)) if ranks is None else ranks
        return {rank: self.crew.seated[rank].actor.call.remote(method, *args) for rank in chosen}

    def put(self, value: Any) -> Any:
        "A reference to the value, for several ranks; UserError where there is no room for it."
        try:
            return self.ray.put(value)
        except self.full as error:
            raise UserError(NO_ROOM) from error

    def answers(self, asked: Asked, hang_after: float) -> dict[int, Any]:
        """By rank, what each has to say, be it a Failure; ranks that hang are ended, so that all do answer.

        They may stand still for as long as `faults.hang_limit` says.
        """
        pending, results, off = {ref: rank for rank, ref in asked.items()}, dict[int, Any](), False
        self._expect(pending.values())
        while pending:
            done, _ = self.ray.wait(list(pending), num_returns=1, timeout=PERIOD)
            for ref in done or [ref for ref, rank in pending.items() if self.crew.seated[rank].ended]:
                rank = pending.pop(ref)
                results[rank] = result = self.result(rank, ref)
                off = off or (isinstance(result, Failure) and self._call_off(pending.values()))
            if not done:
                off = self._end_hung(pending.values(), off, hang_after)
        return dict(sorted(results.items()))

    def learn(self, reports: Sequence[Report]) -> None:
        "How long steps last, with so many workers."
        self.steps[len(self.crew.seated)].append(max(report.step_seconds for report in reports))

    def result(self, rank: int, ref: Any) -> Any:
        "What a rank has answered, which is a Failure if its process is gone, was ended, or could not give it back."
        errors, member = self.ray.exceptions, self.crew.seated[rank]
        host, pid = member.location.host, member.location.pid
        if member.ended:  # Ray would wait for the machine that has the answer, which may be cut off
            return Failure(rank, host, pid, "hung", member.ended)
        try:
            return self.ray.get(ref)
        except errors.RayTaskError as error:
            if isinstance(error.cause, self.full):
                return Failure(rank, host, pid, "user", NO_ROOM)
            lost = isinstance(error.cause, errors.ObjectLostError)  # what it was given went with another's machine
            return Failure(rank, host, pid, "peer" if lost else "error", f"{error.cause!r}", str(error))
        except errors.RayError as error:
            kind = "preempted" if getattr(error, "preempted", False) else "died"
            first = [*str(error).strip().splitlines(), ""][0].rstrip(".")
            return Failure(rank, host, pid, kind, f"the worker's process died: {first}")

    def _expect(self, ranks: Iterable[int]) -> None:
        self.watch.expect(self.crew.seated[rank].name for rank in ranks)

    def _call_off(self, ranks: Iterable[int]) -> bool:
        "Free those that wait for each other in the group; from now on, who still waits counts as deserted."
        self.store.call_off(self.group)
        self._expect(ranks)
        return True

    def _end_hung(self, ranks: Iterable[int], off: bool, hang_after: float) -> bool:
        "End the ranks that will never answer; whether the group is called off by now, which may be all that it takes."
        seated = self.crew.seated
        lives = {rank: self.watch.look(seated[rank].name) for rank in ranks if not seated[rank].ended}
        limit = hang_limit(self.steps[len(seated)], min(hang_after, STOPPING) if self.crew.stop() else hang_after)
        away = [rank for rank in lives if seated[rank].location.node != self.crew.meeting.host]
        if lives and not off and deadlocked(lives, limit):
            return self._call_off(lives)
        for rank, wrong in hung(lives, limit, GRACE if off else None, away).items():
            self.watch.ask_for_stacks(seated[rank].name)
            time.sleep(2 * PERIOD)
            self.crew.end(seated[rank], wrong)
        return off


def failed(results: Mapping[int, Any]) -> list[Failure]:
    "The failures among what ranks have answered."
    return [result for result in results.values() if isinstance(result, Failure)]
