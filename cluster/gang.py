"The gang: all workers of a run, driven as one. LocalGang is one worker in this very process, without Ray."

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from cluster.comms import Solo
from cluster.faults import TOO_LARGE, Failure, WorkersFailed
from cluster.messages import Chunk, Job, Report
from cluster.worker import Worker
from learner.cores import usable_cores
from learner.errors import UserError, lacks_memory
from learner.memory import keep_memory


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
        return f"rank {self.rank} of {self.world_size} (pid {os.getpid()}, {torch.get_num_threads()} threads)"


class Gang(Protocol):
    "What the driver may ask of its workers."

    @property
    def world_size(self) -> int:
        "How many workers there are now."
        ...

    def stream(self, chunks: Iterable[Chunk]) -> Iterator[list[Report]]:
        """Run the chunks in order; for each, or part of one, the reports of the ranks that did it.

        Raises WorkersFailed, or in this process UserError, where a failure can't be made up for.
        """
        ...

    def call(self, method: str, *args: Any) -> list[Any]:
        "Call a method of every Worker; the results by rank. Raises WorkersFailed."
        ...

    def call_first(self, method: str, *args: Any) -> Any:
        "As `call`, of rank 0 alone, and only its result."
        ...

    def grow(self) -> None:
        "If there are fewer workers than were asked for, add those that have become available."
        ...

    def heed(self, stop: Callable[[], bool]) -> None:
        "From when `stop()` says so, replace nobody any more: a failure is raised, and `salvage` has what is left."
        ...

    def salvage(self) -> dict[str, np.ndarray] | None:
        "After an error: the snapshot of the last completed step, if a worker is left that has it."
        ...

    def close(self) -> None:
        "Stop all workers, whatever they are doing."
        ...


@contextmanager
def enough_memory() -> Iterator[None]:
    "Where memory, the GPU's or this process's, is not enough herein, say what to do: UserError."
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise UserError(f"there is not enough memory: {error}; {TOO_LARGE}") from error


class LocalGang:
    """One worker in the driver's process: breakpoints are where they are set, and no thread is between.

    What fails in it ends the run, with all completed steps in hand; an error's own traceback is the `__cause__`.
    """

    world_size: int = 1

    def __init__(self, job: Job, device: str, log_folder: Path) -> None:
        seat = Seat(0, 1, 0, 1)
        os.environ |= seat.environment()
        if "OMP_NUM_THREADS" not in os.environ:  # the user's word; for its own workers Ray sets it to 1
            torch.set_num_threads(seat.threads)
        keep_memory()
        with enough_memory():
            self.worker = Worker(job, Solo(), torch.device(device), seat.threads)
        with open(seat.log_file(log_folder), "a") as log:  # of a run that is resumed, it has what befell it before
            log.write(f"{seat} on {device}: in the driver's process, which has the terminal\n")

    def stream(self, chunks: Iterable[Chunk]) -> Iterator[list[Report]]:
        "See Gang."
        for chunk in chunks:
            try:
                reports = self.call("run", chunk)
            except UserError:
                yield from self._done(chunk)
                raise
            except Exception as error:
                failure = Failure.of(0, error, self.worker.step)
                yield from self._done(chunk)
                raise WorkersFailed([failure]) from error
            yield reports

    def _done(self, chunk: Chunk) -> list[list[Report]]:
        "The reports of a chunk that came to no end: of the whole steps that it had, if any."
        try:
            done = self.worker.report()
        except RuntimeError:  # a GPU that is out of order gives nothing back
            return []
        return [[done]] if chunk.train and done.chunk.hypers else []

    def call(self, method: str, *args: Any) -> list[Any]:
        "See Gang."
        return [self.call_first(method, *args)]

    def call_first(self, method: str, *args: Any) -> Any:
        "See Gang."
        with enough_memory():
            return getattr(self.worker, method)(*args)

    def grow(self) -> None:
        "See Gang: one is all there is."

    def heed(self, stop: Callable[[], bool]) -> None:
        "See Gang: nobody ever is."

    def salvage(self) -> dict[str, np.ndarray] | None:
        "See Gang: the step that failed came to nothing, unless it was in the midst of its update."
        try:
            return self.worker.snapshot() if self.worker.whole else None
        except RuntimeError:  # as in `_done`
            return None

    def close(self) -> None:
        "See Gang."
        self.worker.close()
