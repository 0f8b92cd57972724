"""Workers on a GPU that is none: all tensors are where they must be, and no step waits for the device.

The numbers are those of a run on the CPU, bit for bit: what a GPU does by calls of its own comes to the same.
"""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.comms import Solo
from cluster.messages import Job, Report
from cluster.worker import Worker
from learner.batchnorm import BatchNorm
from learner.data.mix import MixConfig
from learner.dropout import dropouts
from learner.optim import OPTIMIZERS
from tests.cluster.conftest import chunks
from tests.pretend_gpu import pretended

ALL: dict[str, Any] = {
    "momentum": 0.9, "ema": 0.9, "clip": 1.0, "augment": "crop", "presize": 27, "label_smoothing": 0.1, "outcomes": 2,
}  # fmt: skip
DAILY: dict[str, dict[str, Any]] = {
    "on device": {**ALL, "on_device": True},
    "mixed parts": {**ALL, "accumulate": 2, "mix": MixConfig(mixup=0.4, cutmix=1.0)},
    "full": {"augment": "full", "presize": 30, "optimizer": "adamw"},
    "muon": {"optimizer": "muon", "weight_decay": 0.01},
    "groups": {
        "fine_tune": True,
        "decay_weights_only": True,
        "weight_decay": 0.01,
        "class_weights": (1.0, 2.0, 0.5, 1),
    },
}
NIGHTLY: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": name, "weight_decay": 0.01} for name in OPTIMIZERS if name != "muon"},
    "fed": ALL,
    "kept parts": {**ALL, "accumulate": 2, "on_device": True, "activations": True},
    "mixed": {**ALL, "mix": MixConfig(mixup=0.4, cutmix=1.0)},
    "lsuv": {"lsuv": True, "decay_weights_only": True},
    "bf16": {**ALL, "precision": "bf16"},
    "dropout": {"arch": "xresnet18", "mix": MixConfig(cutmix=1.0)},
}
CASES = [*DAILY, *(pytest.param(name, marks=pytest.mark.slow) for name in NIGHTLY)]


class Watched(Worker):
    "A worker that tells what was waited for in a chunk before its report, which must wait."

    def __init__(self, job: Job, device: str, waits: list[str]) -> None:
        super().__init__(job, Solo(), torch.device(device), 0)
        self.noted, self.in_steps = waits, list[str]()
        for layer in dropouts(self.learner.model):
            layer.p = 0.3

    def report(self) -> Report:
        self.in_steps += self.noted
        return super().report()


def run(job: Job, device: str, waits: list[str]) -> tuple[list[str], list[Any]]:
    "What was waited for in the steps behind the first; what came of training, validation, and a state that moved."
    worker = Watched(job, device, waits)
    (train, *_), (valid, *_) = chunks(job, True, 0, 4), chunks(job, False, 0, 9)
    worker.run(replace(train, hypers=train.hypers[:1]))
    worker.in_steps.clear()
    reports = []
    for chunk in (replace(train, first=1, step=1, hypers=train.hypers[1:]), valid):
        waits.clear()
        reports.append(worker.run(chunk))
    worker.load(worker.snapshot())
    told = [[report.batches, report.outcomes and report.outcomes.ranked.tolist()] for report in reports]
    return worker.in_steps, [*told, worker.samples(4)[1], worker.state()]


@pytest.mark.parametrize("recipe", CASES)
def test_it_is_the_same_run_and_nothing_is_waited_for(job: Job, recipe: str) -> None:
    job = replace(job, **{"arch": "simple_cnn_bn", **(DAILY | NIGHTLY)[recipe]})
    _, (*expected, state) = run(job, "cpu", [])
    with pretended() as waits:
        waited, (*found, own) = run(job, "cuda", waits)
    assert waited == []
    assert found == expected
    for name, array in state.items():
        np.testing.assert_array_equal(own[name], array, err_msg=name)


@pytest.mark.parametrize("how", [{"precision": "fp16"}, {"on_nan": "skip"}])
def test_what_must_be_known_in_a_step_is_waited_for_once(job: Job, how: dict[str, Any]) -> None:
    with pretended() as waits:
        waited, _ = run(replace(job, **how), "cuda", waits)
    assert waited == ["aten._local_scalar_dense.default"] * 3


def backward_reduce(grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, *wanted: bool) -> Any:
    "torch's, which only GPUs have."
    total = grad.sum((0, 2, 3))
    product = (grad * (x - mean.view(1, -1, 1, 1))).sum((0, 2, 3))
    return total, product, product * invstd, total


def backward_elemt(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, total: Tensor, product: Tensor, count: Tensor
) -> Tensor:
    "torch's, which only GPUs have."
    assert count.dtype == torch.int32
    wide = [(each / count).view(1, -1, 1, 1) for each in (total, product * invstd.square())]
    centred = x - mean.view(1, -1, 1, 1)
    return (grad - wide[0] - centred * wide[1]) * (invstd * weight).view(1, -1, 1, 1)


def test_a_shared_batchnorm_goes_back_by_the_kernels_for_it() -> None:
    "Of two devices with the same batch: each has what one has alone."
    x, grad = torch.randn(2, 6, 5, 4, 4, generator=torch.Generator().manual_seed(1)).unbind()
    found = []
    with (
        pretended() as waits,
        patch.object(torch, "batch_norm_backward_reduce", backward_reduce),
        patch.object(torch, "batch_norm_backward_elemt", backward_elemt),
    ):
        for shared in (False, True):
            norm, own = BatchNorm(5).to("cuda"), x.to("cuda").requires_grad_()
            norm.sum_ = (lambda total: total.mul_(2)) if shared else None
            given = grad.to("cuda")
            waits.clear()
            norm(own).backward(given)
            assert waits == []
            found.append([each.cpu() for each in (own.grad, norm.weight.grad, norm.bias.grad, norm.running_mean)])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)
