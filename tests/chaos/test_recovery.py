"Whatever befalls a worker, wherever in a step: the run goes on, and is bit for bit the one that nothing befell."

import os
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cluster.calls
import cluster.crew
import cluster.ray_gang
from cluster.checkpoint import Checkpoints
from cluster.comms import TIMEOUT, Group
from cluster.faults import NoneLeft, WorkersFailed
from cluster.messages import Chunk, Job
from cluster.ray_gang import RayGang
from learner.data.files import Labelled
from orchestrator.config import Config
from orchestrator.launch import run
from tests.chaos.injector import BEGIN, DEADLY, PHASES, Fault, Plan
from tests.chaos.runs import STEPS, Run, chunks, columns, drive, go_on, is_told, threaten
from tests.leftovers import living, wait_until_gone

SHORT_OF_WAITING = pytest.mark.skipif(
    Group.connecting == TIMEOUT, reason="the gloo of torch 2.8 waits for minutes for who died as it connected"
)


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
    go_on, survivor = getattr(gang, phase), [gang.locations[2].pid]

    def kill_and_go_on(*args: Any) -> Any:
        while survivor:
            os.kill(survivor.pop(), signal.SIGKILL)
        return go_on(*args)

    monkeypatch.setattr(gang, phase, kill_and_go_on)
    assert drive(gang) == healthy
    assert not survivor


def test_nobody_naps_where_a_worker_has_died(
    gang: RayGang, fault_plan: Plan, chaos_job: Job, healthy: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    "How fast the run goes on is for benchmarks/chaos.py; here, the driver waits for nothing but answers."
    gang.start(chaos_job, 3)
    naps = list[float]()
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=naps.append)
    for module in (cluster.calls, cluster.crew, cluster.ray_gang):
        monkeypatch.setattr(module, "time", clock)
    fault_plan.write([Fault(1, 4, "backward", "SIGKILL")])
    assert drive(gang) == healthy
    assert fault_plan.fired() == 1 and naps == []


def test_a_stopped_process_is_ended_at_once(gang: RayGang, chaos_job: Job) -> None:
    "Ray would ask it to leave, and wait for seconds."
    gang.start(chaos_job, 3)
    spare = gang.crew.take(60.0)
    assert spare is not None
    os.kill(spare.location.pid, signal.SIGSTOP)
    gang.crew.dismiss(spare, replace=True)
    assert wait_until_gone(lambda: living([spare.location.pid]), 2) == {}


def test_who_waits_for_a_rank_that_was_asked_for_nothing_is_freed(gang: RayGang, chaos_job: Job) -> None:
    "All that owe an answer wait in a collective: nobody is to blame, nobody is ended, and their group is called off."
    gang.start(chaos_job, 3)
    locations, whole = gang.locations, list(gang.stream(chunks(True, 0, STEPS)))  # by now, steps are known to be short
    late = threading.Timer(60, gang.store.call_off, [gang.calls.group])  # were it never done
    late.start()
    answers = gang.calls.answers(gang.calls.ask("run", whole[0][0].chunk, ranks=[0, 1]), hang_after=1.5)
    assert [(failure.kind, late.is_alive()) for failure in answers.values()] == [("peer", True)] * 2
    late.cancel()
    assert [member.ended for member in gang.seated] == [""] * 3 and gang.locations == locations


def soak(gang: RayGang, fault_plan: Plan, job: Job, faults: int, seed: int) -> None:
    "A run in which each epoch has two faults: no two of them are of the same kind in the same phase."
    rng, epochs = random.Random(seed), faults // 2
    gang.start(job, 3)
    fault_plan.write([])
    wanted = drive(gang, epochs)
    plan = [befalling(phase, kind, number, rng) for number, (phase, kind) in enumerate(pairs(rng, faults))]
    gang.start(job, 3)
    said: list[str] = []
    gang.notice = said.append
    threaten(gang, fault_plan, plan)
    assert drive(gang, epochs) == wanted
    assert fault_plan.fired() == faults
    assert [fault for fault in plan if not any(is_told(fault, text) for text in said)] == [], said


def pairs(rng: random.Random, count: int) -> list[tuple[str, str]]:
    "So many phases and kinds: of each phase and of each kind as many as of any other, or one more; up to 42 differ."
    phases, kinds = rng.sample(PHASES, len(PHASES)), rng.sample(DEADLY, len(DEADLY))
    return [(phases[i % len(phases)], kinds[i % len(kinds)]) for i in range(count)]


