"Faults: what can go wrong in a rank, and from what was seen to what is to be done, as pure decisions."

from __future__ import annotations

import socket
import traceback
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import getpid

from cluster.comms import PeerLost, Unreachable
from cluster.messages import Chunk, Report
from cluster.pulse import Life
from learner.errors import UserError, lacks_memory

PATIENCE = 10.0  # a rank that says nothing for so long is gone: its pulse comes five times a second
ABSENCE = 1.7  # ... on another machine: it is down, or can't be reached, and no connection says so; known within 2
JUST_NOW = 0.5  # a rank that has spoken so lately is there
STARTING = 60.0  # what a rank may need more to begin: it imports, builds its model, meets the others
COMPILING = 600.0  # ... and to make code for a kind of batch that it meets for the first time
FACTOR = 10.0  # how many of the slowest of late one step may last before it counts as a hang
FIRST = 5.0  # how many times as long as else the first steps may last, of which none is known yet, and all is cold
TOO_LARGE = "free some, or begin anew with a lower --size or --batch-size (--resume keeps both)"


@dataclass(frozen=True)
class Tolerance:
    """What a run puts up with: so many faults of each kind, and no fewer workers than these.

    `spares` workers wait at the ready; for another replacement a run waits `wait` seconds. A rank that makes no
    progress for `hang_after` seconds, or for longer if its steps are known to last, is ended and replaced.
    """

    max_restarts: int = 10
    min_workers: int = 1
    spares: int = 0
    wait: float = 60.0
    hang_after: float = 60.0


@dataclass(frozen=True)
class Failure:
    """What went wrong in one rank, as text, since exceptions do not travel well.

    `kind` is user (a UserError: its message says all), nan (a NotFinite), memory (a GPU or a process had too little),
    error (any other exception: `trace` says where), died (the process is gone), preempted (its machine was taken back),
    hung (it had to be ended), unreachable (from other ranks' machines), or peer (a consequence of another rank's
    failure). `report` is what it had done before of what it was told to do last, and `whole` says that the rank still
    holds what that came to, if its process can be asked for it.
    """

    rank: int
    host: str
    pid: int
    kind: str
    message: str
    trace: str = ""
    step: int = -1
    report: Report | None = None
    whole: bool = False

    @classmethod
    def of(
        cls, rank: int, error: BaseException, step: int = -1, report: Report | None = None, whole: bool = False
    ) -> Failure:
        "The failure of this process."
        kind = next((name for of, name in KINDS.items() if isinstance(error, of)), "error")
        kind = "memory" if lacks_memory(error) else kind
        message = str(error) if kind in ("nan", "user") else f"{type(error).__name__}: {error}"
        return cls(rank, socket.gethostname(), getpid(), kind, message, traceback.format_exc(), step, report, whole)

    def __str__(self) -> str:
        where = f"rank {self.rank} (host {self.host}, pid {self.pid})"
        return f"{where}: {self.message}" + (f"\n{self.trace.rstrip()}" if self.kind == "error" else "")


class WorkersFailed(UserError):
    """One or more workers failed, and the run can't go on: `reason` says why, if not by itself.

    The root cause comes first; ranks that only lost touch with it are counted.
    """

    def __init__(self, failures: Iterable[Failure], reason: str = "") -> None:
        gravity = ["nan", "user", "memory", "error", "died", "preempted", "hung", "unreachable", "peer"]
        worst = sorted(failures, key=lambda failure: (gravity.index(failure.kind), failure.rank))
        self.failures: list[Failure] = []  # of each rank its worst
        for failure in worst:
            if all(failure.rank != other.rank for other in self.failures):
                self.failures.append(failure)
        causes = [failure for failure in self.failures if failure.kind != "peer"] or self.failures[:1]
        others = len(self.failures) - len(causes)
        lost = f"\n({others} more lost touch with a failed worker)" if others else ""
        why = f"\n{reason}" if reason else ""
        super().__init__("a worker failed: " + "\n".join(map(str, causes)) + lost + why)


class NotFinite(UserError):
    "A loss or a gradient is no finite number."


