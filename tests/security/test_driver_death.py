"A driver that is killed takes with it, within seconds, every process, file and memory segment of its Ray cluster."

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cluster.ray_cluster import PREFIX, short_temporary_folder

SHARED = Path("/dev/shm")


def ours(pid: int) -> set[Path]:
    "What the driver with this number keeps beside its run."
    mapped = set(SHARED.iterdir()) if SHARED.is_dir() else set()
    return mapped | set(Path(short_temporary_folder()).glob(f"{PREFIX}{pid}-*"))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_nothing_is_left_ten_seconds_after_a_sigkill_of_the_driver(
    arguments: list[str], tmp_path: Path, user_environment: dict[str, str], descendants: Callable[[int], dict[int, str]]
) -> None:
    """Ray's agents alone would stay for a minute: cluster/watchdog.py ends them.

    They would not even begin with the user's PYTHONOPTIMIZE.
    """
    arguments.remove("--local")
    before = ours(0)
    with subprocess.Popen(
        [sys.executable, "-m", "orchestrator.launch", *arguments, "--cpus", "2", "--epochs", "10000"],
        env=user_environment | {"PYTHONOPTIMIZE": "2"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as driver:  # fmt: skip
        try:
            assert driver.stdout is not None
            for line in driver.stdout:
                if line.startswith("0 "):  # the first epoch's row: all are at work
                    break
            below = descendants(driver.pid)
            for part in ("gcs_server", "raylet", "Agent", "ray::WorkerProcess", "watchdog"):
                assert part in " ".join(below.values())
            assert ours(driver.pid) - before
        finally:
            driver.kill()
    deadline = time.monotonic() + 10
    while (left := [below[pid] for pid in below if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
    assert ours(driver.pid) - before == set()
    assert os.path.isdir(tmp_path / "runs"), "what the run recorded stays"
