"LocalBatches: one rank's part of each global batch, read ahead across chunks."

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from cluster.messages import Chunk, Job
from cluster.shards import local_batch, n_batches
from learner.data.loader import DataLoader, Dataset, Readable, collate_readable, epoch_order
from learner.data.store import Store, StoredDataset


class LocalBatches:
    "Opens the training or validation set anywhere; consecutive chunks go on with the same stream."

    def __init__(self, job: Job, rank: int, world_size: int, threads: int) -> None:
        self.job, self.rank, self.world_size = job, rank, world_size
        n = len(job.train) + len(job.valid)
        self.store = Store(Path(job.store), n, job.presize, job.channels) if job.store else None
        self.loaders = {train: self._loader(train, threads) for train in (True, False)}
        self._stream: Iterator[tuple[Readable, range]] = iter(())
        self._next: tuple[bool, int, int] | None = None

    def _loader(self, train: bool, threads: int) -> DataLoader:
        return DataLoader(self.dataset(train), self.job.batch_size, n_workers=threads, collate=collate_readable)

    def dataset(self, train: bool) -> Dataset:
        "The training or the validation set; in the store, this one comes behind that one."
        labelled = self.job.train if train else self.job.valid
        if self.store is None:
            return Dataset(labelled, self.job.presize, self.job.channels)
        return StoredDataset(labelled, self.job.presize, self.store, 0 if train else len(self.job.train))

    def open(self, chunk: Chunk) -> Iterator[tuple[Readable, range]]:
        "The stream at the chunk's first batch: this rank's samples, and their positions in the global batch."
        if self._next != (chunk.train, chunk.epoch, chunk.first):
            self._stream = self._batches(chunk.train, chunk.epoch, chunk.first)
        self._next = chunk.train, chunk.epoch, chunk.first + len(chunk.hypers)
        return self._stream

    def _batches(self, train: bool, epoch: int, first: int) -> Iterator[tuple[Readable, range]]:
        loader, size = self.loaders[train], self.job.batch_size
        n = len(loader.dataset)
        order = epoch_order(n, self.job.seed, epoch) if train else range(n)
        mine = partial(local_batch, order, size, rank=self.rank, world_size=self.world_size)
        parts = [mine(batch=b) for b in range(first, n_batches(n, size))]
        yield from zip(loader.load(samples for samples, _ in parts), (rows for _, rows in parts))

    def close(self) -> None:
        "End the loaders' threads."
        for loader in self.loaders.values():
            loader.close()
