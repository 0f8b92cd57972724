"Datasets and the loader that keeps batches ready while others train."

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.cores import usable_cores
from learner.data.decoder import decode_all
from learner.data.files import Labelled
from learner.data.images import BadImage, decode
from learner.errors import UsageError

AHEAD = 16  # batches: a GPU's are in page-locked memory too, and one thread reads each
NICE = 5  # of loader threads: where cores are few, a first epoch takes 0.9 of the time, as ranks meet sooner


class Items(Protocol):
    "What a loader draws from: a length, and samples by number."

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]: ...


class Dataset:
    "Labelled image files as samples: bytes uint8 (size, size, channels) and the class number, an int64 scalar."

    def __init__(self, labelled: Labelled, size: int, channels: int = 3) -> None:
        self.labelled, self.size, self.channels = labelled, size, channels
        self._targets = np.array(labelled.targets, np.int64)

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(np.array(self.pixels(i))), torch.tensor(self.labelled.targets[i])

    def targets(self, indices: Sequence[int]) -> Tensor:
        "The class numbers (n,) int64 of these samples."
        return torch.from_numpy(self._targets[np.array(indices, np.int64)])  # torch's own gather takes longer

    def pixels(self, i: int) -> NDArray[np.uint8]:
        "The picture of sample `i`; raises BadImage."
        return decode(self.labelled.files[i], self.size, channels=self.channels)

    def read(self, indices: Sequence[int], out: NDArray[np.uint8]) -> dict[int, BadImage]:
        "Fill the rows of `out` with the pictures of these samples; those that can't be read, by row."
        return decode_all([self.labelled.files[i] for i in indices], out)


def collate(dataset: Items, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    "The samples of these numbers as one batch: inputs and targets, stacked. UsageError if their shapes differ."
    inputs, targets = zip(*[dataset[i] for i in indices], strict=True)
    shapes = [tuple(x.shape) for x in inputs]
    if other := next((number for number, shape in enumerate(shapes) if shape != shapes[0]), 0):
        raise UsageError(
            f"samples {indices[0]} and {indices[other]} can't be stacked into a batch: their shapes are {shapes[0]} "
            f"and {shapes[other]}; add an item transform that makes all alike, such as squash(128)"
        )
    return torch.stack(inputs), torch.stack(targets)


@dataclass(frozen=True)
class Readable:
    """The samples of a batch that could be read.

    `inputs` uint8 (n, size, size, channels), `targets` (n,) int64, `rows` (n,) int64: which of the indices asked for
    these are, and `bad`: file and reason of each of the others.
    """

    inputs: Tensor
    targets: Tensor
    rows: Tensor
    bad: tuple[tuple[str, str], ...] = ()


def bytes_of(*shape: int) -> Tensor:
    "Memory uint8 of that shape, for a loader to fill."
    return torch.empty(shape, dtype=torch.uint8)


def collate_readable(dataset: Dataset, indices: Sequence[int], buffer: Callable[..., Tensor] = bytes_of) -> Readable:
    "As `collate`, leaving out what can't be read; n may be 0. `buffer(*shape)` gives the memory for the pictures."
    size = dataset.size
    pixels = buffer(len(indices), size, size, dataset.channels)
    errors = dataset.read(indices, pixels.numpy())
    targets, rows = dataset.targets(indices), torch.arange(len(indices))
    if not errors:
        return Readable(pixels, targets, rows)
    rows = torch.tensor([row for row in range(len(indices)) if row not in errors], dtype=torch.int64)
    bad = tuple((errors[row].file, errors[row].reason) for row in sorted(errors))
    return Readable(pixels[rows], targets[rows], rows, bad)


class DataLoader:
    """Batches of a dataset in order, or shuffled anew each epoch, collated by threads that start once.

    Threads, because Pillow and torch leave the interpreter's lock while they work: no copy of the dataset, no pickling,
    nothing left behind when the process dies, and an error arrives as it was raised. `n_workers=0` loads in the caller
    (for the debugger); None takes one thread a core. `n_workers + 2` batches are kept ready, up to `AHEAD`. Batches
    that `at_hand`, by their sample numbers, says are no work are collated in the caller when their turn comes: on a CPU
    that trains too, it costs several times as much to hand a batch from thread to thread as to gather it.
    """

    def __init__(
        self,
        dataset: Items,
        batch_size: int = 128,
        shuffle: bool = False,
        n_workers: int | None = None,
        seed: int = 42,
        collate: Callable[[Any, Sequence[int]], Any] = collate,
        at_hand: Callable[[Sequence[int]], bool] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; it must be 1 or more")
        self.dataset, self.batch_size, self.collate = dataset, batch_size, collate
        self.shuffle, self.seed, self.at_hand = shuffle, seed, at_hand
        self.n_workers = usable_cores() if n_workers is None else n_workers
        self.epoch = 0
        self._pool = ThreadPoolExecutor(self.n_workers, "loader", _give_way) if self.n_workers else None

    def __len__(self) -> int:
        return (len(self.dataset) + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[Any]:
        order = epoch_order(len(self.dataset), self.seed, self.epoch) if self.shuffle else range(len(self.dataset))
        self.epoch += 1
        return self.load(order[n : n + self.batch_size] for n in range(0, len(self.dataset), self.batch_size))

    def load(self, batches: Iterable[Sequence[int]]) -> Iterator[Any]:
        "Collate each list of sample numbers; in their order, the next ones in the background."
        ahead: deque[tuple[Sequence[int], Future | None]] = deque()
        try:
            for indices in batches:
                ahead.append((indices, self._begin(indices)))
                if len(ahead) > min(self.n_workers + 2, AHEAD):
                    yield self._finish(*ahead.popleft())
            while ahead:
                yield self._finish(*ahead.popleft())
        finally:
            for future in (future for _, future in ahead if future):
                future.cancel()

    def _begin(self, indices: Sequence[int]) -> Future | None:
        "Have a thread collate these, unless that is the caller's."
        if self._pool is None or (self.at_hand is not None and self.at_hand(indices)):
            return None
        return self._pool.submit(self.collate, self.dataset, indices)

    def _finish(self, indices: Sequence[int], begun: Future | None) -> Any:
        return self.collate(self.dataset, indices) if begun is None else begun.result()

    def close(self) -> None:
        "End the threads; what they have begun is finished, what they have not is dropped."
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _give_way() -> None:
    "Have this thread run behind those that train, if the system lets it; only Linux does so for a thread alone."
    if sys.platform == "linux":
        with suppress(OSError):
            os.nice(NICE)


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    "The sample numbers 0 to n-1 in the order of that epoch: a function of its arguments alone."
    return np.random.default_rng([seed, epoch]).permutation(n).tolist()


@dataclass(frozen=True)
class DataLoaders:
    """The two loaders of a Learner; `valid` may be None.

    `prepare` makes, of the first training batch's inputs, the function that turns inputs into what the model sees, for
    SetupLearner to call on the device; None leaves that to it.
    """

    train: Any
    valid: Any = None
    prepare: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None
