"What becomes of a run one of whose workers is killed, and of the workers when the driver is."

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.messages import Job
from cluster.ray_cluster import remove_stale_folders

DRIVER = """
import dataclasses, json, os, pickle, signal, sys, time
from pathlib import Path
from cluster.faults import Tolerance, WorkersFailed
from cluster.messages import Chunk
from cluster.crew import Workers
from cluster.ray_gang import RayGang

def say(**facts):
    print(json.dumps(facts), flush=True)

job = pickle.loads(Path(sys.argv[1]).read_bytes())
gang = RayGang(job, Workers(3, 0.0, "gloo"), Path(sys.argv[2]), Tolerance(max_restarts=0))
say(places=[dataclasses.astuple(place) for place in gang.places], folder=gang.cluster.folder)
endless = [Chunk(True, 0, 0, 0, ({"lr": 0.01},) * 7)] * 100_000
for number, _ in enumerate(gang.stream(endless)):
    if number == 2:
        break
killed = None
try:
    for number, _ in enumerate(gang.stream(endless)):
        if number == 2:
            killed = time.monotonic()
            os.kill(gang.places[1].pid, signal.SIGKILL)
except WorkersFailed as error:
    failures = [(failure.rank, failure.kind) for failure in error.failures]
    say(message=str(error), failures=failures, seconds=time.monotonic() - killed)
gang.start(job, 1)
for number, _ in enumerate(gang.stream(endless)):
    if number == 2:
        say(training=True)
"""


@pytest.fixture(scope="module")
def killed(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    "What a driver saw of the death of one of its workers, and what was left once it was killed in its turn."
    folder = tmp_path_factory.mktemp("killed")
    (folder / "driver.py").write_text(DRIVER)
    (folder / "job").write_bytes(pickle.dumps(job))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    driver = subprocess.Popen(
        [sys.executable, folder / "driver.py", folder / "job", folder / "logs"],
        stdout=subprocess.PIPE, text=True, env=clean, start_new_session=True,
    )  # fmt: skip
    try:
        assert driver.stdout is not None
        said: dict[str, Any] = {}
        while "training" not in said:
            line = driver.stdout.readline()
            assert line.startswith("{"), f"{line!r} came after {said}: the driver ended, or Ray's noise is not kept out"
            said |= json.loads(line)
        yield said | {"driver": driver.pid}
    finally:
        driver.kill()
        driver.wait()
        remove_stale_folders()


def alive(pid: int) -> bool:
    "Whether a process runs, zombies not counted."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_worker_is_named_at_once(killed: dict[str, Any]) -> None:
    _, pid, _ = killed["places"][1]
    assert killed["failures"][0] == [1, "died"]
    assert all(kind == "peer" for _, kind in killed["failures"][1:])
    assert (
        f"a worker failed: rank 1 (host {killed['places'][1][0]}, pid {pid}): the worker's process died"
        in killed["message"]
    )
    assert "Traceback" not in killed["message"]
    assert killed["seconds"] < 5


def test_a_killed_driver_leaves_no_workers(killed: dict[str, Any]) -> None:
    workers = [pid for rank, (_, pid, _) in enumerate(killed["places"]) if rank != 1]
    assert all(map(alive, workers)), "the survivors of the first death were of further use"
    assert Path(killed["folder"]).is_dir()
    os.kill(killed["driver"], signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in workers if alive(pid)] == []
