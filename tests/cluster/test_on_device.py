"All pictures in the device's memory: the run is bit for bit the one that has them brought batch by batch."

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import local_batches
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


@pytest.mark.parametrize(("memory", "by_the_caller"), [(2**40, True), (2**10, False)])
def test_a_store_that_memory_does_not_hold_is_read_ahead_by_threads(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, by_the_caller: bool
) -> None:
    monkeypatch.setattr(local_batches, "memory_size", lambda: memory)
    batches = local_batches.LocalBatches(replace(job, store=str(tmp_path / "store")), 0, 1, 1)
    assert (batches.loaders[True].at_hand is not None) == by_the_caller
    batches.close()
