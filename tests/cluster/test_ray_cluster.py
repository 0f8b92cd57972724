"""Ray as we start it: nothing listens beyond the loopback, strangers are turned away, no files stay; and joining one.

What Ray listens on is undocumented (see ray_cluster.import_ray), so the ports are looked at, not the settings.
"""

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from cluster.lean_ray import lean, no_api_server, once_there, without_monitors
from cluster.ray_cluster import (
    PREFIX,
    JoinedCluster,
    OwnCluster,
    first_line,
    has_token,
    refuse_strangers,
    remove_stale_folders,
    require,
    store_size,
)
from cluster.ray_gang import RayGang
from cluster.signals import keep_signals
from learner.errors import UsageError, UserError
from tests.commands import ray_head

STRANGER = """
import ray, sys
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
except ConnectionError:
    print("turned away")
else:
    print("let in", ray.cluster_resources())
"""


def test_all_of_ray_listens_on_the_loopback_alone(
    ray_gang: RayGang, listening: Callable[[Iterable[int]], set[str]], descendants: Callable[[int], dict[int, str]]
) -> None:
    below = descendants(os.getpid())
    commands = " ".join(below.values())
    for part in ("gcs_server", "raylet", "ray::WorkerProcess"):
        assert part in commands
    for pid, command in below.items():
        assert listening([pid]) <= {"127.0.0.1"}, command
    assert listening([os.getpid()]) == {"127.0.0.1"}
    assert listening(below) == {"127.0.0.1"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_all_processes_ends_none_but_the_driver(
    ray_gang: RayGang, descendants: Callable[[int], dict[int, str]], number: signal.Signals
) -> None:
    "Nor the watchdog, which has to clean up behind them."
    below = {pid: command for pid, command in descendants(os.getpid()).items() if "ray" in command}
    assert len(below) > 6 and any("watchdog" in command for command in below.values())
    for pid, command in below.items():
        (blocked,) = re.findall(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
        assert int(blocked, 16) >> (number - 1) & 1, command
    assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_workers_do_not_give_way_to_other_programs(ray_gang: RayGang) -> None:
    "Ray's way, 15 nicer, leaves them 4% of a core; and the system would end them first, whoever takes all memory."
    ours, eager = os.getpriority(os.PRIO_PROCESS, 0), int(Path("/proc/self/oom_score_adj").read_text())
    for location in ray_gang.locations:
        assert os.getpriority(os.PRIO_PROCESS, location.pid) == ours
        theirs = int(Path(f"/proc/{location.pid}/oom_score_adj").read_text())
        assert theirs in (200, min(eager + 200, 1000)), "a little before their driver; older Rays set it"


FULL = """
import time
from cluster.ray_cluster import OwnCluster

class Actor:
    def wait(self):
        time.sleep(1.5)  # Ray would look four times a second
        return "still there"

cluster = OwnCluster(1, 0)
print(cluster.ray.get(cluster.ray.remote(Actor).remote().wait.remote()))
cluster.close()
"""


def test_on_a_machine_whose_memory_others_use_workers_stay() -> None:
    env = os.environ | {"RAY_memory_usage_threshold": "0.01"}
    done = subprocess.run([sys.executable, "-c", FULL], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "still there\n", done


def test_what_a_run_of_one_machine_has_no_use_for_is_not_started(
    ray_gang: RayGang, descendants: Callable[[int], dict[int, str]]
) -> None:
    "And Ray is as it was afterwards."
    commands = " ".join(descendants(os.getpid()).values())
    assert [name for name in ("log_monitor", "monitor.py", "dashboard.py") if name in commands] == []
    places = ray_gang.ray._private
    assert isinstance(places.parameter.RayParams, type)
    assert places.node.Node.start_api_server.__module__ == "ray._private.node"
    assert places.services.get_node.__module__ == "ray._private.services"


def test_a_ray_without_the_names_that_are_replaced_starts_as_ever() -> None:
    "Or without what they take and give."
    assert without_monitors(lambda head, no_monitor=False: (head, no_monitor))(7) == (7, True)
    assert once_there(SimpleNamespace(), lambda *where: where, "address", "node") == ("address", "node")
    bare = SimpleNamespace(_private=SimpleNamespace(**{name: SimpleNamespace() for name in ("parameter", "services")}))
    bare._private.node = SimpleNamespace(Node=SimpleNamespace(start_api_server=len))
    with lean(bare):
        assert bare._private.node.Node.start_api_server is no_api_server
        assert vars(bare._private.services) == vars(bare._private.parameter) == {}
    assert vars(bare._private.node.Node) == {"start_api_server": len}


def test_no_dashboard_serves_pages(ray_gang: RayGang) -> None:
    assert not ray_gang.ray._private.worker.global_worker.node.webui_url


@pytest.mark.parametrize("token", ["", "ab" * 32])
def test_a_stranger_is_turned_away(ray_gang: RayGang, token: str) -> None:
    address = ray_gang.ray.get_runtime_context().gcs_address
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_NUM_REDIS_GET_RETRIES": "1"}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, address], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "turned away", done.stderr


def test_files_lie_in_a_folder_that_others_can_not_read(ray_gang: RayGang) -> None:
    folder = Path(ray_gang.cluster.folder)
    assert folder.name.startswith(f"{PREFIX}{os.getpid()}-")
    assert folder.stat().st_mode & 0o077 == 0
    assert any(folder.rglob("raylet*"))


def test_folders_of_dead_drivers_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as place:
        monkeypatch.setattr("cluster.ray_cluster.short_temporary_folder", lambda: place)
        theirs, ours, other = (Path(place, name) for name in (f"{PREFIX}{dead.pid}-x", f"{PREFIX}{os.getpid()}-x", "x"))
        for folder in (theirs, ours, other):
            (folder / "session").mkdir(parents=True)
        remove_stale_folders()
        assert sorted(Path(place).iterdir()) == sorted([ours, other])


def test_a_ray_that_can_not_start_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Without files to open, say: then Ray raises whatever it comes upon. A Ctrl-C stays one; nothing is left."
    monkeypatch.setattr("cluster.ray_cluster.short_temporary_folder", lambda: str(tmp_path))
    monkeypatch.setattr("cluster.ray_cluster.lean", lambda ray: nullcontext())
    for raised, seen in ((Exception("no raylet\nmore"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)):
        names = SimpleNamespace(worker=SimpleNamespace())
        ray = SimpleNamespace(init=Mock(side_effect=raised), shutdown=lambda: None, _private=names)
        monkeypatch.setattr("cluster.ray_cluster.own_ray", lambda ray=ray: ray)
        with pytest.raises(seen, match="Ray could not be started: no raylet; it needs" if seen is UserError else None):
            OwnCluster(1, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("refused", ["tempfile.mkdtemp", "subprocess.Popen"])
def test_no_place_or_no_process_for_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    "A /tmp that can only be read, a user who may have no more processes."
    monkeypatch.setattr("cluster.ray_cluster.short_temporary_folder", lambda: str(tmp_path))
    monkeypatch.setattr("cluster.ray_cluster.own_ray", lambda: None)
    monkeypatch.setattr(refused, Mock(side_effect=OSError(30, "Read-only file system", "/tmp/x")))
    with pytest.raises(UserError, match=r"Ray could not be started: .*Read-only file system.*; it needs"):
        OwnCluster(1, 0)
    assert not list(tmp_path.iterdir())


def test_too_much_is_refused(ray_gang: RayGang) -> None:
    require(ray_gang.ray, {"CPU": 4}, None)
    with pytest.raises(UsageError, match="5 CPUs are needed but this machine has 4"):
        require(ray_gang.ray, {"CPU": 5}, None)
    with pytest.raises(UsageError, match="1 GPUs are needed but the cluster at host:1 has 0"):
        require(ray_gang.ray, {"GPU": 1}, "host:1")


def test_sigterm_is_kept() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with keep_signals():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(SystemExit) as ended, keep_signals():
        sys.exit(signal.SIGTERM)  # as Ray's handler does, while Ray starts
    assert ended.value.code == 143


HEARD = """
import re, signal
from pathlib import Path
from cluster.ray_cluster import OwnCluster

def say(kill):
    def instead(*args, **options):
        caught = int(re.search("SigCgt:(.*)", Path("/proc/self/status").read_text())[1], 16)
        print("caught" if caught >> signal.SIGTERM - 1 & 1 else "deadly")
        kill(*args, **options)
    return instead

signal.signal(signal.SIGTERM, lambda number, frame: None)
cluster = OwnCluster(1, 0)
node = cluster.ray._private.worker._global_node
node.kill_all_processes = say(node.kill_all_processes)
cluster.close()
"""


def test_a_signal_is_heard_while_ray_ends_its_processes() -> None:
    "Its C++ has ended by then, and has left SIGTERM as it comes from the system."
    done = subprocess.run([sys.executable, "-c", HEARD], capture_output=True, text=True, timeout=60)
    assert done.stdout == "caught\n", done


def test_ctrl_c_waits_until_ray_has_started() -> None:
    "An exception that is raised in a hook of a fork is lost. A second one ends the wait."
    before, done = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), keep_signals():
        signal.raise_signal(signal.SIGINT)
        done.append("started")
    with pytest.raises(KeyboardInterrupt), keep_signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("hung")
    assert done == ["started"] and signal.getsignal(signal.SIGINT) is before


def free_port() -> int:
    "One on which nothing listens."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "no-such-host.invalid"])
def test_nothing_at_the_address(host: str) -> None:
    address, started = f"{host}:{free_port()}", time.monotonic()
    with pytest.raises(UserError, match=f"no Ray cluster could be joined at {address}: .*ray start --head") as caught:
        JoinedCluster(address)
    assert time.monotonic() - started < 10
    assert "\n" not in str(caught.value)


def test_a_reason_is_part_of_a_sentence() -> None:
    assert first_line(RuntimeError("The node timed out.\nSee its log.")) == "The node timed out"
    assert first_line(RuntimeError()) == "RuntimeError"


def test_where_a_token_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not has_token()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t")
    assert has_token()
    monkeypatch.setenv("HOME", "/nowhere")
    assert not has_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    assert has_token()


@pytest.fixture
def head() -> Iterator[tuple[str, dict[str, str]]]:
    "A Ray cluster of somebody else: its address, and the environment that has its token."
    with ray_head(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=os.urandom(32).hex()) as found:
        yield found


def test_a_cluster_of_others_is_joined_and_goes_on(
    head: tuple[str, dict[str, str]], pictures: Path, tmp_path: Path
) -> None:
    address, env = head
    del env["RAY_AUTH_MODE"], env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]  # a user knows of the token alone
    line = f"-m orchestrator.launch --address {address} --cpus 2 --data {pictures} --size 24 --batch-size 8 --epochs 1"
    done = subprocess.run(
        [sys.executable, *line.split(), "--cache", "off", "--runs", str(tmp_path)],
        env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 CPU workers, over gloo" in done.stdout
    assert re.search(r"^accuracy [01]\.\d{4} ", done.stdout, re.MULTILINE)
    refuse_strangers(address)  # the cluster outlives the run


@pytest.mark.slow
def test_where_a_joined_ray_kills_workers_for_want_of_memory_its_reason_is_told(tmp_path: Path) -> None:
    with ray_head(RAY_memory_usage_threshold="0.01") as (address, env):
        line = f"-m orchestrator.launch --address {address} --cpus 2 --data shapes --runs {tmp_path}"
        done = subprocess.run([sys.executable, *line.split()], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert re.fullmatch(r"(warning: .*\n)*error: only 0 of 2 workers .*running low on memory.*limit.*\n", done.stderr)


SMALL = """
import sys
from cluster import ray_cluster
from orchestrator.launch import main

assert ray_cluster.store_size() >= 256 * 2**20
ray_cluster.store_size = lambda: 80 * 2**20
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_state_for_which_there_is_no_room_on_its_way_is_told_in_a_sentence(pictures: Path, tmp_path: Path) -> None:
    "134 MB, for which neither the shared memory nor a disk that counts as full has any."
    line = f"--cpus 2 --data {pictures} --cache off --size 32 --batch-size 8 --epochs 1 --runs {tmp_path}"
    done = subprocess.run(
        [sys.executable, "-c", SMALL, *line.split(), "--arch", "xresnet18", "--optimizer", "adam"],
        env=os.environ | {"RAY_local_fs_capacity_threshold": "0.0001"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*the model's state can't be sent: there is no room .*TMPDIR\n", done.stderr), done


@pytest.mark.parametrize(
    "free, longest, expected",
    [
        (64 * 2**20, resource.RLIM_INFINITY, 256 * 2**20),  # a container's
        (6 * 2**30, resource.RLIM_INFINITY, 3 * 2**30),
        (2**40, resource.RLIM_INFINITY, 8 * 2**30),
        (2**40, 2 * 2**30, 2 * 2**30),  # ulimit -f
        (2**40, 2**20, 256 * 2**20),  # too little for Ray in any case, which says so
    ],
)
def test_the_shared_memory_asked_for_is_half_of_what_is_free_within_bounds(
    monkeypatch: pytest.MonkeyPatch, free: int, longest: int, expected: int
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (longest, longest))
    monkeypatch.setattr("cluster.ray_cluster.SHARED_MEMORY", "/")
    assert store_size() == expected
    monkeypatch.setattr("cluster.ray_cluster.SHARED_MEMORY", "/no such folder")
    assert store_size() == 256 * 2**20
