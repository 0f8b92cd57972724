"Worker: one rank's device and Learner, told what to do in chunks of steps."

from __future__ import annotations

import time
import zlib
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cluster.comms import Comm
from cluster.messages import Chunk, Job, Report
from cluster.rank_learner import RankLearner, RankResults
from cluster.reducer import GradientSum
from cluster.shards import LocalPart
from cluster.stream import LocalBatches
from learner.batchnorm import BatchNorm
from learner.callbacks.clip import ClipGradients
from learner.callbacks.ema import EMA
from learner.callbacks.mix import Mix
from learner.callbacks.outcomes import KeepOutcomes
from learner.callbacks.precision import MixedPrecision
from learner.callbacks.setup import SetupLearner
from learner.data.images import BadImage
from learner.data.loader import Readable, collate_readable, epoch_order
from learner.data.warp import Warp, make_augment
from learner.errors import UserError
from learner.groups import body_and_head, layer_groups, one_group
from learner.learner import Callback, Learner
from learner.models import build
from learner.module import Module
from learner.optim import make_optimizer


def refuse_bad(bad: tuple[tuple[str, str], ...], skip: bool) -> None:
    "Raise UserError for the first of the unreadable files (file and reason), unless they are to be skipped."
    if bad and not skip:
        raise UserError(f"{BadImage(*bad[0])}, or leave such files out with --bad-images skip")


def callbacks(job: Job, device: torch.device) -> list[Callback]:
    "What a job asks of the Learner beyond the plain loop."
    augment = make_augment(job.augment, job.size, job.presize, job.seed, job.augmentation, job.progressive)
    chosen: list[Callback] = [SetupLearner(device, job.normalize, augment, job.seed)]
    if job.mix:
        chosen.append(Mix(job.mix, job.n_classes, job.seed))
    if job.precision != "fp32":
        chosen.append(MixedPrecision(job.precision))
    if job.clip:
        chosen.append(ClipGradients(job.clip))
    if job.ema:
        chosen.append(EMA(job.ema))
    if job.outcomes:
        chosen.append(KeepOutcomes(job.batch_size, job.outcomes))
    return chosen


