"How tests run what a user runs: commands in this process or in one of their own, and a Ray cluster of somebody else."

import importlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch


@dataclass(frozen=True)
class Ended:
    "What a command left: its exit code and what it printed."

    code: int
    out: str
    err: str


@contextmanager
def undisturbed() -> Iterator[None]:
    "A command run in this process changes the environment, torch's threads, signals and hooks; put them back."
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    with patch.dict(os.environ), patch.object(threading, "excepthook", threading.excepthook):
        yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


def run_here(capsys: pytest.CaptureFixture[str], name: str, *arguments: Any) -> Ended:
    "Run `python -m orchestrator.NAME` with arguments in this process."
    main = importlib.import_module(f"orchestrator.{name}").main
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return Ended(code, *capsys.readouterr())


@contextmanager
def on_gang(gang: Any) -> Iterator[None]:
    "Meanwhile, commands in this process have as many of the gang's workers as they ask for, and leave them running."

    def seat(
        job: Any, devices: Any, config: object, logs: Path, notice: Any = gang.notice, *_: object, **__: object
    ) -> Any:
        gang.notice = notice
        gang.start(job, devices.count)
        (logs / "rank_0.log").touch()  # as its own workers would: the run has begun
        return gang

    notice = gang.notice
    seats = [patch(f"orchestrator.{module}.make_gang", seat) for module in ("session", "examine")]
    with seats[0], seats[1], patch.object(gang, "close", lambda: None):
        yield
    gang.notice = notice


def run_there(environment: Mapping[str, str], name: str, *arguments: Any) -> Ended:
    "Run it in a process of its own."
    line = [sys.executable, "-m", f"orchestrator.{name}", *map(str, arguments)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    return Ended(done.returncode, done.stdout, done.stderr)


def sentence(ended: Ended, *parts: str, code: int = 2) -> str:
    "What is said of a refusal: one line without a traceback, without anything that could drive a terminal, not long."
    *before, last = ended.err.splitlines()  # predict first names the run, there too
    assert ended.code == code, ended
    assert last.startswith("error: ") and len(before) < 2, ended.err
    assert ended.err.replace("\n", "").isprintable() and len(last) < 2000, last[:3000]
    for part in parts:
        assert part in last, f"{part!r} is not in {last!r}"
    return last


@contextmanager
def ray_head(**settings: str) -> Iterator[tuple[str, dict[str, str]]]:
    "A Ray cluster of somebody else with 2 CPUs, with these settings: its address, and the environment that it has."
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", **settings}
    with tempfile.TemporaryDirectory(prefix="h", dir="/tmp") as place:
        ray = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), "start", "--head", "--port=0", "--include-dashboard=false",
             "--num-cpus=2", f"--temp-dir={place}", "--object-store-memory=80000000", "--block"],
            env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        found, deadline = Path(place, "ray_current_cluster"), time.monotonic() + 60
        try:
            while not (found.exists() and found.read_text()):
                assert ray.poll() is None and time.monotonic() < deadline, "ray start came to nothing"
                time.sleep(0.05)
            yield found.read_text().strip(), env
        finally:
            ray.terminate()
            ray.wait(30)
