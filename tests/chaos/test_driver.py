"Faults that the driver notices, or makes up for: the real one, on the shared workers."

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import orchestrator.range_test
from cluster.messages import Job
from cluster.ray_gang import RayGang
from learner.lr_range import RangeTest
from orchestrator.driver import Plan as Clock
from orchestrator.driver import Replicas, train
from orchestrator.range_test import range_test
from orchestrator.run_folder import RunFolder
from orchestrator.terminal import Terminal
from orchestrator.tracker import Tracker
from tests.chaos.injector import Fault, Plan
from tests.chaos.runs import STEPS
from tests.commands import run_here, undisturbed
from tests.results import history, scalars

CLOCK = Clock(n_train=53, n_valid=29, batch_size=8, epochs=1, schedule="constant", lr=0.02)


def drive(gang: RayGang, folder: Path) -> None:
    "An epoch as `launch` has it."
    tracker = Tracker(RunFolder.create(folder / "run"), Terminal())
    gang.notice = tracker.fault
    try:
        train(CLOCK, gang, tracker)
    finally:
        tracker.close()


def test_a_worker_that_crawls_is_named_and_kept(
    gang: RayGang, fault_plan: Plan, chaos_job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gang.start(chaos_job, 2)
    before = gang.locations
    fault_plan.write([Fault(1, step, "forward", "nap") for step in range(STEPS)])
    drive(gang, tmp_path)
    assert fault_plan.fired() == STEPS
    said = capsys.readouterr().out
    assert re.findall(r"^rank (\d) is slow: it works \d+ times as long", said, re.MULTILINE) == ["1"]
    assert gang.locations == before and "fault" not in said


def test_a_death_in_the_lr_finder_leaves_no_trace_either(
    gang: RayGang, fault_plan: Plan, chaos_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orchestrator.range_test, "RangeTest", partial(RangeTest, n_steps=20))
    found = []
    for faults in ([], [Fault(1, 8, "backward", "SIGKILL")]):
        gang.start(chaos_job, 3)
        fault_plan.write(faults)
        found.append((range_test(CLOCK, gang).losses, gang.call("fingerprint")))
        assert fault_plan.fired() == len(faults)
    assert found[0] == found[1]


def test_replicas_that_really_differ_stop_the_run(gang: RayGang, chaos_job: Job, tmp_path: Path) -> None:
    "One weight of one of three is another; all gradients are still the same."
    gang.start(chaos_job, 3)

    def change(process: Any) -> str:
        state = process.worker.learner.model.state_dict()
        name = [name for name, tensor in state.items() if tensor.is_floating_point() and "running" not in name][-1]
        state[name].view(-1)[0] += 0.5
        return name

    name = gang.ray.get(gang.seated[1].actor.__ray_call__.remote(change))
    with pytest.raises(Replicas, match=rf"differ after epoch 0, first in {re.escape(name)}: ranks \[1\] do not hold"):
        drive(gang, tmp_path)


def test_a_rollback_gets_over_it(
    gang: RayGang, on_ray_gang: None, fault_plan: Plan, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    "Back to the last epoch, at half the rate; what is left is one run, with each epoch and step once."
    fault_plan.write([Fault(1, STEPS + 2, "forward", "NaN")])
    options = "--arch simple_cnn_bn --size 16 --batch-size 8 --epochs 3 --lr 0.02 --schedule constant --momentum 0.9"
    places = ["--data", pictures, "--data-dir", tmp_path, "--runs", tmp_path, "--name", "run", "--cache", "off"]
    with undisturbed():
        ended = run_here(capsys, "launch", *options.split(), *places, "--cpus", 2, "--on-nan", "rollback")
    assert ended.code == 0
    assert f"at step {STEPS + 2} (learning rate 0.02)" in ended.err
    assert ended.err.count("back to the last checkpoint, at half the rate") == fault_plan.fired() == 1
    rows = history(tmp_path / "run" / "version_0")
    assert [(row["epoch"], row["lr"]) for row in rows] == [("0", "0.02"), ("1", "0.01"), ("2", "0.01")]
    assert all(float(value) < 10 for row in rows for value in row.values()), "finite"
    curves = scalars(tmp_path / "run" / "version_0")
    assert [step for step, _ in curves["train/loss"]] == list(range(3 * STEPS))
    assert [step for step, _ in curves["epoch/valid_loss"]] == [STEPS - 1, 2 * STEPS - 1, 3 * STEPS - 1]
    rates = [rate for _, rate in curves["train/lr"]]
    assert rates == pytest.approx([0.02] * STEPS + [0.01] * 2 * STEPS)
