"""Machines that can no longer be reached: raylets in network namespaces, joined by a bridge, of which a link is cut.

Nothing there dies or closes a connection; it only falls silent. Needs root, `ip` and `unshare`.
"""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from cluster.faults import ABSENCE
from cluster.messages import Job

pytestmark = pytest.mark.slow
ADDRESS = "10.77.0.1:6399"
JOIN = ["--address", ADDRESS, "--num-cpus=1", "--node-ip-address"]

BEGIN = """
import json, os, pickle, subprocess, sys, time
from pathlib import Path
from cluster.crew import Workers
from cluster.faults import Tolerance
from cluster.messages import Chunk
from cluster.ray_cluster import JoinedCluster
from cluster.ray_gang import RayGang

job, folder, address = pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]), sys.argv[3]
wait = float(sys.argv[4])
cluster = JoinedCluster(address)
while cluster.ray.cluster_resources().get("CPU", 0) < 3:
    time.sleep(0.2)
cluster.close()
said = []
tolerance = Tolerance(wait=wait, hang_after=5.0)
gang = RayGang(job, Workers(3, 0.0, "gloo", address), folder / "logs", tolerance, said.append)
print(json.dumps({"hosts": [location.host for location in gang.locations]}), flush=True)
sys.stdin.readline()
"""

TRAIN = """
def run(cut=None):
    losses, steps, waited = [], [], 0.0
    for epoch in range(3):
        for number in range(7):
            began = time.monotonic()
            for reports in gang.stream([Chunk(True, epoch, number, 7 * epoch + number, ({"lr": 0.05},))]):
                losses += reports[0].losses
                steps.append(reports[0].chunk.step)
            waited = max(waited, time.monotonic() - began)
            if cut and (epoch, number) == (1, 3):
                subprocess.run(cut, check=True)
    return {"losses": losses, "steps": steps, "prints": gang.call("fingerprint"), "waited": waited}

healthy = run()
gang.start(job, 3)
hit = run(cut=sys.argv[5:])
incidents = [*gang.incidents, *gang.vain]
print(json.dumps({"healthy": healthy, "hit": hit, "said": said, "hosts": [location.host for location in gang.locations],
                  "failures": [(one.rank, one.kind) for incident in incidents for one in incident]}), flush=True)
gang.close()
"""

