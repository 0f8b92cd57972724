"Faults as a user of the command line meets them: the run ends as if nothing had been, and nothing is left behind."

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from cluster.ray_cluster import PREFIX, refuse_strangers
from cluster.ray_gang import RayGang
from cluster.watchdog import LAST_WORDS
from learner.errors import UserError
from orchestrator.launch import main
from tests import commands
from tests.chaos.injector import Plan
from tests.leftovers import shared_memory, wait_until_gone
from tests.results import assert_same, history, scalars

OPTIONS = ["--arch", "simple_cnn_bn", "--size", "16", "--batch-size", "8", "--epochs", "12", "--momentum", "0.9",
           "--augment", "crop", "--lr", "0.02", "--ema", "0.9", "--cache", "off", "--name", "run"]  # fmt: skip


def places(pictures: Path, folder: Path) -> list[str]:
    "Where a run finds its data, and leaves what it writes."
    return ["--data", f"{pictures}", "--data-dir", f"{folder / 'cache'}", "--runs", f"{folder}"]


class Launch:
    "`python -m orchestrator.launch` in a session of its own, by which all its processes are known."

    def __init__(self, pictures: Path, folder: Path, environment: dict[str, str], *more: str) -> None:
        self.path, self.temporary = folder / "run" / "version_0", folder / "temporary"
        self.temporary.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.launch", *OPTIONS, *places(pictures, folder), *more],
            env=environment | {"TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.out, self.segments = "", set[str]()

    def until_row(self, first: object) -> None:
        "Return as soon as the row of that epoch is printed, in the midst of the next one; `epoch` is the table's head."
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.out += line
            if line.startswith(f"{first} "):
                self.segments = set().union(*map(shared_memory, processes(self.process.pid)))
                return
        pytest.fail(f"there was no row {first}:\n{self.out}{self.process.communicate()[1]}")

    def end(self) -> tuple[int, str]:
        "Wait for the end; the exit code and the errors."
        out, err = self.process.communicate(timeout=120)
        self.out += out
        return self.process.returncode, err

    def workers(self) -> list[int]:
        "The processes that the ranks' log files name last."
        logs = [self.path / "logs" / f"rank_{rank}.log" for rank in range(3)]
        return [int(re.findall(r"\(pid (\d+)", log.read_text())[-1]) for log in logs]

    def assert_nothing_is_left(self) -> None:
        "No process, no shared memory, no temporary file."
        assert wait_until_gone(lambda: processes(self.process.pid), 90) == {}
        assert [name for name in self.segments if Path(name).exists()] == []
        assert list(self.temporary.iterdir()) == []
        assert list(Path("/tmp").glob(f"{PREFIX}{self.process.pid}-*")) == []
        assert list(self.path.rglob(".*")) == []


def processes(session: int) -> dict[int, str]:
    "The processes of a session, zombies left out, with their names."
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        state, _, _, sid = rest.split()[:4]
        if int(sid) == session and state != "Z":
            found[int(stat.parent.name)] = name.partition("(")[2]
    return found


@pytest.fixture(scope="module")
def start(pictures: Path, user_environment: dict[str, str]) -> Iterator:
    "Start the command: `start(folder, '--cpus', '3')`; whatever the test leaves of it is killed."
    launches = []

    def begin(folder: Path, *more: str) -> Launch:
        launches.append(Launch(pictures, folder, user_environment, *more))
        return launches[-1]

    yield begin
    for launch in launches:
        for pid in processes(launch.process.pid):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(ray_gang: RayGang, fault_plan: Plan, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The run that nothing befell, on the three workers that are there already."
    folder = tmp_path_factory.mktemp("undisturbed")
    fault_plan.write([])
    with commands.undisturbed(), commands.on_gang(ray_gang):
        assert main([*OPTIONS, *places(pictures, folder), "--cpus", "3"]) == 0
    return folder / "run" / "version_0"


def test_a_killed_worker_is_a_line_on_the_terminal(start, undisturbed: Path, tmp_path: Path) -> None:
    launch = start(tmp_path, "--cpus", "3")
    launch.until_row(3)
    killed = launch.workers()[1]
    os.kill(killed, signal.SIGKILL)
    assert launch.end() == (0, "")
    assert_same(launch.path, undisturbed)
    (line,) = (launch.path / "logs" / "faults.log").read_text().splitlines()
    told = line.split(" ", 2)[2]
    assert f"rank 1 (host {os.uname().nodename}, pid {killed}): the worker's process died" in told
    assert [row for row in launch.out.splitlines() if "fault" in row] == [f"fault 1: {told}"]
    launch.assert_nothing_is_left()


@pytest.mark.slow
@pytest.mark.parametrize("row", [3, "epoch"])
def test_all_killed_at_once_begin_again_at_the_newest_checkpoint(start, undisturbed, tmp_path: Path, row) -> None:
    "Or at the start, where there is none."
    launch = start(tmp_path, "--cpus", "3")
    launch.until_row(row)
    for pid in launch.workers():
        os.kill(pid, signal.SIGKILL)
    code, err = launch.end()
    assert code == 0
    assert err.count("no worker is left: all begin again at the newest checkpoint") == 1 and "Traceback" not in err
    assert os.listdir(launch.path.parent) == ["version_0"]
    assert_same(launch.path, undisturbed)
    launch.assert_nothing_is_left()


@pytest.mark.slow
def test_a_killed_driver_then_a_preemption(start, undisturbed: Path, tmp_path: Path) -> None:
    "The same command with --autoresume goes on after each."
    first = start(tmp_path, "--cpus", "3", "--autoresume")
    first.until_row(3)
    workers = first.workers()
    first.process.kill()
    code, err = first.end()
    assert code == -signal.SIGKILL and err == LAST_WORDS + "\n"
    assert wait_until_gone(lambda: processes(first.process.pid).keys() & workers, 10) == set()
    second = start(tmp_path, "--cpus", "3", "--autoresume")
    second.until_row(6)
    second.process.terminate()
    code, err = second.end()
    assert code == 143 and "go on with the same command and --resume last" in err
    second.assert_nothing_is_left()
    third = start(tmp_path, "--cpus", "3", "--autoresume")
    assert third.end() == (0, "")
    assert_same(third.path, undisturbed)
    for launch in (third, first):
        launch.assert_nothing_is_left()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to"),
    [(signal.SIGTERM, "the group"), (signal.SIGTERM, "all processes"), (signal.SIGHUP, "all processes")],
)
def test_a_stop_that_all_processes_hear_of(start, undisturbed: Path, tmp_path: Path, number: int, to: str) -> None:
    """As `kill -- -PGID`, systemd and SLURM send it: to the driver's group, or also to the workers, each in its own.

    SIGHUP is what comes as a terminal is closed.
    """
    launch = start(tmp_path, "--cpus", "3")
    launch.until_row(3)
    os.killpg(launch.process.pid, number)
    if to == "all processes":
        for pid in processes(launch.process.pid).keys() - {launch.process.pid}:
            os.kill(pid, number)
    code, err = launch.end()
    assert code == 128 + number and "go on with the same command and --resume last" in err and "meanwhile" not in err
    launch.assert_nothing_is_left()
    resumed = start(tmp_path, "--cpus", "3", "--resume", "last")
    assert resumed.end() == (0, "")
    assert_same(resumed.path, undisturbed)


@pytest.mark.slow
def test_any_number_of_workers_goes_on_with_a_run_of_two(start, tmp_path: Path) -> None:
    "At a rate at which last bits stay that: at a tenfold one, no two world sizes agree by the last epochs."
    whole, begun = (start(tmp_path / name, "--cpus", "2", *CALM) for name in ("whole", "begun"))
    begun.until_row(2)
    begun.process.terminate()
    assert begun.end()[0] == 143
    assert whole.end() == (0, "")
    for number in (1, 2, 3):
        shutil.copytree(tmp_path / "begun", tmp_path / f"{number}")
        resumed = start(tmp_path / f"{number}", "--cpus", f"{number}", *CALM, "--resume", "last")
        assert resumed.end() == (0, "")
        if number == 2:
            assert_same(resumed.path, whole.path)
        assert_alike(resumed.path, whole.path)
        resumed.assert_nothing_is_left()


CALM = ["--lr", "0.002"]
ROUNDING = 5e-5  # after twelve epochs at that rate, losses were 1e-6 and weights 3e-6 apart


def assert_alike(run: Path, reference: Path) -> None:
    "Two runs are the same up to rounding: sums of other parts, whose last bits each step after carries on."
    for mine, wanted in zip(history(run), history(reference), strict=True):
        values = [float(value) for value in wanted.values()]
        assert [float(value) for value in mine.values()] == pytest.approx(values, rel=ROUNDING)
    steps = {tag: [step for step, _ in points] for tag, points in scalars(run).items()}
    assert steps == {tag: [step for step, _ in points] for tag, points in scalars(reference).items()}
    weights, wanted_weights = (load_file(folder / "model.safetensors") for folder in (run, reference))
    for name, tensor in weights.items():
        wanted_tensor = wanted_weights[name]
        np.testing.assert_allclose(
            tensor, wanted_tensor, rtol=0, atol=ROUNDING * np.abs(wanted_tensor).max(), err_msg=name
        )


class Head:
    "The head of somebody else's Ray cluster, three CPUs large."

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.folder, self.environment = folder, environment
        self.start()

    def start(self) -> None:
        "Start it, and wait until it answers."
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), "start", "--head", f"--port={self.address.rpartition(':')[2]}",
             "--include-dashboard=false", "--num-cpus=3", f"--temp-dir={self.folder}",
             "--object-store-memory=80000000", "--block"],
            env=self.environment | {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        assert wait_until_gone(lambda: not self.answers(), 60) is False

    def answers(self) -> bool:
        try:
            refuse_strangers(self.address)
        except UserError:
            return False
        return (self.folder / "ray_current_cluster").exists()

    def kill(self, *names: str) -> None:
        "Kill its processes of these names; all without any."
        for pid, name in processes(self.process.pid).items():
            if not names or name in names:
                os.kill(pid, signal.SIGKILL)
        if not names:
            self.process.wait()


@pytest.fixture
def head(user_environment: dict[str, str]) -> Iterator[Head]:
    "A Ray cluster whose token is in the environment."
    place = Path(tempfile.mkdtemp(prefix="h", dir="/tmp"))  # Ray's sockets need a short path
    token = {"RAY_AUTH_TOKEN": os.urandom(32).hex(), "RAY_USAGE_STATS_ENABLED": "0"}
    head = Head(place, user_environment | token)
    yield head
    head.kill()
    shutil.rmtree(place, ignore_errors=True)


@pytest.mark.slow
def test_the_head_of_a_cluster_is_restarted(head: Head, undisturbed: Path, pictures: Path, tmp_path: Path) -> None:
    """It can't be survived, since Ray forgets its cluster with it; but the same command goes on, once it is up again.

    Ray ends the driver without a word if that notices first that its machine's raylet is gone.
    """
    quick = head.environment | {"RAY_gcs_rpc_server_reconnect_timeout_s": "10"}  # Ray's own is a minute
    options = "--address", head.address, "--cpus", "3", "--autoresume"
    first = Launch(pictures, tmp_path, quick, *options)
    first.until_row(3)
    head.kill("gcs_server", "raylet")
    code, err = first.end()
    assert code == 1 and err.endswith(LAST_WORDS + "\n") and "Traceback" not in err
    head.kill()
    head.start()
    second = Launch(pictures, tmp_path, quick, *options)
    assert second.end() == (0, "")
    assert_same(second.path, undisturbed)
    assert wait_until_gone(lambda: processes(first.process.pid) | processes(second.process.pid), 30) == {}
