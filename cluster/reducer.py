"Gradients in one contiguous buffer, summed over all ranks in buckets while backward still runs."

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cluster.comms import Comm
from learner.flat import places, views
from learner.module import Parameter

BUCKET = 8 * 2**20  # bytes: smaller ones cost more messages, larger ones leave more to do once backward has ended


@dataclass
class Bucket:
    "Neighbouring parameters, their part of the buffer, and how many of their gradients are still to come."

    params: Sequence[Parameter]
    flat: Tensor
    missing: int = 0


class GradientSum:
    """The `reduce` of an optimizer: turns each rank's summed gradients into the mean over the global batch.

    Gradients are views of one flat buffer, in the strides of their parameters, and stay where autograd adds them up:
    1. From its end, which backward fills first, the buffer is cut into buckets of `bucket_bytes` or a little more.
    2. As soon as all gradients of a bucket are there, its all-reduce starts. Buckets start in their order, so that all
       ranks' messages meet. Where a batch comes in parts, only the one that `last_part` announces starts any.
    3. The optimizer's step calls this object: it starts what is left, waits for all, and only then divides.
    The buffer's end, in the bucket that goes first, has two things more that are summed with it. `weight` is what the
    samples count for, one each or by their classes, and what the gradients are divided by: ranks may differ in how many
    they have, none included. `tail` has `extra` numbers for whoever needs them. Both are added to before the last
    backward. A model of one bucket has nothing to overlap and is sent in the step. Assigning `comm` forgets what was
    under way: a step that failed has changed nothing else but BatchNorm's statistics, which the worker puts back.
    """

    def __init__(self, params: Sequence[Parameter], comm: Comm, bucket_bytes: int = BUCKET, extra: int = 0) -> None:
        starts, length = places(params)
        self.flat = torch.zeros(length + 1 + extra, dtype=params[0].dtype, device=params[0].device)
        self.gradients, self.weight, self.tail = self.flat.split([length, 1, extra])
        self.views = views(self.flat, params)
        for p, view in zip(params, self.views):
            p.grad = view
        self.buckets = self._cut(params, starts, bucket_bytes)
        self.comm, self.last_part = comm, True
        if len(self.buckets) > 1:
            bucket_of = {p: bucket for bucket in self.buckets for p in bucket.params}
            for p, view in zip(params, self.views):
                p.register_post_accumulate_grad_hook(partial(self._arrived, bucket_of[p], view))

    def _cut(self, params: Sequence[Parameter], starts: Sequence[int], bucket_bytes: int) -> list[Bucket]:
        "Buckets from the end of the buffer to its start."
        buckets, end, last = [], len(self.flat), len(params)
        for first in reversed(range(len(params))):
            if (end - starts[first]) * self.flat.element_size() >= bucket_bytes or first == 0:
                buckets.append(Bucket(params[first:last], self.flat[starts[first] : end]))
                end, last = starts[first], first
        return buckets

    @property
    def comm(self) -> Comm:
        "The ranks that gradients are summed over."
        return self._comm

    @comm.setter
    def comm(self, comm: Comm) -> None:
        self._comm = comm
        self.reset()

    def reset(self) -> None:
        "Forget gradients, and what has been started of a step that came to no end."
        self.flat.zero_()
        self._waiting: deque[Bucket] | None = None

    def _begin(self) -> deque[Bucket]:
        "The buckets that this step has to send: those with something to train, and the one that has the count."
        for bucket in self.buckets:
            bucket.missing = sum(p.requires_grad for p in bucket.params)
        return deque(b for number, b in enumerate(self.buckets) if b.missing or number == 0)

    def _arrived(self, bucket: Bucket, view: Tensor, p: Parameter) -> None:
        "A gradient is complete: start its bucket, and those behind it that only waited for this one."
        if p.grad is not view or not self.last_part:
            return
        if self._waiting is None:
            self._waiting = self._begin()
        bucket.missing -= 1
        while self._waiting and not self._waiting[0].missing:
            self._comm.start_sum_(self._waiting.popleft().flat)
        if bucket.missing < 0:
            raise RuntimeError("a second backward before the step: set `last_part` before the last one only")

    def __call__(self, params: Sequence[Parameter]) -> None:
        "Sum gradients, weight and tail over all ranks, and divide the gradients by the weight."
        if any(p.grad is not view for p, view in zip(params, self.views, strict=True)):
            raise RuntimeError("a gradient was replaced, not filled: clear gradients with optimizer.zero_grad()")
        for bucket in self._begin() if self._waiting is None else self._waiting:
            self._comm.start_sum_(bucket.flat)
        self._comm.finish()
        self._waiting = None
        self.gradients /= torch.where(self.weight > 0, self.weight, torch.ones_like(self.weight))

    def take_tail(self) -> Tensor:
        "A copy of the tail; it and the weight begin anew."
        taken = self.tail.clone()
        self.flat[len(self.gradients) :].zero_()
        return taken
