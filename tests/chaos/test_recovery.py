"Whatever befalls a worker, wherever in a step: the run goes on, and is bit for bit the one that nothing befell."

import os
import random
import signal
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cluster.faults import NoneLeft, WorkersFailed
from cluster.messages import Chunk, Job
from cluster.ray_gang import RayGang
from learner.data.files import Labelled
from tests.chaos.injector import DEADLY, PHASES, Fault, Plan
from tests.chaos.runs import STEPS, Run, chunks, columns, drive


def test_two_at_once(gang: RayGang, fault_plan: Plan, chaos_job: Job, healthy: Run) -> None:
    gang.start(chaos_job, 3)
    fault_plan.write([Fault(0, 4, "forward", "SIGKILL"), Fault(2, 4, "update", "SIGKILL")])
    assert drive(gang) == healthy


@pytest.mark.parametrize("phase", ["_replace", "_regroup", "_hand_over"])
def test_a_survivor_dies_in_the_recovery(
    gang: RayGang, fault_plan: Plan, chaos_job: Job, healthy: Run, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    gang.start(chaos_job, 3)
    fault_plan.write([Fault(0, 4, "backward", "SIGKILL")])
    go_on, survivor = getattr(gang, phase), [gang.places[2].pid]

    def kill_and_go_on(*args: Any) -> Any:
        while survivor:
            os.kill(survivor.pop(), signal.SIGKILL)
        return go_on(*args)

    monkeypatch.setattr(gang, phase, kill_and_go_on)
    assert drive(gang) == healthy
    assert not survivor


def soak(gang: RayGang, fault_plan: Plan, job: Job, faults: int, seed: int) -> None:
    "A run in which every epoch has faults of any kind at any place."
    rng, epochs = random.Random(seed), faults // 2
    gang.start(job, 3)
    fault_plan.write([])
    wanted = drive(gang, epochs)
    plan = []
    for number in range(faults):
        phase = rng.choice(PHASES[:-2])  # any step has these
        plan.append(Fault(rng.randrange(3), number * STEPS // 2 + rng.randrange(3), phase, rng.choice(DEADLY)))
    gang.start(job, 3)
    fault_plan.write(plan)
    assert drive(gang, epochs) == wanted
    assert fault_plan.fired() == faults


def test_twenty_faults_in_one_run(gang: RayGang, fault_plan: Plan, chaos_job: Job) -> None:
    soak(gang, fault_plan, chaos_job, 20, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_two_hundred_faults_in_ten_runs(gang: RayGang, fault_plan: Plan, chaos_job: Job, seed: int) -> None:
    soak(gang, fault_plan, chaos_job, 20, seed)


@pytest.mark.slow
def test_a_kill_at_each_step_of_a_run(gang: RayGang, fault_plan: Plan, chaos_job: Job) -> None:
    gang.start(chaos_job, 3)
    wanted = drive(gang, 5)
    for step in range(5 * STEPS):
        gang.start(chaos_job, 3)
        fault_plan.write([Fault(step % 3, step, PHASES[step % 5], "SIGKILL")])
        assert drive(gang, 5) == wanted, f"killed at step {step}"
        assert fault_plan.fired() == 1


def test_all_at_once_leave_nothing(gang: RayGang, fault_plan: Plan, chaos_job: Job) -> None:
    gang.start(chaos_job, 3)
    fault_plan.write([Fault(rank, 3, "backward", "SIGKILL") for rank in range(3)])
    with pytest.raises(NoneLeft, match="process died"):
        drive(gang)
    assert gang.salvage() is None


def test_the_same_error_twice_is_a_bug(gang: RayGang, fault_plan: Plan, chaos_job: Job, healthy: Run) -> None:
    gang.start(chaos_job, 3)
    fault_plan.write([Fault(1, 5, "backward", "raise", times=2)])
    with pytest.raises(WorkersFailed, match=r"(?s)RuntimeError: injected.*the same error came at step 5 before"):
        drive(gang)
    salvaged = gang.salvage()
    assert salvaged is not None, "the others hold the last completed step"
    fault_plan.write([])
    gang.start(chaos_job, 3)
    gang.call("load", salvaged)
    rest = Chunk(True, 0, 5, 5, ({"lr": 0.1 / 6}, {"lr": 0.1 / 7}))
    (reports,) = gang.stream([rest])
    assert columns(reports) == healthy.trained[5:STEPS], "with which the run goes on"


def test_too_many_faults_end_the_run(gang: RayGang, fault_plan: Plan, chaos_job: Job) -> None:
    gang.start(chaos_job, 3)
    gang.tolerance = replace(gang.tolerance, max_restarts=1)
    fault_plan.write([Fault(1, 2, "data", "exit"), Fault(2, 5, "data", "exit")])
    with pytest.raises(WorkersFailed, match="2 faults of the kind 'died' are more than --max-restarts 1"):
        drive(gang)
    assert gang.salvage() is not None


def test_fewer_go_on_and_grow_again(gang: RayGang, fault_plan: Plan, chaos_job: Job, healthy: Run) -> None:
    gang.start(chaos_job, 3)
    gang.tolerance = replace(gang.tolerance, wait=0.0)
    spare = gang.crew.take(60.0)  # out of reach
    assert spare is not None
    fault_plan.write([Fault(0, 2, "reduce", "SIGKILL")])
    first = [row for reports in gang.stream(chunks(True, 0, 3)) for row in columns(reports)]
    assert gang.world_size == 2
    np.testing.assert_allclose(first, healthy.trained[:STEPS], rtol=1e-4)
    gang.crew.bench.append(spare)
    gang.grow()
    assert gang.world_size == 3
    second = [row for reports in gang.stream(chunks(True, 1, 3)) for row in columns(reports)]
    np.testing.assert_allclose(second, healthy.trained[STEPS:], rtol=1e-3)
    assert len(set(gang.call("fingerprint"))) == 1


def test_whoever_is_to_stop_waits_for_no_replacement(gang: RayGang, fault_plan: Plan, chaos_job: Job) -> None:
    "For an hour, here; what the survivors hold can be saved at once."
    gang.start(chaos_job, 3)
    gang.tolerance = replace(gang.tolerance, wait=3600.0)
    spare = gang.crew.take(60.0)  # out of reach
    assert spare is not None
    hire, hired = gang.crew.hire, list[int]()
    gang.crew.hire = hired.append  # type: ignore[method-assign]  # and nobody else ever comes up
    gang.heed(lambda: bool(hired))
    fault_plan.write([Fault(1, 2, "forward", "SIGKILL")])
    try:
        with pytest.raises(WorkersFailed, match="since the run is to stop"):
            drive(gang)
        assert gang.salvage() is not None
    finally:
        gang.crew.bench.append(spare)
        gang.crew.hire = hire  # type: ignore[method-assign]
        gang.heed(lambda: False)
        for bundle in hired:
            hire(bundle)


def test_whoever_waits_for_a_machine_that_is_cut_off_is_freed(gang: RayGang, chaos_job: Job) -> None:
    "It closes no connection, as little as a process that is stopped; the driver calls the group off."
    gang.start(chaos_job, 3)
    away = gang.places[2].pid
    os.kill(away, signal.SIGSTOP)
    try:
        (chunk,) = chunks(True, 0, STEPS)
        waiting = list(gang._ask("run", chunk, ranks=[0, 1]).values())
        gang.store.call_off(f"{gang.generation}")
        found = gang.ray.get(waiting, timeout=20)
    finally:
        os.kill(away, signal.SIGCONT)
    assert [(failure.kind, failure.step) for failure in found] == [("peer", 0)] * 2


def test_no_fewer_than_were_asked_for(gang: RayGang, fault_plan: Plan, chaos_job: Job) -> None:
    gang.start(chaos_job, 3)
    gang.tolerance = replace(gang.tolerance, wait=0.0, min_workers=3)
    spare = gang.crew.take(60.0)
    assert spare is not None
    fault_plan.write([Fault(1, 2, "forward", "SIGKILL")])
    with pytest.raises(WorkersFailed, match="2 workers are fewer than --min-workers allows"):
        drive(gang)
    gang.crew.bench.append(spare)


def test_each_notice_names_the_step_of_its_own_fault(gang: RayGang, fault_plan: Plan, chaos_job: Job) -> None:
    gang.start(chaos_job, 3)
    said: list[str] = []
    gang.notice = said.append
    fault_plan.write([Fault(0, 2, "forward", "raise"), Fault(1, 9, "forward", "SIGKILL")])
    drive(gang)
    assert [text.rpartition(" (")[2] for text in said] == ["after step 2)", "after step 9)"]


@pytest.mark.parametrize("witness", ["lives", "dies too"])
def test_the_pictures_that_a_dead_rank_skipped_are_known(
    gang: RayGang, fault_plan: Plan, chaos_job: Job, monkeypatch: pytest.MonkeyPatch, witness: str
) -> None:
    files = tuple("/no/such.jpg" if i % 5 == 0 else file for i, file in enumerate(chaos_job.train.files))
    mine = replace(chaos_job, train=Labelled(files, chaos_job.train.targets), skip_bad_images=True)
    gang.start(mine, 3)
    fault_plan.write([Fault(1, 5, "forward", "SIGKILL")])
    if witness == "dies too":
        whole, first = gang._whole, [gang.places[0].pid]

        def kill_the_first(*args: Any) -> Any:
            while first:
                os.kill(first.pop(), signal.SIGKILL)
            return whole(*args)

        monkeypatch.setattr(gang, "_whole", kill_the_first)
    bad = [image for reports in gang.stream(chunks(True, 0, 7)) for report in reports for image in report.bad_images]
    assert len(bad) == sum(file == "/no/such.jpg" for file in files)
