"Worker: one rank's device and Learner, told what to do in chunks of steps."

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cluster.comms import Comm, PeerLost
from cluster.faults import NotFinite
from cluster.local_batches import LocalBatches, dealt, own_bad
from cluster.messages import Chunk, Job, Report
from cluster.not_finite import ADVICE, FiniteGuard
from cluster.rank_learner import NAMES, RankLearner, RankResults
from cluster.reducer import GradientSum
from cluster.replica import Replica
from cluster.shards import LocalPart, n_batches
from learner.batchnorm import batchnorms
from learner.callbacks.activations import ActivationStats
from learner.callbacks.clip import ClipGradients
from learner.callbacks.compile import Compile, cause_of
from learner.callbacks.ema import EMA
from learner.callbacks.mix import Mix
from learner.callbacks.outcomes import KeepOutcomes
from learner.callbacks.precision import MixedPrecision, first_scale
from learner.callbacks.setup import SetupLearner
from learner.data.images import BadImage
from learner.data.loader import Readable, collate_readable, epoch_order
from learner.data.warp import Warp, make_augment
from learner.errors import UserError
from learner.groups import body_and_head, no_decay_groups, one_group, plain_groups
from learner.learner import Callback, Learner
from learner.lsuv import lsuv
from learner.models import build
from learner.module import Module
from learner.optim import make_optimizer
from learner.statistics import Statistics

SAMPLE = 64  # images that LSUV looks at


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
        chosen.append(MixedPrecision(job.precision, scale=first_scale(job.batch_size)))
    if job.clip:
        chosen.append(ClipGradients(job.clip))
    if job.ema:
        chosen.append(EMA(job.ema))
    if job.outcomes:
        chosen.append(KeepOutcomes(job.batch_size, job.outcomes))
    if job.activations:
        chosen.append(ActivationStats(every=n_batches(len(job.train), job.batch_size)))
    return chosen


