"Numbers that go wrong: noticed by all ranks at the same step, before they reach the weights."

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cluster.comms import Solo
from cluster.faults import NotFinite, WorkersFailed
from cluster.messages import Chunk, Job
from cluster.not_finite import ADVICE, files_of, to_blame
from cluster.ray_gang import RayGang
from cluster.worker import Worker
from learner.data.loader import epoch_order
from learner.data.mix import MixConfig
from learner.finite import spoiled_outputs
from learner.models import build
from learner.module import Module

FINE = {"lr": 0.05}


def spoil(worker: Worker, at: int) -> None:
    "Have the worker's second layer give infinity at that step."

    def infinite(module: Module, inputs: tuple, output: Any) -> Any:
        return output * float("inf") if worker.step == at and worker.learner.model.training else output

    worker.learner.model[1].register_forward_hook(infinite)


@pytest.fixture
def nan_job(job: Job) -> Job:
    return replace(job, arch="simple_cnn_bn", momentum=0.9, ema=0.9)


def solo(job: Job) -> Worker:
    return Worker(job, Solo(), torch.device("cpu"), 1)


def test_the_first_layer_is_named() -> None:
    model = build("simple_cnn_bn", 3, 4)
    x = torch.rand(4, 3, 24, 24)
    with spoiled_outputs(model) as names:
        model(x)
    assert not names
    with torch.no_grad():
        model[2].parameters()[0][0] = float("nan")
    with spoiled_outputs(model) as names:
        model(x)
    assert names[0].startswith("2")


def test_a_step_that_would_spoil_the_weights_is_refused(nan_job: Job) -> None:
    one, other = solo(nan_job), solo(nan_job)
    spoil(one, 3)
    with pytest.raises(NotFinite) as caught:
        one.run(Chunk(True, 0, 0, 0, (FINE,) * 7))
    text = str(caught.value)
    assert "the loss became nan at step 3 (learning rate 0.05), in the batch of " in text
    files = [nan_job.train.files[i] for i in epoch_order(53, nan_job.seed, 0)[24:32]]
    assert all(file in text for file in files[:3]) and "5 more" in text
    assert "--lr" in text and "--on-nan" in text
    other.run(Chunk(True, 0, 0, 0, (FINE,) * 3))
    assert one.fingerprint() == other.fingerprint(), "the state of the last completed step"
    assert len(one.report().losses) == 3
    one.close(), other.close()


def test_a_skipped_step_leaves_only_its_number(nan_job: Job) -> None:
    one = solo(replace(nan_job, on_nan="skip", ema=0.0))
    spoil(one, 2)
    one.run(Chunk(True, 0, 0, 0, (FINE,) * 2))
    before = one.fingerprint()
    report = one.run(Chunk(True, 0, 2, 2, (FINE,)))
    assert one.fingerprint() == before
    assert np.isnan(report.batches["loss"][0]) and report.counts == [8.0] and report.own == 8
    assert "the first layer whose output is not finite is 2." in report.notes[0]
    assert np.isfinite(one.run(Chunk(True, 0, 3, 3, (FINE,))).losses).all()
    one.close()


def test_a_skipped_steps_layers_are_counted_once(nan_job: Job) -> None:
    "Who looks for the culprit goes through the batch once more."
    counts = []
    for spoiled in (False, True):
        one = solo(replace(nan_job, on_nan="skip", ema=0.0, activations=True))
        if spoiled:
            spoil(one, 0)
        found = one.run(Chunk(True, 0, 0, 0, (FINE,))).activations[0]
        counts.append({name: sums[0] for name, sums in found.items()})
        one.close()
    assert counts[0] == counts[1] and counts[0]


def test_a_probe_may_see_infinity(nan_job: Job) -> None:
    one = solo(nan_job)
    report = one.run(Chunk(True, 0, 0, 0, ({"lr": 1e30},) * 4, probe=True))
    assert not np.isfinite(report.losses).all()
    one.close()


class Others(Solo):
    "Two others, which count so much in each sum."

    world_size = 3

    def __init__(self, *counts: float) -> None:
        self.counts = torch.tensor(counts)

    def sum_(self, tensor: torch.Tensor) -> None:
        tensor += self.counts


