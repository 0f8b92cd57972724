"LocalBatches: one rank's part of each global batch, read ahead across chunks."

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cluster.messages import Chunk, Job
from cluster.shards import LocalPart, local_batch, n_batches
from learner.data.feed import make_feed
from learner.data.loader import DataLoader, Dataset, Readable, epoch_order
from learner.data.mix import needed
from learner.data.store import Store, StoredDataset
from learner.errors import UserError
from learner.memory import memory_size, send


class LocalBatches:
    """Opens the training or validation set anywhere; consecutive chunks go on with the same stream.

    Inputs come to `device`, where all are kept if the job says so and there is room; else it is told.
    """

    def __init__(
        self, job: Job, rank: int, world_size: int, threads: int, device: torch.device | str = "cpu",
        tell: Callable[[str], object] = print,
    ) -> None:  # fmt: skip
        self.job, self.rank, self.world_size = job, rank, world_size
        n = len(job.train) + len(job.valid)
        self.store = self._open_store(n, tell) if job.store else None
        self.feed = make_feed(torch.device(device), job.on_device, n, job.presize, job.channels, tell)
        in_memory = self.store is not None and self.store.pixels.nbytes < memory_size() / 2
        self.gathers = in_memory and self.feed.device.type == "cpu"  # from a disk, threads had better read ahead
        self.loaders = {train: self._loader(train, threads) for train in (True, False)}
        self._stream: Iterator[tuple[Readable, LocalPart]] = iter(())
        self._next: tuple[bool, int, int] | None = None

    def _open_store(self, n: int, tell: Callable[[str], object]) -> Store | None:
        "The store of this machine; where there is no room for one, it is told."
        try:
            return Store(Path(str(self.job.store)), n, self.job.presize, self.job.channels, self.job.made)
        except UserError as error:
            tell(f"host {socket.gethostname()} decodes images in every epoch: {error}")
            return None

    def _loader(self, train: bool, threads: int) -> DataLoader:
        collate = partial(self.feed.collate, first=self._first(train))
        dataset = self.dataset(train)
        at_hand = dataset.at_hand if self.gathers and isinstance(dataset, StoredDataset) else None
        return DataLoader(dataset, self.job.batch_size, n_workers=threads, collate=collate, at_hand=at_hand)

    def _first(self, train: bool) -> int:
        "Where the training set begins among all pictures, and behind it the validation set."
        return 0 if train else len(self.job.train)

    def dataset(self, train: bool) -> Dataset:
        "The training or the validation set."
        labelled = self.job.train if train else self.job.valid
        if self.store is None:
            return Dataset(labelled, self.job.presize, self.job.channels)
        return StoredDataset(labelled, self.job.presize, self.store, self._first(train))

    def sit(self, rank: int, world_size: int) -> None:
        "Have another rank's samples from the next `open` on."
        self.rank, self.world_size, self._next = rank, world_size, None

    def open(self, chunk: Chunk) -> Iterator[tuple[Readable, LocalPart]]:
        "The stream at the chunk's first batch: samples, at their rows in the global batch, and which are this rank's."
        if self._next != (chunk.train, chunk.epoch, chunk.first):
            self._stream = self._batches(chunk.train, chunk.epoch, chunk.first)
        self._next = chunk.train, chunk.epoch, chunk.first + len(chunk.hypers)
        return self._stream

    def _batches(self, train: bool, epoch: int, first: int) -> Iterator[tuple[Readable, LocalPart]]:
        loader, size = self.loaders[train], self.job.batch_size
        n = len(loader.dataset)
        order = epoch_order(n, self.job.seed, epoch) if train else range(n)
        mine = partial(local_batch, n, size, rank=self.rank, world_size=self.world_size)
        parts = [self._with_partners(mine(batch=b), train) for b in range(first, n_batches(n, size))]
        for ready, part in zip(loader.load([order[i] for i in part.places] for part in parts), parts):
            batch = ready()
            yield replace(batch, rows=torch.from_numpy(np.asarray(part.rows, np.int64)[batch.rows.numpy()])), part

    def _with_partners(self, part: LocalPart, train: bool) -> LocalPart:
        "In training with MixUp or CutMix, also the rows that this rank's own are mixed with."
        return replace(part, rows=needed(part.mine, part.n)) if train and self.job.mix else part

    def close(self) -> None:
        "End the loaders' threads."
        for loader in self.loaders.values():
            loader.close()


def own_bad(batch: Readable, part: LocalPart) -> list[tuple[str, str]]:
    "The unreadable files among a rank's own samples; the others it loads are another rank's to report."
    if not batch.bad:
        return []
    own = int((batch.rows < part.mine.stop).logical_and(batch.rows >= part.mine.start).sum())
    return list(batch.bad[: len(part.mine) - own])


def dealt(batch: Readable, number: int, parts: int) -> Readable:
    "What of a batch is in that one of `parts`, to which rows are dealt in turn."
    if parts == 1:
        return batch
    here = (batch.rows % parts == number).nonzero().squeeze(1)  # a GPU would have to be waited for to count them
    inputs = batch.inputs.index_select(0, send(here, batch.inputs.device))
    return replace(batch, inputs=inputs, targets=batch.targets[here], rows=batch.rows[here])