def befalling(phase: str, kind: str, number: int, rng: random.Random) -> Fault:
    """One of the two faults of an epoch: at its end, if it is of that, or at a step once they are known to be short.

    It is rank 0 who copies what it holds for a checkpoint.
    """
    epoch, half = divmod(number, 2)
    step = STEPS if phase in ("validate", "checkpoint") else 3 + 2 * half + rng.randrange(2)
    return Fault(0 if phase == "checkpoint" else rng.randrange(3), STEPS * epoch + step, phase, kind)


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


@pytest.mark.slow
def test_deaths_at_any_moment_of_regrouping(
    gang: RayGang, chaos_job: Job, healthy: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    "Nobody is waited for without an end, and all goes on as if nothing had been, but where nobody is left."
    rng, regroup, blows, lost = random.Random(3), gang._regroup, list[threading.Timer](), 0

    def strike() -> None:
        pid = rng.choice(gang.locations).pid
        if living([pid]).get(pid, "").startswith("ray::"):
            os.kill(pid, signal.SIGKILL)

    def strike_and_regroup() -> Any:
        if rng.random() < 0.6:
            blows.append(threading.Timer(1.5 * rng.random() ** 2, strike))
            blows[-1].start()
        return regroup()

    monkeypatch.setattr(gang, "_regroup", strike_and_regroup)
    for _ in range(25):
        began = time.monotonic()
        try:
            gang.start(chaos_job, 3)
            assert drive(gang) == healthy
        except NoneLeft:
            lost += 1
        assert time.monotonic() - began < 90
    for blow in blows:
        blow.join()
    assert len(blows) > 25 > 4 * lost


def test_all_at_once_leave_nothing(gang: RayGang, fault_plan: Plan, chaos_job: Job) -> None:
    gang.start(chaos_job, 3)
    fault_plan.write([Fault(rank, 3, "backward", "SIGKILL") for rank in range(3)])
    with pytest.raises(NoneLeft, match="process died"):
        drive(gang)
    assert gang.salvage() is None


@pytest.mark.parametrize(
    ("phase", "step"),
    [("forward", 4), ("validate", STEPS)]
    + [
        pytest.param(phase, step, marks=pytest.mark.slow)
        for step, phase in enumerate(["data", "backward", "reduce"], 2)
    ],
)
def test_an_error_of_all_ranks_costs_no_step(
    gang: RayGang, fault_plan: Plan, chaos_job: Job, healthy: Run, phase: str, step: int
) -> None:
    "What a step changes comes behind all that can fail: each holds the steps before."
    gang.start(chaos_job, 3)
    fault_plan.write([Fault(rank, step, phase, "raise") for rank in range(3)])
    with pytest.raises(NoneLeft, match="injected"):
        drive(gang)
    go_on(gang, chaos_job, fault_plan, step, healthy)


def test_memory_that_all_ranks_lack_ends_the_run_with_all_completed_steps(
    gang: RayGang, fault_plan: Plan, chaos_job: Job, healthy: Run
) -> None:
    gang.start(chaos_job, 3)
    fault_plan.write([Fault(rank, 4, "forward", "memory") for rank in range(3)])
    with pytest.raises(WorkersFailed, match=r"(?s)OutOfMemoryError: injected.*begin anew with a lower --size"):
        drive(gang)
    go_on(gang, chaos_job, fault_plan, 4, healthy)


def test_an_error_of_all_ranks_ends_a_run_at_the_step_where_it_came_twice(
    gang: RayGang, on_ray_gang: None, fault_plan: Plan, pictures: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    "In the midst of an epoch: all begin again there, and in the end it is saved."
    fault_plan.write([Fault(rank, STEPS + 2, "forward", "raise", times=2) for rank in range(3)])
    config = Config(data=str(pictures), cpus=3, size=16, batch_size=8, epochs=2, lr=0.1, name="run",
                    runs=str(tmp_path), data_dir=str(tmp_path), cache="off")  # fmt: skip
    with pytest.raises(NoneLeft) as caught:
        run(config)
    said = capsys.readouterr()
    assert said.err.count("all begin again at the newest checkpoint") == 1
    assert f"going on at step {STEPS + 2} of " in said.out
    assert Checkpoints(tmp_path / "run" / "version_0" / "checkpoints").steps()[-1] == STEPS + 2
    *_, saved, bug = caught.value.__notes__
    assert "all completed steps are saved" in saved and "this is a bug" in bug


def test_what_is_half_updated_is_not_saved(gang: RayGang, fault_plan: Plan, chaos_job: Job) -> None:
    gang.start(chaos_job, 3)
    fault_plan.write([Fault(rank, 3, "update", "raise") for rank in range(3)])
    with pytest.raises(NoneLeft, match="injected"):
        drive(gang)
    assert gang.salvage() is None


def test_an_error_of_all_ranks_between_steps_costs_none(
    gang: RayGang, fault_plan: Plan, chaos_job: Job, healthy: Run
) -> None:
    gang.start(chaos_job, 3)
    list(gang.stream(chunks(True, 0, 3)))
    with pytest.raises(NoneLeft):
        gang.call("no_such_method")
    go_on(gang, chaos_job, fault_plan, STEPS, healthy)


@pytest.mark.parametrize(
    "phase, kind",
    [
        ("meet", "SIGKILL"),
        pytest.param("connect", "SIGKILL", marks=SHORT_OF_WAITING),
        ("start", "SIGKILL"),
        pytest.param("meet", "raise", marks=pytest.mark.slow),
        pytest.param("start", "raise", marks=pytest.mark.slow),
    ],
)
def test_a_worker_fails_before_anybody_holds_a_state(
    gang: RayGang, fault_plan: Plan, chaos_job: Job, healthy: Run, phase: str, kind: str
) -> None:
    "All begin the job anew, with the spare in its place; who waited for it to connect finds the others again."
    said: list[str] = []
    gang.notice = said.append
    fault_plan.write([Fault(1, BEGIN, phase, kind)])
    gang.start(chaos_job, 3)
    assert fault_plan.fired() == 1
    assert len(said) == 1 and "rank 1 " in said[0] and "begin" in said[0]
    assert drive(gang) == healthy


@pytest.mark.slow
def test_a_spare_that_died_on_the_bench_is_not_seated(
    gang: RayGang, fault_plan: Plan, chaos_job: Job, healthy: Run
) -> None:
    gang.start(chaos_job, 3)
    spare = gang.crew.take(60.0)
    assert spare is not None
    gang.crew.bench.append(spare)
    os.kill(spare.location.pid, signal.SIGKILL)
    said: list[str] = []
    gang.notice = said.append
    fault_plan.write([Fault(1, 4, "forward", "SIGKILL")])
    assert drive(gang) == healthy
    assert len(said) == 1 and said[0].count("rank 1 ") == 1, "nobody tried to go on with it"


@pytest.mark.slow
def test_no_spare_is_needed_to_begin_anew(gang: RayGang, fault_plan: Plan, chaos_job: Job, healthy: Run) -> None:
    spare = gang.crew.take(60.0)  # out of reach
    assert spare is not None
    fault_plan.write([Fault(rank, BEGIN, "start", "SIGKILL") for rank in (0, 2)])
    gang.start(chaos_job, 3)
    assert drive(gang) == healthy
    gang.crew.bench.append(spare)


def test_an_error_at_each_start_is_a_bug(gang: RayGang, fault_plan: Plan, chaos_job: Job) -> None:
    fault_plan.write([Fault(1, BEGIN, "start", "raise", times=9)])
    with pytest.raises(WorkersFailed, match=r"(?s)RuntimeError: injected.*the same error came .*: this is a bug"):
        gang.start(chaos_job, 3)
    assert fault_plan.fired() == 2


def test_a_replacement_that_can_not_begin_is_none(gang: RayGang, fault_plan: Plan, chaos_job: Job) -> None:
    "The others, who hold a state, go on without: be it the spare, or one that is up by then as well."
    gang.start(chaos_job, 3)
    said: list[str] = []
    gang.notice, gang.tolerance = said.append, replace(gang.tolerance, wait=0.0, max_restarts=1)
    fault_plan.write([Fault(1, 2, "forward", "SIGKILL"), Fault(1, BEGIN, "start", "SIGKILL", times=9)])
    spare = gang.crew.take(60.0)
    assert spare is not None
    gang.crew.bench.append(spare)
    known = {member.bundle for member in gang.crew.members}
    reports = [row for reports in gang.stream(chunks(True, 0, 3)) for row in columns(reports)]
    for bundle in known - {member.bundle for member in gang.crew.members}:
        gang.crew.hire(bundle)
    assert (gang.world_size, len(reports)) == (2, STEPS) and fault_plan.fired() > 1
    assert len(said) == 1 and said[0].count("rank 1 ") == fault_plan.fired() and "2 workers go on" in said[0]


def test_what_befell_those_who_only_joined_is_no_reason_to_end(gang: RayGang, fault_plan: Plan, chaos_job: Job) -> None:
    "Else one bad machine would use up what a run puts up with, and the next death, hours later, would end it."
    gang.start(chaos_job, 3)
    gang.tolerance = replace(gang.tolerance, wait=0.0, max_restarts=1)
    fault_plan.write([Fault(1, 2, "forward", "raise"), Fault(1, BEGIN, "start", "SIGKILL", times=9)])
    spare = gang.crew.take(60.0)
    assert spare is not None
    gang.crew.bench.append(spare)
    known = {member.bundle for member in gang.crew.members}
    first = [row for reports in gang.stream(chunks(True, 0, 3)) for row in columns(reports)]
    joined_in_vain = fault_plan.fired() - 1
    fault_plan.write([Fault(0, STEPS + 2, "forward", "SIGKILL")])
    second = [row for reports in gang.stream(chunks(True, 1, 3)) for row in columns(reports)]
    for bundle in known - {member.bundle for member in gang.crew.members}:
        gang.crew.hire(bundle)
    assert len(first) == len(second) == STEPS and fault_plan.fired() == 1 <= joined_in_vain


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
    "Of which the last is told at once, and not those whose collectives it broke."
    gang.start(chaos_job, 3)
    gang.tolerance = replace(gang.tolerance, max_restarts=1)
    fault_plan.write([Fault(1, 2, "data", "exit")])
    with pytest.raises(WorkersFailed) as caught:
        for reports in gang.stream(chunks(True, 0, 1)):
            if reports[0].chunk.step == 4:
                killed, at = gang.locations[2], time.monotonic()
                os.kill(killed.pid, signal.SIGKILL)
    assert time.monotonic() - at < 5
    (death, *others), said = caught.value.failures, str(caught.value)
    assert (death.rank, death.kind) == (2, "died") and all(failure.kind == "peer" for failure in others)
    assert said.startswith(f"a worker failed: rank 2 (host {killed.host}, pid {killed.pid}): the worker's process died")
    assert "Traceback" not in said
    assert "\n2 faults of the kind 'died' are more than --max-restarts 1 allows; dmesg says whether " in said
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


def test_who_dies_in_joining_has_not_joined(gang: RayGang, fault_plan: Plan, chaos_job: Job) -> None:
    gang.start(chaos_job, 2)
    said: list[str] = []
    gang.notice, gang.tolerance, gang.wanted = said.append, replace(gang.tolerance, wait=0.0), 3
    first, second = gang.crew.take(60.0), gang.crew.take(60.0)
    assert first is not None and second is not None
    fault_plan.write([Fault(2, BEGIN, "start", "SIGKILL")])
    gang.crew.bench.append(first)
    gang.grow()
    assert (gang.world_size, len(said)) == (2, 1) and "2 workers go on" in said[0]
    gang.crew.bench.append(second)
    gang.grow()
    assert said[1:] == ["a worker has joined: 3 of 3 go on"]


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
    away = gang.locations[2].pid
    os.kill(away, signal.SIGSTOP)
    try:
        (chunk,) = chunks(True, 0, STEPS)
        waiting = list(gang.calls.ask("run", chunk, ranks=[0, 1]).values())
        gang.store.call_off(gang.calls.group)
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
        whole, first = gang._whole, [gang.locations[0].pid]

        def kill_the_first(*args: Any) -> Any:
            while first:
                os.kill(first.pop(), signal.SIGKILL)
            return whole(*args)

        monkeypatch.setattr(gang, "_whole", kill_the_first)
    bad = [image for reports in gang.stream(chunks(True, 0, 7)) for report in reports for image in report.bad_images]
    assert len(bad) == sum(file == "/no/such.jpg" for file in files)


def test_nothing_is_saved_that_is_not_where_the_driver_is(
    gang: RayGang, fault_plan: Plan, chaos_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    "A rank is a step ahead of the others, but what came of that step went with it: they hold too little."
    gang.start(replace(chaos_job, skip_bad_images=True), 3)
    fault_plan.write([Fault(1, 5, "forward", "SIGKILL")])
    whole = gang._whole

    def lose_the_lead(reports: list[Any], lost: list[int]) -> Any:
        os.kill(gang.locations[0].pid, signal.SIGKILL)
        return whole([reports[0]], lost)

    monkeypatch.setattr(gang, "_whole", lose_the_lead)
    with pytest.raises(NoneLeft):
        list(gang.stream(chunks(True, 0, 7)))
    assert gang.salvage() is None
