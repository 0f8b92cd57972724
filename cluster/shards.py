"How an epoch's order falls into global batches, and which part of each is a rank's: pure functions of a few numbers."

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def n_batches(n_samples: int, batch_size: int) -> int:
    "Global batches in an epoch; the last may be smaller."
    return (n_samples + batch_size - 1) // batch_size


def part(n: int, rank: int, world_size: int) -> range:
    "The positions of 0 to n-1 that are a rank's: contiguous, and no rank has two more than another."
    return range(n * rank // world_size, n * (rank + 1) // world_size)


@dataclass(frozen=True)
class LocalPart:
    """What a rank loads of a global batch of `n` samples that begins at place `start` of the epoch's order.

    `mine` are the rows of the global batch that are the rank's; `rows` those it loads, `mine` first.
    """

    start: int
    n: int
    mine: range
    rows: Sequence[int]

    @property
    def places(self) -> list[int]:
        "Where in the epoch's order the rows stand."
        return [self.start + row for row in self.rows]


def local_batch(n_samples: int, batch_size: int, batch: int, rank: int, world_size: int) -> LocalPart:
    "A rank's part of global batch number `batch` of an epoch of `n_samples`; it may be empty."
    start = batch * batch_size
    n = max(0, min(batch_size, n_samples - start))
    mine = part(n, rank, world_size)
    return LocalPart(start, n, mine, mine)
