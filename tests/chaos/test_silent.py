"""Faults where the ranks talk over what is as silent about them as NCCL is, on CPUs: see `silent.py`.

NCCL itself wants a GPU a rank: `tests/gpu` has a test of it.
"""

from collections.abc import Iterator

import pytest

from cluster.messages import Job
from cluster.ray_gang import RayGang
from tests.chaos.injector import DEADLY, PHASES, Fault, Plan
from tests.chaos.runs import EPOCHS, STEPS, Run, drive


@pytest.fixture
def silent_gang(gang: RayGang, fault_plan: Plan) -> Iterator[RayGang]:
    "The gang, over the backend that never fails."
    fault_plan.backend = "silent"
    fault_plan.write([])
    yield gang
    fault_plan.backend = "gloo"
    fault_plan.write([])


@pytest.fixture(scope="module")
def undisturbed(ray_gang: RayGang, fault_plan: Plan, chaos_job: Job) -> Iterator[Run]:
    "The run that nothing befell, over that backend."
    fault_plan.backend = "silent"
    fault_plan.write([])
    ray_gang.start(chaos_job, 3)
    run = drive(ray_gang)
    fault_plan.backend = "gloo"
    fault_plan.write([])
    yield run


def cases() -> Iterator[object]:
    "Each phase with each of the kinds that end a process, or keep it from going on; some for every day."
    for i, phase in enumerate(PHASES):
        for j, kind in enumerate(DEADLY):
            rank = 0 if phase == "checkpoint" else (i + j) % 3
            step = {"validate": STEPS, "checkpoint": STEPS}.get(phase, (2 * i + 3 * j) % (STEPS * EPOCHS))
            marks = () if (phase, kind) in DAILY else (pytest.mark.slow,)
            yield pytest.param(Fault(rank, step, phase, kind), id=f"{phase}-{kind}", marks=marks)


DAILY = [("forward", "raise"), ("backward", "SIGKILL"), ("reduce", "exit"), ("update", "SIGKILL"), ("validate", "exit")]


@pytest.mark.parametrize("fault", list(cases()))
def test_survivors_go_on(
    silent_gang: RayGang, fault_plan: Plan, chaos_job: Job, undisturbed: Run, fault: Fault
) -> None:
    said: list[str] = []
    silent_gang.notice = said.append
    silent_gang.start(chaos_job, 3)
    fault_plan.write([fault])
    assert drive(silent_gang) == undisturbed
    assert fault_plan.fired() == 1
    assert len(said) == 1
    assert f"rank {fault.rank} " in said[0]
