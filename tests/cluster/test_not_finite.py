"Numbers that go wrong: noticed by all ranks at the same step, before they reach the weights."

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cluster.comms import Solo
from cluster.faults import NotFinite, WorkersFailed
from cluster.messages import Chunk, Job
from cluster.ray_gang import RayGang
from cluster.worker import Worker
from learner.data.loader import epoch_order
from learner.finite import first_not_finite
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
    assert first_not_finite(model, x) is None
    with torch.no_grad():
        model[2].parameters()[0][0] = float("nan")
    name = first_not_finite(model, x)
    assert name is not None and name.startswith("2")


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
    assert np.isnan(report.batches["loss"][0]) and report.counts == [8.0]
    assert np.isfinite(one.run(Chunk(True, 0, 3, 3, (FINE,))).losses).all()
    one.close()


def test_a_probe_may_see_infinity(nan_job: Job) -> None:
    one = solo(nan_job)
    report = one.run(Chunk(True, 0, 0, 0, ({"lr": 1e30},) * 4, probe=True))
    assert not np.isfinite(report.losses).all()
    one.close()


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_all_ranks_decide_alike(ray_gang: RayGang, nan_job: Job, on_nan: str) -> None:
    mine = replace(nan_job, on_nan=on_nan)
    ray_gang.start(mine, 3)

    def arm(process: Any) -> None:
        def infinite(module: Any, inputs: tuple, output: Any) -> Any:
            worker = process.worker
            return output * float("inf") if worker.step == 4 and worker.learner.model.training else output

        if process.rank == 1:
            process.worker.learner.model[1].register_forward_hook(infinite)

    ray_gang.ray.get([member.actor.__ray_call__.remote(arm) for member in ray_gang.seated])
    chunk = Chunk(True, 0, 0, 0, (FINE,) * 7)
    if on_nan == "skip":
        (reports,) = ray_gang.stream([chunk])
        assert [np.isfinite(loss) for loss in reports[0].losses] == [step != 4 for step in range(7)]
        assert len(set(ray_gang.call("fingerprint"))) == 1
        return
    with pytest.raises(WorkersFailed) as caught:
        list(ray_gang.stream([chunk]))
    cause = caught.value.failures[0]
    assert cause.kind == "nan" and "at step 4" in cause.message
    assert ray_gang.salvage() is not None or cause.rank >= 0