class Worker:
    "Trains one rank's part of each global batch; knows its rank and what it is told, and decides nothing."

    def __init__(self, job: Job, comm: Comm, device: torch.device, loader_threads: int) -> None:
        self.job, self.comm, self.device = job, comm, device
        torch.manual_seed(job.seed)
        model = build(job.arch, job.channels, job.n_classes).to(device)
        self._share(model)
        self.data = LocalBatches(job, comm.rank, comm.world_size, loader_threads)
        self.results = RankResults()
        splitter = body_and_head if job.fine_tune else one_group
        self.learner = RankLearner(model, None, cbs=[*callbacks(job, device), self.results], splitter=splitter)
        self.learner.label_smoothing = job.label_smoothing
        groups = layer_groups(model, splitter)
        self.reducer = GradientSum([p for group in groups for p in group], comm)
        self.learner("before_fit")
        self.learner.opt = make_optimizer(job.optimizer, groups, job.momentum, job.weight_decay, self.reducer)
        self.learner("after_opt")
        if job.fine_tune:
            self.freeze_to(-1)

    def _share(self, model: Module) -> None:
        "Start from the job's weights where it has some, and from rank 0's; let BatchNorm see the global batch."
        given = {name: torch.tensor(array) for name, array in self.job.weights.items()}
        model.load_state_dict(model.state_dict() | given)
        for tensor in model.state_dict().values():
            self.comm.broadcast_(tensor)
        if self.job.sync_batchnorm and self.comm.world_size > 1:
            for module in model.modules():
                if isinstance(module, BatchNorm):
                    module.sum_ = self.comm.sum_

    def run(self, chunk: Chunk) -> Report:
        "Go through the chunk's batches; raises UserError for an image that can't be read, unless the job skips those."
        started, waited = time.perf_counter(), self.comm.seconds
        self._enter(chunk)
        stream = self.data.open(chunk)
        bad: list[tuple[str, str]] = []
        data_seconds = 0.0
        for number, hypers in enumerate(chunk.hypers):
            self.learner.num = chunk.first + number
            asked = time.perf_counter()
            batch, part = next(stream)
            data_seconds += time.perf_counter() - asked
            refuse_bad(batch.bad, self.job.skip_bad_images)
            own = int((batch.rows < part.mine.stop).logical_and(batch.rows >= part.mine.start).sum())
            bad += batch.bad[: len(part.mine) - own]  # the others are another rank's to report
            self._step(batch, part, own, hypers)
        losses = torch.stack(self.results.losses).double().tolist()
        seconds = {
            "total": time.perf_counter() - started,
            "data": data_seconds,
            "communication": self.comm.seconds - waited,
        }
        counts, sums = list(self.results.ns), self.results.totals()
        outcomes = next((cb.take() for cb in self.learner.cbs if isinstance(cb, KeepOutcomes)), None)
        return Report(self.comm.rank, chunk, losses, counts, sums, seconds, bad, outcomes)

    def _enter(self, chunk: Chunk) -> None:
        "Set the Learner to the chunk's place."
        self.learner.epoch, self.learner.global_step = chunk.epoch, chunk.step
        self.results.reset()
        self._turn_to(chunk.train)

    def _turn_to(self, training: bool) -> None:
        "Go over between training and validation, which callbacks hear of: one may put other weights in place."
        if self.learner.model.training != training:
            self.learner("cleanup_epoch")
            self.learner.model.training = training
            self.learner("before_epoch")

    def _step(self, batch: Readable, part: LocalPart, own: int, hypers: dict[str, float]) -> None:
        "One global batch, of which `batch` has this rank's `own` samples, and behind them those they are mixed with."
        learner, n = self.learner, len(batch.targets)
        self.reducer.n_local = own
        self._set(hypers, part)
        parts = self.job.accumulate if learner.model.training else 1
        cuts = [n * i // parts for i in range(parts + 1)]
        for number, (low, high) in enumerate(pairwise(cuts)):
            learner.first_part = number == 0
            learner.last_part = self.reducer.last_part = number == parts - 1
            learner.batch = batch.inputs[low:high], batch.targets[low:high]
            learner.rows = batch.rows[low:high]
            learner.one_batch()
        if learner.model.training and not self.job.sync_batchnorm:
            self._average_buffers()

    def _set(self, hypers: dict[str, float], part: LocalPart) -> None:
        "Tell the optimizer, and the callbacks that change pictures, what this step is about."
        numbers = dict(hypers)
        size, body = numbers.pop("size", None), numbers.pop("body_lr", None)
        self.learner.opt.set(**numbers)
        if body is not None:
            self.learner.opt.set(lr=[body, numbers["lr"]])
        for cb in self.learner.cbs:
            if isinstance(cb, Mix):
                cb.place = part.mine, part.n
            if size and isinstance(cb, SetupLearner) and isinstance(cb.augment, Warp):
                cb.augment.train_size = int(size)

    def _average_buffers(self) -> None:
        "With statistics of local batches, running ones are averaged: their updates are linear, so all is kept."
        for buffer in self.learner.model.buffers():
            self.comm.sum_(buffer)
            buffer.div_(self.comm.world_size)

    def _states(self) -> list[dict[str, Tensor]]:
        "All that training changes, as training sees it: the model, the optimizer, and what callbacks keep."
        self._turn_to(True)
        kept = [cb.state_dict() for cb in self.learner.cbs]
        return [self.learner.model.state_dict(), self.learner.opt.state_dict(), *kept]

    def save(self) -> None:
        "Keep a copy of all that training changes, in memory."
        self._saved = [{name: t.clone() for name, t in state.items()} for state in self._states()]

    def restore(self) -> None:
        "Go back to what `save` kept."
        model, opt, *kept = self._saved
        self.learner.model.load_state_dict(model)
        self.learner.opt.load_state_dict(opt)
        for cb, state in zip(self.learner.cbs, kept, strict=True):
            cb.load_state_dict(state)
        self.reducer.reset()

    def freeze_to(self, n: int) -> None:
        "Train layer groups from `n` on alone, BatchNorm apart."
        self.learner.freeze_to(n)

    def snapshot(self) -> dict[str, np.ndarray]:
        "A copy of all that training changes, by names that say whose it is."
        states = enumerate(self._states())
        return {f"{n}/{name}": t.cpu().numpy().copy() for n, state in states for name, t in state.items()}

    def load(self, snapshot: dict[str, np.ndarray]) -> None:
        "Take over what `snapshot` of another worker, or of this one in another life, gave."
        self.save()
        saved: list[dict[str, Tensor]] = [{} for _ in self._saved]
        for full_name, array in snapshot.items():
            number, _, name = full_name.partition("/")
            if not number.isdigit() or int(number) >= len(saved):
                raise UserError(f"a checkpoint has {full_name!r}, which this model and these options have no place for")
            saved[int(number)][name] = torch.from_numpy(array.copy()).to(self.device)
        self._saved = saved
        self.restore()

    def fingerprint(self) -> str:
        "A checksum of all bits that training changes: equal on all ranks, or something is wrong."
        crc = 0
        for state in self._states():
            for name in sorted(state):
                crc = zlib.crc32(state[name].cpu().numpy().tobytes(), zlib.crc32(name.encode(), crc))
        return f"{crc:08x}"

    def state(self) -> dict[str, np.ndarray]:
        "A copy by name of the model's tensors, averaged ones where there are."
        averages = [cb.average for cb in self.learner.cbs if isinstance(cb, EMA)]
        tensors = averages[0] if averages else self.learner.model.state_dict()
        return {name: tensor.cpu().numpy().copy() for name, tensor in tensors.items()}

    def samples(self, n: int) -> tuple[np.ndarray, list[int]]:
        "The first `n` training images as the model sees them in step 0, bytes (n, size, size, channels), and classes."
        order = epoch_order(len(self.job.train), self.job.seed, 0)[:n]
        batch = collate_readable(self.data.dataset(True), order)
        setup = callbacks(self.job, torch.device("cpu"))[:1]
        view = Learner(self.learner.model, None, cbs=setup)
        view.batch, view.rows = (batch.inputs, batch.targets), batch.rows
        view("before_batch")
        return self.job.normalize.invert(view.batch[0]).numpy(), view.batch[1].tolist()

    def close(self) -> None:
        "End the loaders' threads and leave the group."
        self.data.close()
        self.comm.close()
