"""Each kind of fault in each phase of a step, on three workers: what comes of it, beside the run that nothing befell.

Whatever ends or stops a process is made up for, bit for bit. What is wrong with the input or the numbers would be so in
any other process too: there, the run ends as the policy says, with all completed steps in hand, or leaves them out.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.faults import Failure, WorkersFailed
from cluster.messages import Job
from cluster.ray_gang import RayGang
from tests.chaos.injector import DEADLY, KINDS, PHASES, Fault, Plan, file_of
from tests.chaos.runs import EPOCHS, STEPS, Run, drive, fault_of, go_on, is_told, threaten

NO_FILE = "the pictures of a step are read before it, and nowhere else"
SENSELESS = {
    ("data", "NaN"): "pixels are bytes until they are on the device, and bytes are finite",
    ("checkpoint", "NaN"): "nothing is computed there, and what is not finite is not written (test_fit.py)",
    **{(phase, "unreadable"): NO_FILE for phase in PHASES if phase not in ("data", "validate")},
}


def cases(kinds: tuple[str, ...], daily: int) -> Iterator[Any]:
    "Each phase with each of these kinds where that makes sense; one of `daily` is for every day."
    for i, phase in enumerate(PHASES):
        for j, kind in enumerate(KINDS):
            if kind in kinds and (phase, kind) not in SENSELESS:
                marks = () if (j - i) % daily == 0 else (pytest.mark.slow,)
                yield pytest.param(fault_of(phase, kind), id=f"{phase}-{kind}", marks=marks)


def test_every_pair_is_tried_or_makes_no_sense() -> None:
    tried = [
        case.values[0] for kinds in (DEADLY, ("NaN",), ("unreadable",), ("full disk",)) for case in cases(kinds, 1)
    ]
    pairs = [(fault.phase, fault.kind) for fault in tried] + list(SENSELESS)
    assert sorted(pairs) == sorted((phase, kind) for phase in PHASES for kind in KINDS)


@pytest.mark.parametrize("fault", list(cases(DEADLY, len(DEADLY))))
def test_another_process_takes_over(
    gang: RayGang, fault_plan: Plan, chaos_job: Job, healthy: Run, fault: Fault
) -> None:
    gang.start(chaos_job, 3)
    said: list[str] = []
    gang.notice = said.append
    threaten(gang, fault_plan, [fault])
    assert drive(gang) == healthy
    assert fault_plan.fired() == 1
    assert len(said) == 1 and is_told(fault, said[0])
    if fault.kind == "sleep":
        _, _, last = Path(gang.log_folder, f"rank_{fault.rank}.log").read_text().rpartition(f"injected: {fault}\n")
        asked, _, stacks = last.partition("its threads are here:\n")
        assert asked and re.search(r"injector\.py\", line \d+ in befall\n", stacks), "where it slept"


@pytest.mark.parametrize("fault", [case for case in cases(("NaN",), 2) if "validate" not in case.id])
def test_numbers_that_go_wrong_end_the_run_with_all_completed_steps(
    gang: RayGang, fault_plan: Plan, chaos_job: Job, healthy: Run, fault: Fault
) -> None:
    """In an update, one replica alone is spoiled: it is found out by its next loss.

    What goes wrong in one rank's forward is in all losses, by BatchNorm: whose it was shows where it comes again.
    """
    gang.start(chaos_job, 3)
    step = 4 + (fault.phase == "update")
    fault_plan.write([replace(fault, step=4, times=1 + (fault.phase == "forward"))])
    cause, *_ = end(gang)
    assert cause.kind == "nan" and f"at step {step} " in cause.message
    assert cause.rank == fault.rank or fault.phase != "forward", "a sum over all ranks says not whose number it was"
    go_on(gang, chaos_job, fault_plan, step, healthy)


@pytest.mark.parametrize("fault", [case for case in cases(("NaN",), 2) if case.id[:6] not in ("update", "valida")])
def test_numbers_that_go_wrong_can_be_left_out(
    gang: RayGang, fault_plan: Plan, chaos_job: Job, healthy: Run, fault: Fault
) -> None:
    "By all ranks, which go on alike: the run is that in which the step was never made."
    gang.start(replace(chaos_job, on_nan="skip"), 3)
    fault_plan.write([replace(fault, step=4)])
    found = drive(gang, epochs=1)
    assert found.trained[:4] == healthy.trained[:4]
    assert [np.isfinite(columns).all() for columns in found.trained] == [True] * 4 + [False] + [True] * 2
    assert len(set(found.prints)) == 1 and np.isfinite(found.valid).all()


def test_a_validation_that_goes_wrong_spoils_no_weight(
    gang: RayGang, fault_plan: Plan, chaos_job: Job, healthy: Run
) -> None:
    gang.start(chaos_job, 3)
    fault_plan.write([Fault(1, STEPS, "validate", "NaN")])
    found = drive(gang)
    assert (found.trained, found.prints) == (healthy.trained, healthy.prints)
    assert [np.isfinite(columns).all() for columns in found.valid] == [False] + [True] * 7


@pytest.mark.parametrize("fault", list(cases(("unreadable",), 2)))
def test_an_unreadable_file_ends_the_run_with_all_completed_steps(
    gang: RayGang, fault_plan: Plan, chaos_job: Job, healthy: Run, fault: Fault
) -> None:
    gang.start(chaos_job, 3)
    fault_plan.write([fault])
    cause, *_ = end(gang)
    assert (cause.kind, cause.rank) == ("user", fault.rank)
    assert f"{file_of(chaos_job, fault)} is no readable image: Input/output error" in cause.message
    go_on(gang, chaos_job, fault_plan, fault.step, healthy)


@pytest.mark.parametrize("fault", list(cases(("unreadable",), 2)))
def test_an_unreadable_file_can_be_left_out(gang: RayGang, fault_plan: Plan, chaos_job: Job, fault: Fault) -> None:
    "As if it had never been there."
    skipping = replace(chaos_job, skip_bad_images=True)
    part, file = ("valid" if fault.phase == "validate" else "train"), file_of(chaos_job, fault)
    labelled = getattr(skipping, part)
    files = tuple("/no/such.jpg" if one == file else one for one in labelled.files)
    gang.start(replace(skipping, **{part: replace(labelled, files=files)}), 3)
    wanted = drive(gang)
    gang.start(skipping, 3)
    fault_plan.write([fault])
    assert drive(gang) == wanted
    assert fault_plan.fired() == 1


@pytest.mark.parametrize("fault", list(cases(("full disk",), 4)))
def test_a_worker_needs_no_disk(gang: RayGang, fault_plan: Plan, chaos_job: Job, healthy: Run, fault: Fault) -> None:
    "All that it writes is its log, as it does where another one is replaced; the driver's: test_bad_input.py."
    gang.start(chaos_job, 3)
    said: list[str] = []
    gang.notice = said.append
    other, later = (fault.rank + 1) % 3, min(fault.step + 1, EPOCHS * STEPS - 1)
    fault_plan.write([fault, Fault(other, later, "update", "raise")])
    assert drive(gang) == healthy
    assert fault_plan.fired() == 2
    assert len(said) == 1 and f"rank {other} " in said[0]


def end(gang: RayGang) -> list[Failure]:
    "Drive until the run ends before its time; why, worst first."
    with pytest.raises(WorkersFailed) as caught:
        drive(gang)
    return caught.value.failures
