"""Faults where the ranks talk over what is as silent about them as NCCL is, on CPUs: see `silent.py`.

NCCL itself wants a GPU a rank: `tests/gpu` has a test of it.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist

import cluster.comms
from cluster.comms import NcclGroup
from cluster.meeting import KeyStore
from cluster.messages import Job
from cluster.ray_gang import RayGang
from tests.chaos.injector import DEADLY, PHASES, Fault, Plan
from tests.chaos.runs import Run, drive, fault_of, threaten
from tests.chaos.silent import register

DAILY = [("forward", "raise"), ("backward", "SIGKILL"), ("reduce", "exit"), ("update", "SIGKILL"), ("validate", "exit")]
CASES = [
    pytest.param(
        fault_of(phase, kind), id=f"{phase}-{kind}", marks=() if (phase, kind) in DAILY else (pytest.mark.slow,)
    )
    for phase in PHASES
    for kind in DEADLY
]


@contextmanager
def silence(fault_plan: Plan) -> Iterator[None]:
    "The ranks that start within it talk over the backend that never fails."
    fault_plan.backend = "silent"
    fault_plan.write([])
    try:
        yield
    finally:
        fault_plan.backend = "gloo"
        fault_plan.write([])


@pytest.fixture
def silent_gang(gang: RayGang, fault_plan: Plan) -> Iterator[RayGang]:
    "The gang, over that backend."
    with silence(fault_plan):
        yield gang


@pytest.fixture(scope="module")
def undisturbed(ray_gang: RayGang, fault_plan: Plan, chaos_job: Job) -> Run:
    "The run that nothing befell, over that backend."
    with silence(fault_plan):
        ray_gang.start(chaos_job, 3)
        return drive(ray_gang)


@pytest.mark.parametrize("fault", CASES)
def test_survivors_go_on(
    silent_gang: RayGang, fault_plan: Plan, chaos_job: Job, undisturbed: Run, fault: Fault
) -> None:
    said: list[str] = []
    silent_gang.notice = said.append
    silent_gang.start(chaos_job, 3)
    threaten(silent_gang, fault_plan, [fault])
    assert drive(silent_gang) == undisturbed
    assert fault_plan.fired() == 1
    assert len(said) == 1, said
    assert f"rank {fault.rank} " in said[0]


def test_a_rank_leaves_its_group_in_the_moment_in_which_it_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    "Where the pulse had its thread made, but not yet started, the group was left by half, with no room for another."
    letting_go, left = threading.Event(), threading.Event()

    class Late(threading.Thread):
        def start(self) -> None:
            letting_go.set()
            left.wait(0.2)
            super().start()

    register()
    monkeypatch.setattr(os, "environ", {**os.environ})  # to which a group adds
    store = KeyStore("127.0.0.1")
    group = NcclGroup(0, 1, store.meeting, "silent")
    monkeypatch.setattr(cluster.comms, "Thread", Late)
    pulse = threading.Thread(target=group.let_go)
    pulse.start()
    letting_go.wait()
    group.close()
    left.set()
    pulse.join()
    assert not dist.is_initialized()
