"Worker: one rank's device and Learner, told what to do in chunks of steps."

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cluster.comms import Comm
from cluster.reducer import GradientSum
from cluster.shards import local_batch, n_batches
from learner.batchnorm import BatchNorm
from learner.callbacks.setup import SetupLearner
from learner.callbacks.track import TrackResults
from learner.data.augment import Augment
from learner.data.files import Labelled
from learner.data.images import BadImage
from learner.data.loader import DataLoader, Dataset, Readable, collate_readable, epoch_order
from learner.data.normalize import Normalize
from learner.errors import UserError
from learner.learner import Learner
from learner.losses import cross_entropy
from learner.metrics import Sums
from learner.models import build
from learner.module import Module
from learner.optim import SGD


@dataclass(frozen=True, kw_only=True)
class Job:
    "What every worker is told, the same for all ranks: pictures are `presize` square in memory, `size` in use."

    train: Labelled
    valid: Labelled
    n_classes: int
    arch: str
    size: int
    presize: int
    batch_size: int
    seed: int
    momentum: float
    weight_decay: float
    normalize: Normalize
    augment: bool
    sync_batchnorm: bool
    skip_bad_images: bool


@dataclass(frozen=True)
class Chunk:
    """Consecutive batches of one epoch, given to all workers in one message.

    `first` is the number of the first batch in the epoch, `step` the optimizer steps done before it. Training batches
    come with the hyperparameters of each; validation ones with empty dictionaries.
    """

    train: bool
    epoch: int
    first: int
    step: int
    hypers: tuple[dict[str, float], ...]


@dataclass(frozen=True)
class Report:
    """What one rank did in a chunk: per batch its sum of losses and its count, in all its sums and counts.

    `seconds` has the chunk's total, and of it the time waiting for data and for communication.
    """

    rank: int
    chunk: Chunk
    losses: list[float]
    counts: list[int]
    sums: Sums
    seconds: dict[str, float]
    bad_images: list[tuple[str, str]] = field(default_factory=list)


class RankLearner(Learner):
    "A Learner whose batch is one rank's part of a global batch: its loss is a sum, which the step divides by all."

    def get_loss(self) -> None:
        "`preds` and targets to the sum of losses; 0 where this rank has no samples."
        self.loss = cross_entropy(self.preds, self.batch[1], reduction="sum")

    def loss_total(self) -> Tensor:
        "The sum that the loss already is."
        return self.loss.detach()


class RankResults(TrackResults):
    "TrackResults that leaves averages and tables to the driver, which has all ranks' sums."

    def before_fit(self) -> None:
        "No table here."

    def before_epoch(self) -> None:
        "Sums are per chunk here."

    def after_epoch(self) -> None:
        "No averages here."


def refuse_bad(bad: tuple[tuple[str, str], ...], skip: bool) -> None:
    "Raise UserError for the first of the unreadable files (file and reason), unless they are to be skipped."
    if bad and not skip:
        raise UserError(f"{BadImage(*bad[0])}, or leave such files out with --bad-images skip")


