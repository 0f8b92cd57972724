"Which samples make up a global batch, and which of those are a rank's: pure functions of the run's numbers."

from __future__ import annotations

from collections.abc import Sequence


def n_batches(n_samples: int, batch_size: int) -> int:
    "Global batches in an epoch; the last may be smaller."
    return (n_samples + batch_size - 1) // batch_size


def part(n: int, rank: int, world_size: int) -> range:
    "The positions of 0 to n-1 that are a rank's: contiguous, and no rank has two more than another."
    return range(n * rank // world_size, n * (rank + 1) // world_size)


def local_batch(
    order: Sequence[int], batch_size: int, batch: int, rank: int, world_size: int
) -> tuple[list[int], range]:
    """A rank's samples of global batch number `batch` of an epoch that goes through `order`.

    Gives their sample numbers, and their positions in the global batch; both may be empty.
    """
    samples = order[batch * batch_size : (batch + 1) * batch_size]
    mine = part(len(samples), rank, world_size)
    return list(samples[mine.start : mine.stop]), mine