KINDS: dict[type[BaseException], str] = {  # of failures, by exception
    NotFinite: "nan",
    UserError: "user",
    PeerLost: "peer",
    Unreachable: "unreachable",
}


class NoneLeft(WorkersFailed):
    "No worker is left that holds the run's state: the newest checkpoint is all there is."


def not_finite(error: BaseException) -> bool:
    "Whether numbers that are not finite are what ended a run."
    return isinstance(error, NotFinite) or any(one.kind == "nan" for one in getattr(error, "failures", ()))


def hang_limit(steps: Collection[float], hang_after: float) -> float:
    "The seconds that a rank may stand still, where steps have lasted so long of late; none are known at first."
    return max(hang_after, FACTOR * max(steps)) if steps else FIRST * hang_after


def hung(
    lives: Mapping[int, Life], limit: float, deserted: float | None = None, away: Collection[int] = ()
) -> dict[int, str]:
    """Which of the ranks that are being waited for must be ended, and what is wrong with them.

    A silent rank is gone, one that is `away` on another machine sooner. One that stands still beyond `limit` seconds is
    stuck, unless it waits for another. Once the group is called off, those that wait in a collective for more than
    `deserted` seconds were not freed by it and never will be.
    """
    silent = {
        rank: f"gave no sign of life for {life.silent:.1f} s"
        for rank, life in lives.items()
        if life.silent > min(ABSENCE if rank in away else PATIENCE, limit)
    }
    if silent:
        return silent
    waiting = {rank for rank, life in lives.items() if life.sign.doing == "communication"}
    stuck = {
        rank: life
        for rank, life in lives.items()
        if life.still > limit + {"starting": STARTING, "compiling": COMPILING}.get(life.sign.doing, 0)
    }
    if guilty := stuck.keys() - waiting:
        return {rank: f"stands still for {stuck[rank].still:.1f} s, {doing(stuck[rank])}" for rank in sorted(guilty)}
    late = [rank for rank in sorted(waiting) if deserted is not None and lives[rank].still > deserted]
    return dict.fromkeys(late, "still waits for others, though its group was called off")


def deadlocked(lives: Mapping[int, Life], limit: float) -> bool:
    """Whether all that are being waited for wait for each other, beyond `limit` seconds.

    Nobody can tell who is to blame, but the group can be called off: that frees those that do wait. A rank that has not
    spoken just now may be the one: `hung` will tell.
    """
    return all(
        life.sign.doing == "communication" and life.still > limit and life.silent < JUST_NOW for life in lives.values()
    )


def doing(life: Life) -> str:
    "What a rank is at, in words."
    at = {"data": "reading data", "computing": "computing", "starting": "starting"}
    return f"{at.get(life.sign.doing, life.sign.doing)} at step {life.sign.step}"


Incident = Sequence[Failure]  # what failed at once, and is made up for at once: a worker, or a machine with all of its


def verdict(incident: Incident, before: Sequence[Incident], tolerance: Tolerance) -> str | None:
    "Why a run must end at this incident, in words that may be empty; None if it can go on. `before` are older ones."
    if any(failure.kind in ("user", "nan") for failure in incident):
        return ""
    errors = {(old.message, old.step) for one in before for old in one if old.kind == "error"}
    for failure in incident:
        if failure.kind == "error" and (failure.message, failure.step) in errors:
            when = f"at step {failure.step}" if failure.step >= 0 else "at the start"
            return f"the same error came {when} before, in another process: this is a bug"
    lacking = [failure.step for failure in incident if failure.kind == "memory"]
    lacked = [old.step for one in before for old in one if old.kind == "memory"]
    if len(lacking) > 1 or {*lacking} & {*lacked}:
        return f"no other process has more memory: {TOO_LARGE}"
    for kind in kinds(incident):
        count = 1 + sum(kind in kinds(one) for one in before)
        if count > tolerance.max_restarts:
            told = f"{count} faults of the kind {kind!r} are more than --max-restarts {tolerance.max_restarts} allows"
            return told + ("; dmesg says whether the system ended them for want of memory" if kind == "died" else "")
    return None


