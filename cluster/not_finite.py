"What becomes of a step whose loss or gradient is not finite: all ranks decide alike, and who is to blame says so."

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from cluster.comms import Comm
from cluster.faults import NotFinite
from cluster.messages import Job
from cluster.rank_learner import RankLearner, RankResults
from cluster.shards import local_batch
from learner.batchnorm import unshared
from learner.callbacks.activations import ActivationStats
from learner.data.loader import epoch_order
from learner.finite import spoiled_gradients, spoiled_outputs
from learner.optimizer import SkipStep
from learner.statistics import Statistics

ADVICE = "begin anew with a lower --lr, or auto, or go on with another --on-nan (stop, skip, rollback)"


def files_of(job: Job, epoch: int, batch: int, rank: int = 0, world_size: int = 1) -> list[str]:
    "The files of a training batch, or a rank's part of them."
    n = len(job.train)
    order = epoch_order(n, job.seed, epoch)
    return [job.train.files[order[place]] for place in local_batch(n, job.batch_size, batch, rank, world_size).places]


def some(files: Sequence[str]) -> str:
    "The first three, and how many more there are."
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


class FiniteGuard:
    """Lets no number into the weights that is not finite.

    1. `look`, in the optimizer's step, sees the sums over all ranks, so that all do the same: skip, or raise NotFinite.
       On a GPU, which has to be waited for, it does not where `on_nan` is stop: the driver looks, at the losses.
    2. Sums do not say whose numbers they were spoiled by. So in `explain` each rank goes through its part of the batch
       once more, by itself: nothing is reduced, and BatchNorm sees its samples alone. Healthy steps cost nothing.
    3. One sum over all ranks then tells who is to blame, and those alone name their files and the layer.

    fp16's scaler sees to gradients, whose overflow is nothing out of the ordinary there.
    """

    def __init__(self, job: Job, learner: RankLearner, results: RankResults, statistics: Statistics) -> None:
        self.job, self.learner, self.results, self.statistics = job, learner, results, statistics
        self.probe = False  # such as the LR finder, which wants to see them
        self.skipped = ""  # what `look` has seen, where it had the step skipped

    def look(self, params: object) -> None:
        "Skip the step, or raise NotFinite, if the loss or a gradient of all ranks together is not finite."
        if self.probe or self._fine():
            return
        count, loss = self.results.reducer.tail[:2]
        mean = float(loss / count.clamp(min=1))
        what = f"the loss became {mean}" if not math.isfinite(mean) else "a gradient became infinite"
        what += f" at step {self.learner.global_step} (learning rate {self.learner.opt.lr:g})"
        if self.job.on_nan != "skip":
            raise NotFinite(what)
        self.skipped = what
        self.statistics.put_back()
        loss.fill_(float("nan"))  # so that the driver hears of it, also where the loss was finite
        raise SkipStep

    def _fine(self) -> bool:
        "Whether what has come together of loss and gradients is finite."
        reducer = self.results.reducer
        return math.isfinite((reducer.flat if self.job.precision != "fp16" else reducer.tail).sum())

    def explain(self, what: str, comm: Comm, again: Callable[[], None]) -> str:
        """What this rank has to say of a step that all have refused: nothing, if others are to blame.

        `again` goes through this rank's part of the batch as before, but leaves the sums that it comes to with it.
        """
        own_loss = not bool(self.results.own_loss.isfinite())
        callbacks = self.learner.cbs
        self.learner.cbs = [cb for cb in callbacks if not isinstance(cb, ActivationStats)]  # it has seen the step
        try:
            with unshared(self.learner.model), spoiled_outputs(self.learner.model) as layers:
                again()
        finally:
            self.learner.cbs = callbacks
        own = not self._fine()
        if not to_blame([own_loss, own], comm, self.results.reducer.flat.device):
            return ""
        files = files_of(self.job, self.learner.epoch, self.learner.num, comm.rank, comm.world_size)
        return f"{what}, in the batch of {some(files)}; {self._where(layers)}"

    def _where(self, layers: Sequence[str]) -> str:
        if layers:
            return f"the first layer whose output is not finite is {layers[0]}"
        if layers := spoiled_gradients(self.learner.model):
            return f"going backward, the first layer whose gradient is not finite is {layers[0]}"
        return "computed again by each rank for itself, all is finite"


def to_blame(signs: Sequence[bool], comm: Comm, device: torch.device) -> bool:
    """Whether this rank is to blame, by the first of these signs that tells some ranks from others; if none does, all.

    The loss in the step itself tells most, unless BatchNorm has carried one rank's numbers to all.
    """
    counts = torch.tensor(signs, dtype=torch.float32, device=device)
    comm.sum_(counts)
    comm.finish()
    telling = (mine for mine, count in zip(signs, counts.tolist()) if 0 < count < comm.world_size)
    return next(telling, True)
