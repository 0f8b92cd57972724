"All pictures in the device's memory: the run is bit for bit the one that has them brought batch by batch."

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.messages import Job
from cluster.ray_gang import RayGang
from learner.data.mix import MixConfig


@pytest.mark.parametrize("mixed", [False, True])
def test_it_is_the_same_run(
    local_gang: Callable[[Job], Any], drive: Any, job: Job, mixed: bool, tmp_path: Path
) -> None:
    mine = replace(job, augment="crop", presize=27, mix=MixConfig(mixup=0.4 * mixed), store=str(tmp_path / "store"))
    runs = [drive(local_gang(one), one) for one in (mine, replace(mine, on_device=True))]
    assert runs[0].losses == runs[1].losses
    assert runs[0].valid == runs[1].valid
    assert runs[0].prints == runs[1].prints


@pytest.mark.slow
def test_it_is_the_same_run_of_two(ray_gang: RayGang, drive: Any, job: Job) -> None:
    prints = []
    for on_device in (False, True):
        one = replace(job, on_device=on_device)
        ray_gang.start(one, 2)
        prints.append(drive(ray_gang, one).prints)
    assert prints[0] == prints[1]