@pytest.mark.parametrize(
    ("signs", "others", "blamed"),
    [
        ((True, True), (0, 0), True),
        ((False, True), (1, 0), False),  # it is the loss in the step itself that tells
        ((True, False), (2, 1), False),  # BatchNorm had carried it to all
        ((True, True), (2, 1), True),
        ((False, False), (0, 1), False),
        ((False, False), (0, 0), True),  # nobody's own: only the sum is too large
        ((True, True), (2, 2), True),
    ],
)
def test_who_is_to_blame(signs: tuple[bool, bool], others: tuple[int, int], blamed: bool) -> None:
    assert to_blame(signs, Others(*others), torch.device("cpu")) == blamed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_layer_on_the_way_back_is_named(nan_job: Job, precision: str) -> None:
    "Also where a batch goes through the model in parts, of which the first one has it."
    one = solo(replace(nan_job, accumulate=2, precision=precision))
    calls = []

    def infinite(module: Module, inputs: tuple, output: Any) -> None:
        if one.step == 3 and one.learner.model.training:
            calls.append(one.learner.last_part)
            if len(calls) % 2:
                output.register_hook(lambda grad: grad * float("inf"))

    one.learner.model[1].register_forward_hook(infinite)
    with pytest.raises(NotFinite) as caught:
        one.run(Chunk(True, 0, 0, 0, (FINE,) * 7))
    assert calls == [False, True, False, False], "the second time, there is no step"
    text = str(caught.value)
    assert "a gradient became infinite at step 3 (learning rate 0.05), in the batch of " in text
    assert "going backward, the first layer whose gradient is not finite is 1." in text
    assert one.step == len(one.report().losses) == 3
    one.close()


def test_a_loss_that_is_infinite_in_one_part_is_that_of_the_batch(nan_job: Job) -> None:
    one = solo(replace(nan_job, accumulate=2))

    def infinite(module: Module, inputs: tuple, output: Any) -> Any:
        return output * float("inf") if one.step == 3 and not one.learner.last_part else output

    one.learner.model[1].register_forward_hook(infinite)
    with pytest.raises(NotFinite, match=r"the loss became nan at step 3 .* the first layer whose output is not finite"):
        one.run(Chunk(True, 0, 0, 0, (FINE,) * 7))
    assert not one.results.own_loss.isfinite()
    one.close()


def arm(gang: RayGang, rank: int, at: int, what: str) -> None:
    "Have the second layer of a rank give infinity at that step, forward or backward."

    def spoil(process: Any) -> None:
        def infinite(module: Any, inputs: tuple, output: Any) -> Any:
            worker = process.worker
            if worker.step != at or not worker.learner.model.training:
                return None
            if what == "loss":
                return output * float("inf")
            output.register_hook(lambda grad: grad * float("inf"))
            return None

        if process.rank == rank:
            process.worker.learner.model[1].register_forward_hook(infinite)

    gang.ray.get([member.actor.__ray_call__.remote(spoil) for member in gang.seated])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_who_is_to_blame_says_so(ray_gang: RayGang, nan_job: Job, what: str) -> None:
    "With all that carries numbers from one rank to another, or a batch through the model in more than one go."
    mine = replace(nan_job, accumulate=2, mix=MixConfig(mixup=0.4))
    ray_gang.start(mine, 3)
    arm(ray_gang, 1, 4, what)
    with pytest.raises(WorkersFailed) as caught:
        list(ray_gang.stream([Chunk(True, 0, 0, 0, (FINE,) * 7)]))
    assert [(failure.rank, failure.kind) for failure in caught.value.failures if failure.kind != "peer"] == [(1, "nan")]
    text = caught.value.failures[0].message
    files = files_of(mine, 0, 4, rank=1, world_size=3)
    assert text.endswith(ADVICE) and all(file in text for file in files)
    became, layer = {
        "loss": ("the loss became nan", "output is not finite is 2."),
        "gradient": ("a gradient became infinite", "gradient is not finite is 1."),
    }[what]
    assert f"{became} at step 4 (learning rate 0.05), in the batch of {files[0]}" in text
    assert layer in text
    salvaged = ray_gang.salvage()
    assert salvaged is not None
    ray_gang.start(mine, 3)
    list(ray_gang.stream([Chunk(True, 0, 0, 0, (FINE,) * 4)]))
    for name, array in ray_gang.call_first("snapshot").items():
        np.testing.assert_array_equal(salvaged[name], array)


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_all_ranks_decide_alike(ray_gang: RayGang, nan_job: Job, on_nan: str) -> None:
    mine = replace(nan_job, on_nan=on_nan)
    ray_gang.start(mine, 3)
    arm(ray_gang, 1, 4, "loss")
    chunk = Chunk(True, 0, 0, 0, (FINE,) * 7)
    if on_nan == "skip":
        (reports,) = ray_gang.stream([chunk])
        assert [np.isfinite(loss) for loss in reports[0].losses] == [step != 4 for step in range(7)]
        assert len(set(ray_gang.call("fingerprint"))) == 1
        assert [len(report.notes) for report in reports] == [0, 1, 0], "who is to blame says so"
        assert "skipped by rank 1: the loss became nan at step 4 (learning rate 0.05)" in reports[1].notes[0]
        assert all(file in reports[1].notes[0] for file in files_of(mine, 0, 4, rank=1, world_size=3))
        return
    with pytest.raises(WorkersFailed) as caught:
        list(ray_gang.stream([chunk]))
    cause = caught.value.failures[0]
    assert cause.kind == "nan" and "at step 4" in cause.message
    assert ray_gang.salvage() is not None or cause.rank >= 0
