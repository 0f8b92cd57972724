"Starting Ray for one run, quietly and on loopback alone, or joining a cluster that is there. Sole importer of ray."

from __future__ import annotations

import atexit
import os
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import IO, Any, cast

from cluster import watchdog
from cluster.lean_ray import lean, replaced
from cluster.signals import hear_again, keep_signals, shielded
from learner.errors import UsageError, UserError

PREFIX = "orchestrator-ray-"
ANSWER_TIMEOUT = 5.0  # seconds
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # and empty settings of ours
STRANGER = "import sys, ray._raylet as ray; ray.GcsClient(address=sys.argv[1]).internal_kv_keys(b'', None)"
LONGEST_SOCKET = "4194304-abcdefgh/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"  # of a run
SHARED_MEMORY = "/dev/shm"
SETTINGS = {  # instead of Ray's own, with which a run gives way to all else on the machine, or gives up
    "RAY_worker_niceness": "0",  # at 15, a worker beside other programs has a few percent of a core
    "RAY_memory_monitor_refresh_ms": "0",  # kills workers where 95% of all memory is used, by whomever
    "RAY_worker_oom_score_adjustment": "200",  # at 1000, the system ends a worker when another program takes all memory
    "RAY_task_events_report_interval_ms": "0",  # for a dashboard that nobody starts, Ray remembers 100,000 messages
    "RAY_local_fs_capacity_threshold": "1",  # of a disk that is 95% full, Ray would take nothing
}
TOKEN_SOURCES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def import_ray(loopback: bool) -> ModuleType:
    """Import Ray with what it reads from the environment at that moment.

    The variable named after Windows and OSX is what keeps every port of a cluster on 127.0.0.1: Ray's own way to say
    "this is no cluster of several machines" (tests/cluster/test_ray_cluster.py watches the ports).
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if loopback:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray
    import ray._private.worker

    # what Ray's raylet has to say of a worker's death; there is no public switch for it, as there is for logs
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    return ray


@cache
def own_ray() -> ModuleType:
    "Ray, set up to start clusters: on loopback, with a token, which is read once and good for as long as we live."
    os.environ.pop("PYTHONOPTIMIZE", None)  # Ray's agents add to docstrings, which it may take away
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    return import_ray(loopback=True)


def store_size() -> int:
    """Bytes of shared memory for what is sent, above all a model's state, which has the way over TMPDIR's disk else.

    Half of what is free, since it is not taken before it is used: 256 MiB to 8 GiB, if files may be as large.
    """
    free = shutil.disk_usage(SHARED_MEMORY).free // 2 if os.path.isdir(SHARED_MEMORY) else 0
    longest = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    most = free if longest == resource.RLIM_INFINITY else min(free, longest)
    return max(256 * 2**20, min(most, 8 * 2**30))


class OwnCluster:
    """A Ray cluster for this run alone, gone with it: loopback, token authentication, no dashboard.

    A watchdog ends its processes and removes its files, also when this process is killed.
    """

    host = "127.0.0.1"
    warnings: tuple[str, ...] = ()

    def __init__(self, cpus: int, gpus: int) -> None:
        self.ray, self.folder = own_ray(), ""
        try:
            remove_stale_folders()
            self.folder = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=short_temporary_folder())
            self.watchdog = start_watchdog(self.folder)
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise _not_started(error) from error
        try:
            with shielded(), keep_signals(), marking(self.folder), lean(self.ray):
                self.ray.init(
                    address="local",
                    num_cpus=cpus,
                    num_gpus=gpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    object_store_memory=store_size(),
                    _temp_dir=f"{self.folder}/ray",  # Ray opens its folder to all users; the one around it stays ours
                )
            for started in self.ray._private.worker._global_node.all_processes.values():
                for server in started:  # Ray's way to end them is a SIGTERM, and to wait a second for each
                    server.process.terminate = server.process.kill
            _say(self.watchdog, watchdog.UP)
        except BaseException as error:
            self.close()
            if isinstance(error, Exception):  # Ray raises whatever it comes upon, bare Exception too
                raise _not_started(error) from error
            raise

    def close(self) -> None:
        "Stop Ray; the watchdog ends what is left of it, and removes its files."
        _leave(self.ray, self.watchdog)


def start_watchdog(*folder: str) -> subprocess.Popen[bytes]:
    "What says so when this process is ended from outside, and ends what is left of its own cluster in `folder`."
    with shielded():
        dog = subprocess.Popen(
            [sys.executable, "-IS", watchdog.__file__, *folder],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0,
            start_new_session=True,  # Ctrl-C is for the driver
        )  # fmt: skip
    atexit.register(_say, dog, watchdog.PEACE)  # of a script that closes nothing
    return dog


def _not_started(error: Exception) -> UserError:
    return UserError(f"Ray could not be started: {first_line(error)}; {watchdog.NEEDS}")


def first_line(error: BaseException) -> str:
    "What an error says first, as part of a sentence; its class where it says nothing."
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _say(dog: subprocess.Popen[bytes], what: bytes) -> None:
    with suppress(OSError, ValueError):  # it is told all already
        cast(IO[bytes], dog.stdin).write(what)


def _leave(ray: Any, dog: subprocess.Popen[bytes]) -> None:
    """End Ray in this process, and wait for the watchdog.

    Once Ray's C++ has ended, a SIGTERM would kill us, until we hear of it again: with the first thing that Ray makes
    then, since it takes another 10 ms to end its processes.
    """
    _say(dog, watchdog.PEACE)
    with replaced(ray._private.worker, "FunctionActorManager", _hearing):
        ray.shutdown()
    hear_again()
    dog.communicate()


def _hearing(make: Callable[..., Any]) -> Callable[..., Any]:
    def heard(*args: Any) -> Any:
        hear_again()
        return make(*args)

    return heard


@contextmanager
def marking(folder: str) -> Iterator[None]:
    "Mark the processes that are started meanwhile, and all that these start, as belonging to the cluster in `folder`."
    os.environ[watchdog.MARK] = folder
    try:
        yield
    finally:
        del os.environ[watchdog.MARK]


class JoinedCluster:
    "A Ray cluster that others run, at HOST:PORT."

    def __init__(self, address: str) -> None:
        refuse_strangers(address)
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "3")  # tries to join; Ray's 20 take half a minute
        self.warnings: list[str] = []
        if os.environ.get("RAY_AUTH_MODE") is None and has_token():
            os.environ["RAY_AUTH_MODE"] = "token"
        self.ray = import_ray(loopback=address.startswith(("127.", "localhost")))
        try:
            with shielded(), keep_signals():
                self.ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError, self.ray.exceptions.RayError) as error:
            raise UserError(
                f"no Ray cluster could be joined at {address}: {first_line(error)}; is it up (ray start --head), and "
                "is its token here (RAY_AUTH_TOKEN)?"
            ) from error
        self.watchdog = start_watchdog()
        _say(self.watchdog, watchdog.UP)
        self.host = self.ray.util.get_node_ip_address()
        if lets_strangers_in(address):
            self.warnings.append(
                f"the Ray cluster at {address} asks for no token: whoever reaches that port can run code on all its "
                "machines; start it with RAY_AUTH_MODE=token and a token in RAY_AUTH_TOKEN"
            )

    def close(self) -> None:
        "Leave the cluster, which goes on."
        _leave(self.ray, self.watchdog)


def refuse_strangers(address: str) -> None:
    """Raise UserError if HOST:PORT is silent or speaks another language than Ray, which would try for minutes.

    A gRPC server, which Ray's is, says at once how it wants to be spoken to: an HTTP/2 frame of settings.
    """
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=ANSWER_TIMEOUT) as server:
            if os.environ.get("RAY_USE_TLS", "0") not in ("0", "false"):
                return
            server.sendall(HTTP2_PREFACE)
            answer = server.recv(9, socket.MSG_WAITALL)
        if answer[3:4] + answer[5:] != b"\4\0\0\0\0":
            raise OSError("what listens there is no Ray")
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"no Ray cluster could be joined at {address}: {reason}; is it up, and is this the port of its head "
            "(ray start --head --port=N)?"
        ) from error


def lets_strangers_in(address: str) -> bool:
    "Whether the Ray at HOST:PORT answers without a token; asked by another process, as each reads its token but once."
    env = {name: value for name, value in os.environ.items() if name not in TOKEN_SOURCES}
    env["RAY_AUTH_MODE"] = "disabled"
    try:
        asked = subprocess.run([sys.executable, "-c", STRANGER, address], env=env, capture_output=True, timeout=20)
        return asked.returncode == 0
    except subprocess.TimeoutExpired:
        return False


def has_token() -> bool:
    "Whether Ray would find an authentication token."
    return any(map(os.environ.get, TOKEN_SOURCES)) or os.path.exists(os.path.expanduser("~/.ray/auth_token"))


def short_temporary_folder() -> str:
    "Where Ray's sockets may lie: their paths have 107 bytes at most, which all but the shortest TMPDIR would break."
    folder = tempfile.gettempdir()
    return folder if len(f"{folder}/{PREFIX}{LONGEST_SOCKET}") <= 107 else "/tmp"


def remove_stale_folders() -> None:
    "Remove what runs left whose driver was killed: the folder's name has its process number."
    for folder in Path(short_temporary_folder()).glob(f"{PREFIX}*"):
        pid = folder.name.removeprefix(PREFIX).split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def require(ray: ModuleType, need: dict[str, float], address: str | None) -> None:
    "Raise UsageError if the cluster as a whole has less of a resource than is needed."
    have = ray.cluster_resources()
    for name, amount in need.items():
        if have.get(name, 0) + 1e-6 < amount:
            where = f"the cluster at {address}" if address else "this machine"
            raise UsageError(f"{amount:g} {name}s are needed but {where} has {have.get(name, 0):g}; ask for fewer")


def node_address() -> str:
    "The address of this process's node, by which nodes are told apart."
    import ray

    return ray.util.get_node_ip_address()


def in_bundle(group: Any, number: int) -> Any:
    "The scheduling strategy that puts an actor into that bundle of a placement group."
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