FETCH = """
ask = gang.calls.ask

def cut_off(method, *args, **of):
    asked = ask(method, *args, **of)
    if method == "snapshot":
        assert gang.ray.wait(list(asked.values()), fetch_local=False, timeout=20)[0]  # it is there, if not here
        subprocess.run(sys.argv[5:], check=True)
    return asked

gang.calls.ask = cut_off
gang.newest = {gang.seated[2]}
began = time.monotonic()
(failure,) = gang._hand_over()
print(json.dumps([failure.rank, failure.kind, time.monotonic() - began]), flush=True)
gang.close()
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Network:
    "Three namespaces, `a` to `c`, each with an `eth0` at a bridge that is in a fourth one."

    def __init__(self) -> None:
        self.names = {one: f"chaos{os.getpid()}{one}" for one in ("a", "b", "c", "bridge")}

    def make(self) -> None:
        for name in self.names.values():
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        bridge = self.names["bridge"]
        ip("-n", bridge, "link", "add", "bridge", "type", "bridge")
        ip("-n", bridge, "link", "set", "bridge", "up")
        for number, one in enumerate("abc", start=1):
            name = self.names[one]
            ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", one, "netns", bridge)
            ip("-n", bridge, "link", "set", "dev", one, "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")

    def within(self, one: str, host: str) -> list[str]:
        "How a command line begins that is to run there, on a machine of that name."
        return ["ip", "netns", "exec", self.names[one], "unshare", "--uts", "sh", "-c",
                f'hostname {host}; exec "$@"', "sh"]  # fmt: skip

    def cut(self, one: str) -> list[str]:
        "The command that cuts a namespace off."
        return ["ip", "-n", self.names["bridge"], "link", "set", "dev", one, "down"]

    def part(self, one: str, other: str) -> list[str]:
        "The command that cuts two namespaces off from each other, and from no other."
        ways = [(one, "abc".index(other) + 1), (other, "abc".index(one) + 1)]
        return ["sh", "-ec", "\n".join(f"ip -n {self.names[a]} route add blackhole 10.77.0.{b}/32" for a, b in ways)]

    def close(self) -> None:
        for name in self.names.values():
            with suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def network() -> Iterator[Network]:
    network = Network()
    try:
        network.make()
    except (OSError, subprocess.CalledProcessError) as error:
        network.close()
        pytest.skip(f"network namespaces can't be made here: {error}")
    yield network
    network.close()


@pytest.fixture
def environment(quick: bool) -> Iterator[dict[str, str]]:
    "Ray's, as a user of an unreliable network sets it, or who has never heard of that."
    settings = {"period_ms": "500", "timeout_ms": "1000", "failure_threshold": "3"}
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GLOO_"))}
    if quick:
        env |= {f"RAY_health_check_{name}": value for name, value in settings.items()}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(32).hex(), "GLOO_SOCKET_IFNAME": "eth0"}
    env |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.getcwd()}
    temporary = tempfile.mkdtemp(dir="/tmp")  # Ray's sockets need a short path
    yield env | {"RAY_TMPDIR": temporary}
    shutil.rmtree(temporary, ignore_errors=True)


def start_ray(network: Network, one: str, host: str, env: dict[str, str], *words: str) -> subprocess.Popen:
    ray = str(Path(sys.executable).with_name("ray"))
    return subprocess.Popen(
        [*network.within(one, host), ray, "start", *words, "--object-store-memory=80000000", "--block"],
        env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


@contextmanager
def driven(
    script: str, wait: float, job: Job, folder: Path, network: Network, env: dict[str, str], three: bool = False
) -> Iterator[tuple[list[subprocess.Popen], subprocess.Popen]]:
    """The Ray of a machine with room for two workers, and of one for a third, and a driver that has them all.

    It reads a line before it goes on as the script says, cutting off the second machine; it waits so many seconds for a
    replacement. Or one worker on each of `three` machines, of which it parts the second from the third.
    """
    (folder / "driver.py").write_text(BEGIN + script)
    (folder / "job").write_bytes(pickle.dumps(job))
    place = env["RAY_TMPDIR"]
    head = ["--head", "--node-ip-address=10.77.0.1", "--port=6399", "--include-dashboard=false", f"--temp-dir={place}"]
    with ExitStack() as stack:
        rays = [start_ray(network, "a", "near", env, *head, f"--num-cpus={1 if three else 2}")]
        stack.callback(lambda: [end_session(ray) for ray in rays])
        wait_for(lambda: Path(place, "ray_current_cluster").exists())
        rays.append(start_ray(network, "b", "far", env, *JOIN, "10.77.0.2"))
        if three:
            wait_for(Path(place, "session_latest/sockets/raylet.1").exists)  # or both would take these names
            rays.append(start_ray(network, "c", "new", env, *JOIN, "10.77.0.3"))
        cut = network.part("b", "c") if three else network.cut("b")
        driver = stack.enter_context(subprocess.Popen(
            [*network.within("a", "near"), sys.executable, folder / "driver.py", folder / "job", folder, ADDRESS,
             f"{wait}", *cut],
            env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ))  # fmt: skip
        stack.callback(driver.kill)
        assert driver.stdout is not None
        first = driver.stdout.readline()
        assert first.startswith("{"), driver.communicate()
        assert json.loads(first)["hosts"] == (["near", "far", "new"] if three else ["near", "near", "far"])
        yield rays, driver


@pytest.mark.parametrize("quick", [True, False])
def test_a_machine_that_is_cut_off(
    job: Job, tmp_path: Path, network: Network, environment: dict[str, str], quick: bool
) -> None:
    """The others are freed and go on, no step is repeated. Its worker is replaced, and the bits are the same.

    Without Ray's quick settings, its place is taken for another minute; the others go on by themselves.
    """
    with driven(TRAIN, 60 if quick else 1, job, tmp_path, network, environment) as (rays, driver):
        rays.append(start_ray(network, "c", "new", environment, *JOIN, "10.77.0.3"))
        out, err = driver.communicate("go on\n", timeout=150)
        assert out.startswith("{"), err
        seen = json.loads(out)
        print(seen["said"], seen["hit"]["waited"])
        (silence,) = re.findall(r"no sign of life for ([0-9.]+) s", "".join(seen["said"]))
        assert float(silence) < ABSENCE + 1, "by then it is noticed"
        assert seen["hit"]["steps"] == list(range(21)), "none is repeated"
        assert [rank for rank, _ in seen["failures"]] == [2]
        assert seen["hosts"] == (["near", "near", "new"] if quick else ["near", "near"])
        for name in ("losses", "prints") if quick else ():
            assert seen["hit"][name] == seen["healthy"][name]
        assert seen["hit"]["losses"] == pytest.approx(seen["healthy"]["losses"], rel=1e-3)
        assert wait_for(lambda: not workers_in(rays[1]), 60), "what was cut off ends by itself"


@pytest.mark.parametrize("quick", [False])
def test_a_machine_that_is_cut_off_with_the_newest_state(
    job: Job, tmp_path: Path, network: Network, environment: dict[str, str]
) -> None:
    "While the driver fetches it, which Ray would go on with for a minute."
    with driven(FETCH, 1, job, tmp_path, network, environment) as (_, driver):
        out, err = driver.communicate("go on\n", timeout=150)
        assert out.startswith("["), err
        rank, kind, seconds = json.loads(out)
        assert (rank, kind) == (2, "hung")
        assert seconds < ABSENCE + 3, "it was noticed by its silence"


@pytest.mark.parametrize("quick", [False])
def test_two_machines_that_can_not_reach_each_other(
    job: Job, tmp_path: Path, network: Network, environment: dict[str, str]
) -> None:
    "Though both reach the driver: the others go on without one of them, no step is repeated."
    with driven(TRAIN, 60, job, tmp_path, network, environment, three=True) as (_, driver):
        out, err = driver.communicate("go on\n", timeout=150)
        assert out.startswith("{"), err
        seen = json.loads(out)
        print(seen["said"], seen["hit"]["waited"])
        assert "rank 2 (host new" in "".join(seen["said"]) and "no connection to rank 1" in "".join(seen["said"])
        assert seen["hit"]["steps"] == list(range(21)), "none is repeated"
        assert seen["failures"] == [[0, "peer"], [2, "unreachable"], [2, "unreachable"]], "so is its replacement"
        assert seen["hosts"] == ["near", "far"]
        assert seen["hit"]["losses"] == pytest.approx(seen["healthy"]["losses"], rel=1e-3)


def workers_in(ray: subprocess.Popen) -> list[int]:
    "The workers of a machine."
    return [pid for pid in session(ray) if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::Worker")]


def session(ray: subprocess.Popen) -> list[int]:
    "All processes that `ray start` has started."
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == ray.pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def end_session(ray: subprocess.Popen) -> None:
    ray.terminate()
    try:
        ray.wait(10)
    except subprocess.TimeoutExpired:
        ray.kill()
        ray.wait()
    for pid in session(ray):
        os.kill(pid, 9)


def wait_for(look, seconds: float = 60) -> bool:
    "Whether it comes true in that time."
    deadline = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(found)
