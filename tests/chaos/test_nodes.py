"Machines that go: two or three raylets on one computer, of which one is killed in the midst of training."

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.comms import Solo
from cluster.messages import Chunk, Job
from cluster.worker import Worker

DRIVER = """
import dataclasses, json, os, pickle, sys, time
from pathlib import Path
from cluster.ray_cluster import own_ray
ray = own_ray()
from ray.cluster_utils import Cluster
from cluster.crew import Workers
from cluster.faults import Tolerance
from cluster.lean_ray import lean
from cluster.messages import Chunk
from cluster.ray_gang import RayGang

job, folder = pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])
more = int(sys.argv[3])  # machines that come once the workers have begun
with lean(ray):
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 * 2**20})
    away = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
cluster.wait_for_nodes()
said = []
tolerance = Tolerance(wait=15.0 if more else 1.0, hang_after=5.0)
gang = RayGang(job, Workers(3, 0.0, "gloo", cluster.address), folder / "logs", tolerance, said.append)
where = [location.node for location in gang.locations]
for _ in range(more):
    cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)

def nodes():
    return ray.get([member.actor.__ray_call__.remote(
        lambda _: __import__("ray").get_runtime_context().get_node_id()) for member in gang.seated])

def epoch(at=None):
    losses = []
    for number in range(4):
        chunk = Chunk(True, number, 0, 7 * number, ({"lr": 0.05},) * 7)
        for reports in gang.stream([chunk]):
            losses += reports[0].losses
        if number == at:
            there = [one.pid for one, node in zip(gang.locations, before) if node != cluster.head_node.node_id]
            cluster.remove_node(away, allow_graceful=False)
            while any(Path(f"/proc/{pid}/fd").exists() and os.listdir(f"/proc/{pid}/fd") for pid in there):
                time.sleep(0.05)  # a worker outlives its raylet by a moment
    return losses, gang.call("fingerprint")

healthy = epoch()
gang.start(job, 3)
before = nodes()
began = time.monotonic()
hit = epoch(at=1)
print(json.dumps({"away": [rank for rank, node in enumerate(before) if node == away.node_id],
                  "still": away.node_id in nodes(), "healthy": healthy, "hit": hit, "said": said,
                  "left": gang.world_size, "seconds": time.monotonic() - began}), flush=True)
gang.close()
cluster.shutdown()
"""


GROWING = """
import json, pickle, sys, time
from pathlib import Path
from cluster.ray_cluster import own_ray
ray = own_ray()
from ray.cluster_utils import Cluster
from cluster.crew import Workers
from cluster.faults import Tolerance
from cluster.lean_ray import lean
from cluster.messages import Chunk
from cluster.ray_gang import RayGang

job, folder = pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])
with lean(ray):
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 * 2**20})
workers = Workers(3, 0.0, "gloo", cluster.address, at_least=2)
gang = RayGang(job, workers, folder / "logs", Tolerance(wait=1.0), lambda text: None)
sizes, losses = [], []
for epoch in range(2):
    sizes.append(gang.world_size)
    for reports in gang.stream([Chunk(True, epoch, 0, 7 * epoch, ({"lr": 0.05},) * 7)]):
        losses += reports[0].losses
    if epoch == 0:
        cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        deadline = time.monotonic() + 60
        while gang.world_size < 3 and time.monotonic() < deadline:
            time.sleep(0.2)
            gang.grow()
print(json.dumps({"sizes": sizes, "losses": losses, "prints": gang.call("fingerprint")}), flush=True)
gang.close()
cluster.shutdown()
"""