class Worker:
    "Trains one rank's part of each global batch; knows its rank and what it is told, and decides nothing."

    def __init__(self, job: Job, comm: Comm, device: torch.device, loader_threads: int) -> None:
        self.job, self.comm, self.device = job, comm, device
        torch.manual_seed(job.seed)
        model = build(job.arch, 3, job.n_classes).to(device)
        self._share(model)
        self.data = {train: self._loader(train, loader_threads) for train in (True, False)}
        augment = Augment(job.size, job.seed) if job.presize != job.size else None
        self.results = RankResults()
        callbacks = [SetupLearner(device, job.normalize, augment), self.results]
        self.learner = RankLearner(model, None, cbs=callbacks)
        self.reducer = GradientSum(model.parameters(), comm)
        self.learner.opt = SGD(model.parameters(), 0.0, job.momentum, job.weight_decay, reduce=self.reducer)
        self.learner("before_fit")
        self._stream: Iterator[tuple[Readable, range]] = iter(())
        self._next: tuple[bool, int, int] | None = None

    def _share(self, model: Module) -> None:
        "Start from rank 0's weights, and let BatchNorm see the global batch."
        for tensor in model.state_dict().values():
            self.comm.broadcast_(tensor)
        if self.job.sync_batchnorm and self.comm.world_size > 1:
            for module in model.modules():
                if isinstance(module, BatchNorm):
                    module.sum_ = self.comm.sum_

    def _loader(self, train: bool, threads: int) -> DataLoader:
        labelled = self.job.train if train else self.job.valid
        dataset = Dataset(labelled, self.job.presize)
        return DataLoader(dataset, self.job.batch_size, n_workers=threads, collate=collate_readable)

    def run(self, chunk: Chunk) -> Report:
        "Go through the chunk's batches; raises UserError for an image that can't be read, unless the job skips those."
        learner, started, waited = self.learner, time.perf_counter(), self.comm.seconds
        learner.model.training, learner.epoch, learner.global_step = chunk.train, chunk.epoch, chunk.step
        self._open(chunk)
        self.results.reset()
        bad: list[tuple[str, str]] = []
        data_seconds = 0.0
        for number, hypers in enumerate(chunk.hypers):
            learner.num = chunk.first + number
            asked = time.perf_counter()
            batch, mine = next(self._stream)
            data_seconds += time.perf_counter() - asked
            refuse_bad(batch.bad, self.job.skip_bad_images)
            bad += batch.bad
            self._step(batch, mine, hypers)
        losses = torch.stack(self.results.losses).double().tolist()
        seconds = {
            "total": time.perf_counter() - started,
            "data": data_seconds,
            "communication": self.comm.seconds - waited,
        }
        return Report(self.comm.rank, chunk, losses, list(self.results.ns), self.results.totals(), seconds, bad)

    def _step(self, batch: Readable, mine: range, hypers: dict[str, float]) -> None:
        learner = self.learner
        learner.batch, learner.rows = (batch.inputs, batch.targets), batch.rows + mine.start
        self.reducer.n_local = len(batch.targets)
        learner.opt.set(**hypers)
        learner.one_batch()
        if learner.model.training and not self.job.sync_batchnorm:
            self._average_buffers()

    def _average_buffers(self) -> None:
        "With statistics of local batches, running ones are averaged: their updates are linear, so all is kept."
        for buffer in self.learner.model.buffers():
            self.comm.sum_(buffer)
            buffer.div_(self.comm.world_size)

    def _open(self, chunk: Chunk) -> None:
        "Go on with the stream of batches where the last chunk left it, or open another."
        if self._next != (chunk.train, chunk.epoch, chunk.first):
            self._stream = self._batches(chunk.train, chunk.epoch, chunk.first)
        self._next = chunk.train, chunk.epoch, chunk.first + len(chunk.hypers)

    def _batches(self, train: bool, epoch: int, first: int) -> Iterator[tuple[Readable, range]]:
        "My part of each global batch from `first` to the epoch's end, read ahead across chunks."
        loader, size = self.data[train], self.job.batch_size
        n = len(loader.dataset)
        order = epoch_order(n, self.job.seed, epoch) if train else range(n)
        mine = partial(local_batch, order, size, rank=self.comm.rank, world_size=self.comm.world_size)
        parts = [mine(batch=b) for b in range(first, n_batches(n, size))]
        yield from zip(loader.load(samples for samples, _ in parts), (rows for _, rows in parts))

    def save(self) -> None:
        "Keep a copy of all that training changes, in memory."
        model, opt = self.learner.model.state_dict(), self.learner.opt.state_dict()
        self._saved = [{name: t.clone() for name, t in state.items()} for state in (model, opt)]

    def restore(self) -> None:
        "Go back to what `save` kept."
        self.learner.model.load_state_dict(self._saved[0])
        self.learner.opt.load_state_dict(self._saved[1])
        self.reducer.flat.zero_()

    def fingerprint(self) -> str:
        "A checksum of all bits of parameters, buffers and optimizer state: equal on all ranks, or something is wrong."
        crc = 0
        for state in (self.learner.model.state_dict(), self.learner.opt.state_dict()):
            for name in sorted(state):
                crc = zlib.crc32(state[name].cpu().numpy().tobytes(), zlib.crc32(name.encode(), crc))
        return f"{crc:08x}"

    def state(self) -> dict[str, np.ndarray]:
        "A copy of the model's tensors by name."
        return {name: tensor.cpu().numpy().copy() for name, tensor in self.learner.model.state_dict().items()}

    def samples(self, n: int) -> tuple[np.ndarray, list[int]]:
        "The first `n` training images as the model sees them in step 0, uint8 (n, size, size, 3), and their classes."
        order = epoch_order(len(self.job.train), self.job.seed, 0)[:n]
        batch = collate_readable(Dataset(self.job.train, self.job.presize), order)
        setup = SetupLearner("cpu", self.job.normalize, Augment(self.job.size, self.job.seed))
        view = Learner(self.learner.model, None, cbs=[setup])
        view.batch, view.rows = (batch.inputs, batch.targets), batch.rows
        view("before_batch")
        return self.job.normalize.invert(view.batch[0]).numpy(), view.batch[1].tolist()

    def close(self) -> None:
        "End the loaders' threads and leave the group."
        for loader in self.data.values():
            loader.close()
        self.comm.close()
