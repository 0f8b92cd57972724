"What a stranger on the network reaches: the loopback alone, nothing without the token; and joining others' clusters."

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.ray_cluster import JoinedCluster, has_token, lets_strangers_in
from learner.errors import UserError
from tests.commands import Ended, ray_head


def test_ray_runs_with_a_token_of_its_own_and_serves_no_pages(ray_gang: Any, descendants: Callable[..., Any]) -> None:
    "Addresses, and that strangers are turned away, are in tests/cluster/test_ray_cluster.py."
    node = ray_gang.ray._private.worker.global_worker.node
    assert not node.webui_url and not node.get_gcs_client().internal_kv_get(b"webui:url", b"dashboard")
    raylet = next(pid for pid, line in descendants(os.getpid()).items() if "raylet/raylet" in line)
    settings = Path(f"/proc/{raylet}/environ").read_bytes().split(b"\0")
    assert {b"RAY_AUTH_MODE=token", b"RAY_USAGE_STATS_ENABLED=0"} <= set(settings)
    (token,) = (line.removeprefix(b"RAY_AUTH_TOKEN=") for line in settings if line.startswith(b"RAY_AUTH_TOKEN="))
    assert len(bytes.fromhex(token.decode())) == 32
    files = [path for path in Path(ray_gang.cluster.folder).rglob("*") if path.is_file()]
    assert files and not [path for path in files if token in path.read_bytes()], "it is in no file"


Answer = Callable[[socket.socket], Any]


@pytest.fixture
def server() -> Iterator[Callable[[Answer], str]]:
    "A function that gives the address of a server which treats each connection so."
    listeners = []

    def serve(answer: Answer) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def run() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                    with connection:
                        answer(connection)
                except OSError:
                    return

        threading.Thread(target=run, daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    yield serve
    for listener in listeners:
        listener.close()


OTHERS: dict[str, Answer] = {
    "web server": lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n") or connection.recv(100),
    "ssh": lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n") or connection.recv(100),
    "hangs up": lambda connection: None,
    "endless": lambda connection: connection.sendall(bytes(10_000_000)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_ray_is_refused_at_once(server: Any, kind: str) -> None:
    address = server(OTHERS[kind])
    with pytest.raises(UserError, match=f"no Ray cluster could be joined at {address}: .*ray start --head"):
        JoinedCluster(address)


def test_what_never_answers_is_given_up(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.ray_cluster.ANSWER_TIMEOUT", 0.2)
    released = threading.Event()
    try:
        with pytest.raises(UserError, match="timed out; is it up"):
            JoinedCluster(server(lambda connection: released.wait(60)))
    finally:
        released.set()


def test_a_cluster_that_was_not_joined_leaves_no_run_directory(
    server: Any, arguments: list[str], tmp_path: Path, there: Any
) -> None:
    arguments.remove("--local")
    ended = there("launch", *arguments, "--cpus", "2", "--name", "x", "--address", server(OTHERS["hangs up"]))
    assert ended.code == 1
    assert ended.err.startswith("error: no Ray cluster could be joined at 127.0.0.1:")
    assert len(ended.err.splitlines()) == 1
    assert not (tmp_path / "runs" / "x").exists()


def test_a_token_that_may_not_be_read_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setattr(os, "stat", refuse)
    assert not has_token()


@pytest.fixture(scope="module")
def open_head() -> Iterator[str]:
    "The address of a Ray cluster of somebody else, without a token."
    with ray_head(RAY_AUTH_MODE="disabled") as (address, _):
        yield address


JOIN = """
import sys
from cluster.ray_cluster import JoinedCluster
cluster = JoinedCluster(sys.argv[1])
print(*cluster.warnings, sep="\\n")
cluster.close()
"""


USERS = {
    "sets nothing": {},
    "has a token": {"RAY_AUTH_TOKEN": "ab" * 32},
    "wants none": {"RAY_AUTH_MODE": "disabled"},
    "wants one": {"RAY_AUTH_MODE": "token"},
}


@pytest.fixture(scope="module")
def joined(open_head: str, user_environment: dict[str, str]) -> dict[str, Ended]:
    "What those who join that cluster are told, by what they have set; all at once."
    started = {
        user: subprocess.Popen(
            [sys.executable, "-c", JOIN, open_head], env=user_environment | {"HOME": "/nowhere"} | settings,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for user, settings in USERS.items()
    }  # fmt: skip
    told = {user: process.communicate(timeout=60) for user, process in started.items()}
    return {user: Ended(process.returncode, *told[user]) for user, process in started.items()}


@pytest.mark.parametrize("user", [user for user in USERS if user != "wants one"])
def test_joining_a_cluster_without_a_token_says_what_is_exposed(
    open_head: str, joined: dict[str, Ended], user: str
) -> None:
    "Whatever the user has set: it is the cluster that is open."
    ended = joined[user]
    assert (ended.code, ended.err) == (0, "")
    (warning,) = ended.out.splitlines()
    assert f"the Ray cluster at {open_head} asks for no token" in warning
    assert "whoever reaches that port can run code on all its machines" in warning
    assert "RAY_AUTH_TOKEN" in warning


def test_a_token_that_is_asked_for_and_missing_is_one_sentence(open_head: str, joined: dict[str, Ended]) -> None:
    told = joined["wants one"].err.splitlines()[-1]
    assert told.startswith(f"learner.errors.UserError: no Ray cluster could be joined at {open_head}: Token auth")
    assert told.endswith("is its token here (RAY_AUTH_TOKEN)?")


def test_a_cluster_that_asks_for_a_token_is_not_warned_of(ray_gang: Any) -> None:
    assert not lets_strangers_in(ray_gang.ray.get_runtime_context().gcs_address)