class Worker(Replica):
    """Trains one rank's part of each global batch; knows its rank and what it is told, and decides nothing.

    A worker that is `joining` others at work begins without a word to them: what they hold comes by `load`.
    """

    def __init__(self, job: Job, comm: Comm, device: torch.device, loader_threads: int, joining: bool = False) -> None:
        self.job, self.threads = job, loader_threads
        torch.manual_seed(job.seed)
        model = build(job.arch, job.channels, job.n_classes).to(device)
        model.load_state_dict(model.state_dict() | {name: torch.tensor(array) for name, array in job.weights.items()})
        self.notes: list[str] = []
        self.data = LocalBatches(job, comm.rank, comm.world_size, loader_threads, device, self.notes.append)
        if job.lsuv and not joining:
            lsuv(model, self._first_images(model, SAMPLE, device)[0])
        if not joining:
            for tensor in model.state_dict().values():
                comm.broadcast_(tensor)
            comm.finish()
        splitter = body_and_head if job.fine_tune or job.body_apart else one_group
        groups = (no_decay_groups if job.decay_weights_only else plain_groups)(model, splitter)
        self.reducer = GradientSum([p for group in groups for p in group["params"]], comm, extra=len(NAMES))
        self.results = RankResults(self.reducer)
        compiled = job.compile == "on" or (job.compile == "auto" and device.type == "cuda")
        self.compile = Compile(self.notes.append, lambda: self._say("compiling")) if compiled else None
        cbs = [*callbacks(job, device), self.results, *filter(None, [self.compile])]
        super().__init__(RankLearner(model, None, cbs=cbs, splitter=splitter), self.reducer, device)
        self.learner.label_smoothing = job.label_smoothing
        self.learner.class_weights = torch.tensor(job.class_weights, device=device) if job.class_weights else None
        self.learner("before_fit")
        self.statistics = Statistics(model)
        self.guard = FiniteGuard(job, self.learner, self.results, self.statistics)
        self.learner.opt = make_optimizer(job.optimizer, groups, job.momentum, job.weight_decay, self.reducer)
        self.learner.opt.gather()  # now, since a CUDA graph is recorded anew for parameters that have moved
        if device.type == "cpu" or job.on_nan != "stop":  # a GPU would have to be waited for; there the driver looks
            self.learner.opt.then(self.guard.look)
        if not job.sync_batchnorm:
            self.learner.opt.then(self._average_statistics)
        self.learner("after_opt")
        self.whole = True  # what this rank holds: not in the midst of an update
        self.learner.opt.then(self._begin_update)  # the last that is called before it
        self.chunk = Chunk(True, 0, 0, 0, ())
        self.moves, self.doing = 0, "nothing"
        self.frozen: bool | None = None  # the body, where it is fine-tuned: the hyperparameters of each step say
        self.join(comm)

    def join(self, comm: Comm) -> None:
        "From now on, be the rank of that group that it says; let BatchNorm see the global batch."
        self.comm = self.reducer.comm = comm
        self.data.sit(comm.rank, comm.world_size)
        for norm in batchnorms(self.learner.model) if self.job.sync_batchnorm else ():
            norm.sum_ = comm.sum_ if comm.world_size > 1 else None

    def run(self, chunk: Chunk) -> Report:
        "Go through the chunk's batches; raises UserError for an image that can't be read, unless the job skips those."
        self._enter(chunk)
        stream = self.data.open(chunk)
        for number, hypers in enumerate(chunk.hypers):
            self._say("data")
            asked = time.perf_counter()
            batch, part = next(stream)
            self.data_seconds += time.perf_counter() - asked
            refuse_bad(batch.bad, self.job.skip_bad_images)
            self._say("computing")
            self.learner.num = chunk.first + number
            self._batch(batch, part, hypers)
            self.bad += own_bad(batch, part)
        if not chunk.train:
            self.results.share(self.comm)
        return self.report()

    def report(self) -> Report:
        "What is done of the chunk that `run` was given last: after a failure in training, its whole steps."
        columns = self.results.columns()
        chunk = replace(self.chunk, hypers=self.chunk.hypers[: len(columns["count"])])
        total, waited = time.perf_counter() - self.started, self.comm.seconds - self.waited
        seconds = {"total": total, "data": self.data_seconds, "communication": waited}
        if self.compile is not None:
            seconds["compiling"], self.compile.seconds = self.compile.seconds, 0.0
        kept, notes = self.learner.take_kept(), list(self.notes)
        self.notes.clear()
        return Report(self.comm.rank, chunk, columns, self.results.own, seconds, list(self.bad), *kept, notes)

    def _say(self, doing: str) -> None:
        "Keep for whoever watches what this rank does now."
        self.moves, self.doing = self.moves + 1, doing

    @property
    def step(self) -> int:
        "Optimizer steps done."
        return self.learner.global_step

    def _enter(self, chunk: Chunk) -> None:
        "Set the Learner to the chunk's place, and begin to count."
        self.chunk, self.bad, self.data_seconds = chunk, list[tuple[str, str]](), 0.0
        self.started, self.waited = time.perf_counter(), self.comm.seconds
        self.learner.epoch, self.learner.global_step = chunk.epoch, chunk.step
        self.results.reset()
        self.guard.probe = chunk.probe
        self.turn_to(chunk.train)
        self.learner.take_kept()  # what a chunk that came to no end has left

    def _batch(self, batch: Readable, part: LocalPart, hypers: dict[str, float]) -> None:
        "One global batch, of which `batch` has this rank's samples, and behind them those they are mixed with."
        self._set(hypers, part)
        if self.compile is not None:  # smaller ones come once an epoch, ones with gaps in any size
            self.compile.worth = part.n == self.job.batch_size and not batch.bad
        if self.learner.model.training:
            self.statistics.keep()
        own = self.results.own
        try:
            self._parts(batch)
        except BaseException as error:
            self._undo(own)
            if isinstance(error, NotFinite):
                told = self._explain(f"{error}", batch)
                other = PeerLost(f"numbers of another rank are not finite at step {self.step}")
                raise (NotFinite(f"{told}; {ADVICE}") if told else other) from None
            self._redo(error, batch)
        self.whole = True
        if self.guard.skipped:
            self._note_skipped(batch)

    def _explain(self, what: str, batch: Readable) -> str:
        "What this rank has to say of a batch that all have refused: nothing, if others are to blame."
        own = self.results.own
        if self.compile is not None:
            self.compile.worth = False
        try:
            return self.guard.explain(what, self.comm, lambda: self._parts(batch, to_step=False))
        finally:
            self._undo(own)

    def _note_skipped(self, batch: Readable) -> None:
        "Say what is known of a step that was skipped, if this rank is to blame."
        self.learner.global_step -= 1  # which decides what is dropped, cropped and mixed
        try:
            if told := self._explain(self.guard.skipped, batch):
                self.notes.append(f"skipped by rank {self.comm.rank}: {told}")
        finally:
            self.learner.global_step += 1

    def _redo(self, error: BaseException, batch: Readable) -> None:
        "Do a batch again, without the compiled code that failed in it; raise `error` if that is not what it was."
        if self.compile is None or not isinstance(error, Exception) or isinstance(error, PeerLost | UserError):
            raise error
        if not self.compile.failed(error):
            raise error
        if self.compile.shared:  # the others wait for this rank in the midst of the step: all begin it again
            raise PeerLost(f"step {self.step} is begun again, uncompiled: {cause_of(error)}") from error
        error.__traceback__ = error.__cause__ = error.__context__ = None  # frames hold memory, maybe all there is
        self._parts(batch)

    def _parts(self, batch: Readable, to_step: bool = True) -> None:
        """The batch in as many parts as the job says, and behind the last of them, unless not `to_step`, the step.

        Rows are dealt to the parts in turn, so that a part has the same samples at any world size, which is what
        BatchNorm sees at once, and each rank has its share of it.
        """
        learner, parts = self.learner, self.job.accumulate if self.learner.model.training else 1
        for number in range(parts):
            part = dealt(batch, number, parts)
            learner.last_part = self.reducer.last_part = to_step and number == parts - 1
            learner.batch, learner.rows = (part.inputs, part.targets), part.rows
            learner.one_batch()

    @torch.no_grad()
    def _undo(self, own: int) -> None:
        "Be as before the batch that failed: an update comes behind all that can fail, BatchNorm's statistics do not."
        if self.learner.model.training:
            self.statistics.put_back()
        self.reducer.reset()
        self.results.own, self.guard.skipped = own, ""

    def _set(self, hypers: dict[str, float], part: LocalPart) -> None:
        "Tell the optimizer, and the callbacks that change pictures, what this step is about."
        numbers = dict(hypers)
        size, body, frozen = (numbers.pop(name, None) for name in ("size", "body_lr", "frozen"))
        self.learner.opt.set(**numbers)
        if self.job.fine_tune and hypers and self.frozen != bool(frozen):
            self.frozen = bool(frozen)
            self.learner.freeze_to(-1 if self.frozen else 0)
        if body is not None:
            self.learner.opt.set(lr=[body, numbers["lr"]])
        for cb in self.learner.cbs:
            if isinstance(cb, Mix):
                cb.place = part.mine, part.n
            if size and isinstance(cb, SetupLearner) and isinstance(cb.augment, Warp):
                cb.augment.train_size = int(size)

    def _begin_update(self, params: object) -> None:
        self.whole = False

    def load(self, snapshot: dict[str, np.ndarray]) -> None:
        "See Replica."
        self.whole = False
        super().load(snapshot)
        self.whole = True

    def _average_statistics(self, params: object) -> None:
        "With statistics of local batches, running ones are averaged: their updates are linear, so all is kept."
        self.statistics.apply(self.comm.sum_)
        self.comm.finish()
        self.statistics.apply(lambda flat: flat.div_(self.comm.world_size))

    def unreadable(self, chunk: Chunk, rank: int, world_size: int) -> list[tuple[str, str]]:
        "The images of a chunk that a rank which is gone has left out, files and reasons."
        data = LocalBatches(replace(self.job, on_device=False), rank, world_size, self.threads)
        stream = data.open(chunk)
        found = [bad for _ in chunk.hypers for bad in own_bad(*next(stream))]
        data.close()
        return found

    def samples(self, n: int) -> tuple[np.ndarray, list[int]]:
        "The first `n` training images as step 0 sees them, but at the last size: bytes (n, *size, channels); classes."
        inputs, targets = self._first_images(self.learner.model, n, torch.device("cpu"))
        return self.job.normalize.invert(inputs).numpy(), targets.tolist()

    def _first_images(self, model: Module, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        "Inputs and targets as in step 0, but at the last size and unmixed; the same on every rank."
        order = epoch_order(len(self.job.train), self.job.seed, 0)[:n]
        batch = collate_readable(self.data.dataset(True), order)
        view = Learner(model, None, cbs=callbacks(self.job, device)[:1])
        view.batch, view.rows = (batch.inputs, batch.targets), batch.rows
        view("before_batch")
        return view.batch

    def close(self) -> None:
        "End the loaders' threads and leave the group."
        self.data.close()
        self.comm.close()