def unfit(
    incident: Incident,
    before: Sequence[Incident],
    tolerance: Tolerance,
    joining: Collection[int],
    surplus: int,
    at_work: Sequence[Incident] | None = None,
) -> set[int]:
    """The ranks of an incident whose places stay empty, as if no replacement were to be had.

    They were only `joining`, and could not begin, at which the run must not end: if it has a `surplus` of so many
    ranks, and would go on without them. None as long as a fault is put up with: another process may take the place,
    but where a network is cut that would be no better off. Of the older ones, those `at_work` count for the others.
    """
    found = {failure.rank for failure in incident if failure.rank in joining and failure.kind != "peer"}
    others = [failure for failure in incident if failure.rank not in found]
    hopeless = any(failure.kind == "unreachable" for failure in incident if failure.rank in found)
    needless = verdict(incident, before, tolerance) is not None or hopeless
    fine = verdict(others, before if at_work is None else at_work, tolerance) is None
    return found if needless and fine and len(found) <= surplus else set()


def kinds(incident: Incident) -> list[str]:
    "The kinds of an incident's failures; those of peers only where nothing else explains them."
    found = sorted({failure.kind for failure in incident})
    return [kind for kind in found if kind != "peer"] or found


@dataclass(frozen=True)
class Agreement:
    """Where the survivors of a failure stand, in what they were told to do.

    `done` has, for each chunk or part of one that is done, its reports, and the ranks whose reports are lost;
    `rest` is what is still to do. The ranks in `lead` hold the newest state.
    """

    done: list[tuple[list[Report], list[int]]] = field(default_factory=list)
    rest: list[Chunk] = field(default_factory=list)
    lead: list[int] = field(default_factory=list)


Results = Sequence[Report | Failure]


def holders(asked: Sequence[Sequence[object]]) -> list[int]:
    """The ranks that hold the run's state, from each rank's answer to all that was asked of them.

    Those that live on; where none does, those that failed outside of an update: what they hold can be saved.
    """
    ranks = range(len(asked[0]))
    living = [rank for rank in ranks if all(_lives(answers[rank]) for answers in asked)]
    return living or [rank for rank in ranks if all(_lives(one[rank]) or _is_whole(one[rank]) for one in asked)]


def agree(sent: Sequence[tuple[Chunk, Results]]) -> Agreement:
    """From the chunks that were under way and each rank's answer, find the last step that a survivor has completed.

    A step that one survivor has completed has happened: its gradients came from all. A validation changes nothing,
    so that a chunk of it which any rank has failed to report is simply repeated.
    """
    ranks = range(len(sent[0][1]))
    steps = {rank: sum(_steps(results[rank]) for _, results in sent) for rank in ranks}
    alive = holders([results for _, results in sent])
    furthest = max((steps[rank] for rank in alive), default=0)
    found, left = Agreement(lead=[rank for rank in alive if steps[rank] == furthest]), furthest
    for chunk, results in sent:
        whole = all(isinstance(result, Report) for result in results)
        n = min(left, len(chunk.hypers)) if chunk.train else len(chunk.hypers) * (whole and not found.rest)
        reports = [report for report in map(_report, results) if report and len(report.chunk.hypers) == n]
        left -= n
        if n:
            told = {report.rank for report in reports}
            found.done.append((reports, [rank for rank in ranks if rank not in told]))
        if n < len(chunk.hypers):
            found.rest.append(
                replace(chunk, first=chunk.first + n, step=chunk.step + n * chunk.train, hypers=chunk.hypers[n:])
            )
    return found


def _report(result: Report | Failure) -> Report | None:
    return result if isinstance(result, Report) else result.report


def _steps(result: Report | Failure) -> int:
    report = _report(result)
    return len(report.chunk.hypers) if report and report.chunk.train else 0


def _lives(answer: object) -> bool:
    return not isinstance(answer, Failure) or answer.kind == "peer"


def _is_whole(answer: object) -> bool:
    return isinstance(answer, Failure) and answer.whole
