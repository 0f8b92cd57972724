"What the tests of faults share: a gang that puts up with any number of them, and the run that nothing befell."

from collections.abc import Iterator
from dataclasses import replace

import pytest

from cluster.messages import Job
from cluster.ray_gang import RayGang
from tests.chaos.injector import Plan
from tests.chaos.runs import Run, drive


@pytest.fixture(scope="session")
def chaos_job(job: Job) -> Job:
    "With all that a step may change: BatchNorm's statistics, momentum, averaged weights."
    return replace(job, arch="simple_cnn_bn", momentum=0.9, ema=0.9)


@pytest.fixture
def gang(ray_gang: RayGang, fault_plan: Plan) -> Iterator[RayGang]:
    "The gang, putting up with any number of faults, and afterwards as it was."
    before, ray_gang.notice = (ray_gang.tolerance, ray_gang.notice), lambda text: None
    ray_gang.tolerance = replace(ray_gang.tolerance, max_restarts=1000)
    fault_plan.write([])
    yield ray_gang
    fault_plan.write([])
    ray_gang.tolerance, ray_gang.notice = before


@pytest.fixture(scope="session")
def healthy(ray_gang: RayGang, fault_plan: Plan, chaos_job: Job) -> Run:
    "The run that nothing befell."
    fault_plan.write([])
    ray_gang.start(chaos_job, 3)
    return drive(ray_gang)
