"What a configuration comes to before workers start: the store of decoded images, what is put up with."

import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cluster import local_batches
from cluster.crew import PLACEMENT_TIMEOUT, Workers
from cluster.faults import Tolerance
from cluster.messages import Job
from learner.data.files import Labelled, Split, open_split
from learner.data.store import Store, changed
from learner.errors import UsageError, UserError
from orchestrator.build import make_gang, make_store, tolerance
from orchestrator.config import Config
from orchestrator.devices import Devices


@pytest.fixture
def split(image_folder) -> Split:
    return open_split(image_folder({"cat": (6, 2), "dog": (5, 3)}), 42)


def test_the_size_is_shown_before_a_store_is_made(split, tmp_path, capsys, monkeypatch) -> None:
    config, said = Config(data="shapes", size=32, cache=f"{tmp_path}/stores"), []
    monkeypatch.setattr("orchestrator.build.Store", lambda *_: said.append(capsys.readouterr().out) or pytest.fail())
    with pytest.raises(pytest.fail.Exception):
        make_store(config, split)
    assert said[0].startswith("decoded images are kept: 0 MiB in ")
    monkeypatch.undo()
    folder = make_store(config, split)
    assert f"in {folder}, 0 of 16 are there\n" in capsys.readouterr().out
    assert folder is not None and Path(folder).parent == tmp_path / "stores"
    assert make_store(replace(config, cache="off"), split) is None


def test_a_store_without_room_is_said_so_in_whole_lines(split, tmp_path, capsys, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("orchestrator.build.Store", full)
    assert make_store(Config(data="shapes", size=32, data_dir=str(tmp_path)), split) is None
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("decoded images are kept: ") and first.endswith(", which can't be")
    assert second.startswith("images are decoded in every epoch: ") and "No space left" in second


def test_auto_does_without_where_a_store_would_take_more_than_half(split, tmp_path, capsys, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=60_000))
    config = Config(data="shapes", size=32, data_dir=str(tmp_path))
    assert make_store(config, split) is None
    assert "images are decoded in every epoch: 0 MiB would take more than half" in capsys.readouterr().out
    assert make_store(replace(config, cache=f"{tmp_path}/named"), split), "what was asked for is tried"


def test_a_new_store_has_an_old_one_make_room(split, tmp_path, capsys, monkeypatch) -> None:
    config = Config(data="shapes", size=32, cache=f"{tmp_path}/stores")
    old = make_store(config, split)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1))
    new = make_store(replace(config, size=16), split)
    assert old and new and not Path(old).exists() and Path(new).exists()


def test_a_run_whose_own_store_is_there_keeps_it_and_removes_others_beyond_the_limit(split, tmp_path, capsys) -> None:
    config = Config(data="shapes", size=32, cache=f"{tmp_path}/stores")
    own, other = make_store(config, split), tmp_path / "stores" / ("a" * 32)
    Store(Path(f"{own}"), 16, config.presize).put(0, np.ones((config.presize,) * 2 + (3,), np.uint8))
    other.mkdir()
    (other / "pixels").touch()
    os.truncate(other / "pixels", 51 * 2**30)  # a hole
    os.utime(f"{own}", (1, 1))  # longer ago than the other's last use
    assert make_store(config, split) == own
    assert capsys.readouterr().out.endswith("1 of 16 are there\n\n") and not other.exists()


def test_what_a_user_puts_up_with_is_what_the_gang_does() -> None:
    config = Config(max_restarts=3, min_workers=2, wait_for_workers=7.5, spares=4, hang_after=9.0)
    asked = Tolerance(max_restarts=3, min_workers=2, spares=4, wait=7.5, hang_after=9.0)
    assert tolerance(config) == asked
    assert tolerance(config, at_least=5) == replace(asked, min_workers=5), "as --gpus 5:8 says"


class Exposed:
    "A gang on a cluster that lets strangers in."

    cluster, world_size = SimpleNamespace(warnings=["the Ray cluster at host:1 asks for no token"]), 2

    def __init__(self, job: Job, workers: Workers, *_: object) -> None:
        self.workers = workers


def test_a_run_that_begins_again_asks_for_as_few_as_might_have_gone_on(job: Job, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("cluster.ray_gang.RayGang", Exposed)
    asked, devices = Config(address="host:1", cpus=4, min_workers=2, wait_for_workers=90.0), Devices(4, 0.0, "gloo")
    first, again = (make_gang(job, devices, asked, tmp_path, again=again).workers for again in (False, True))
    assert first == Workers(4, 0.0, "gloo", "host:1")
    assert again == replace(first, at_least=2, patience=90.0)
    at_once = make_gang(job, devices, replace(asked, wait_for_workers=0.0), tmp_path, again=True).workers
    assert at_once.patience == PLACEMENT_TIMEOUT, "as long as for those that begin"


def test_a_user_is_told_what_a_joined_cluster_exposes(job: Job, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("cluster.ray_gang.RayGang", Exposed)
    make_gang(job, Devices(2, 0.0, "gloo"), Config(address="host:1", cpus=2), tmp_path)
    assert capsys.readouterr().out == "warning: the Ray cluster at host:1 asks for no token\n"


def test_no_folder_is_no_cache(split) -> None:
    with pytest.raises(UsageError, match="--cache is empty: it must be auto, device, off, or a folder"):
        make_store(Config(data="shapes", cache=" "), split)


def test_a_machine_without_room_decodes(job: Job, tmp_path, monkeypatch) -> None:
    "Another one than the driver's, which would have said so before."

    def full(*_: object) -> None:
        raise UserError("the store of decoded images can't be kept")

    monkeypatch.setattr(local_batches, "Store", full)
    told: list[str] = []
    batches = local_batches.LocalBatches(replace(job, store=str(tmp_path / "store")), 0, 1, 0, tell=told.append)
    assert batches.store is None and len(batches.dataset(True)) == len(job.train)
    assert len(told) == 1 and "decodes images in every epoch: the store" in told[0]
    batches.close()


def test_what_changed_since_the_job_was_made_is_not_kept(job: Job, tmp_path) -> None:
    "By a worker that comes later, too."
    files = [shutil.copy2(file, tmp_path / f"{number}.jpg") for number, file in enumerate(job.train.files)]
    job = replace(job, train=Labelled(tuple(map(str, files)), job.train.targets), store=str(tmp_path / "store"))
    while changed(f"{files[3]}") <= max(changed(f"{file}") for file in files[4:]):  # file systems have coarse clocks
        files[3].touch()
    job = replace(job, made=changed(f"{files[3]}"))
    batches, n = local_batches.LocalBatches(job, 0, 1, 0), len(files)
    batches.dataset(True).read(range(n), np.empty((n, job.presize, job.presize, 3), np.uint8))
    assert batches.store is not None and batches.store.filled == n - 1
    batches.close()