ALL_GONE = """
import json, signal, subprocess, sys, time
from cluster.ray_cluster import own_ray
ray = own_ray()
from ray.cluster_utils import Cluster
from cluster.lean_ray import lean

folder, pictures = sys.argv[2:]
with lean(ray):
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20})
    away = cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20)
cluster.wait_for_nodes()
command = [sys.executable, "-m", "orchestrator.launch", "--address", cluster.address, "--cpus", "2", "--data", pictures,
           "--size", "24", "--epochs", "9999", "--cache", "off", "--runs", folder + "/runs", "--wait-for-workers", "1"]
run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
said = []
for line in run.stdout:
    said.append(line)
    if away and line.startswith("9 "):
        cluster.remove_node(away, allow_graceful=False)
        away = None
    if line.startswith("starting") and not away:
        time.sleep(4)
        cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20)
    if line.startswith("epoch") and not away:
        run.send_signal(signal.SIGINT)
print(json.dumps({"code": run.wait(), "said": said}), flush=True)
cluster.shutdown()
"""


def lose_a_node(job: Job, folder: Path, more: int) -> dict[str, Any]:
    """What a driver saw of a run of three workers on two machines, one of which was lost.

    On that there was one of them, whose rank the notice names; so many `more` machines have room for its replacement.
    """
    seen = drive(DRIVER, job, folder, f"{more}")
    (rank,), (notice,) = seen["away"], seen["said"]
    assert f"rank {rank} (" in notice and "died" in notice
    assert not seen["still"]
    return seen


def drive(driver: str, job: Job, folder: Path, *more: str) -> dict[str, Any]:
    "What a driver prints at its end."
    (folder / "driver.py").write_text(driver)
    (folder / "job").write_bytes(pickle.dumps(job))
    quick = {"period_ms": "500", "timeout_ms": "1000", "failure_threshold": "3"}
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {f"RAY_health_check_{name}": value for name, value in quick.items()}
    temporary = tempfile.mkdtemp(dir="/tmp")  # Ray's sockets need a short path, and `Cluster` takes it from here
    env |= {"RAY_TMPDIR": temporary, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, folder / "driver.py", folder / "job", folder, *more],
        capture_output=True, text=True, timeout=200, check=False, env=env,
    )  # fmt: skip
    shutil.rmtree(temporary, ignore_errors=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stdout + done.stderr
    return json.loads(lines[-1])


def test_another_machine_takes_over(job: Job, tmp_path: Path) -> None:
    seen = lose_a_node(job, tmp_path, more=1)
    assert seen["hit"] == seen["healthy"], "bit for bit"
    assert seen["left"] == 3


@pytest.mark.slow
def test_the_others_go_on_alone(job: Job, tmp_path: Path) -> None:
    seen = lose_a_node(job, tmp_path, more=0)
    assert seen["left"] == 2
    losses, _ = seen["hit"]
    assert losses == pytest.approx(seen["healthy"][0], rel=1e-3)
    assert len(losses) == 28, "no step is repeated, none is lost"


@pytest.mark.slow
def test_a_run_begins_again_where_the_only_machine_with_workers_was_lost(
    job: Job, pictures: Path, tmp_path: Path
) -> None:
    "Once there is another, with as many workers as that has room for."
    seen = drive(ALL_GONE, job, tmp_path, str(pictures))
    said = "".join(seen["said"])
    _, _, again = said.partition("no worker is left: all begin again at the newest checkpoint")
    assert "going on at step " in again and "stopped in epoch " in again, said
    assert seen["code"] == 130, "Ctrl-C's"


@pytest.mark.slow
def test_a_range_grows_by_a_machine_that_joins(job: Job, tmp_path: Path) -> None:
    "Two of three begin where there is room for no more, with the same samples in the same batches."
    seen = drive(GROWING, job, tmp_path)
    assert seen["sizes"] == [2, 3]
    assert len(set(seen["prints"])) == 1 and len(seen["losses"]) == 14
    worker = Worker(job, Solo(), torch.device("cpu"), 1)
    chunks = [Chunk(True, epoch, 0, 7 * epoch, ({"lr": 0.05},) * 7) for epoch in range(2)]
    assert seen["losses"] == pytest.approx([loss for chunk in chunks for loss in worker.run(chunk).losses], rel=1e-3)
    worker.close()
