"How a command ends: the exit code of each kind of error, and signals sent to real runs with real workers."

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from learner.errors import UsageError, UserError
from orchestrator.command import command

Start = Callable[[str], tuple[subprocess.Popen[str], list[str]]]
NO_SPACE = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, ""),
        (UserError("the file x is empty"), 1, "error: the file x is empty\n"),
        (UsageError("--x 3 is not possible"), 2, "error: --x 3 is not possible\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted: workers are stopped, "),
        (FileNotFoundError(2, "No such file", "/a/b"), 1, "error: No such file: /a/b; "),
        (
            MemoryError("Unable to allocate 9 GiB"),
            1,
            "error: there is not enough memory: Unable to allocate 9 GiB; lower",
        ),
        (NO_SPACE, 1, "error: No space left on device; make room, or name another disk with --runs DIR; "),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_exit_codes(error, code: int, said: str, debug: bool, capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: Any) -> None:
        if error is not None:
            raise error

    assert command("launch", run, ["--debug"] if debug else []) == code
    err = capsys.readouterr().err
    assert err.endswith("\n") or not error
    assert said in err
    assert ("Traceback" in err) == (debug and isinstance(error, Exception))
    assert debug or err.startswith(said)


def test_a_bug_is_not_dressed_up() -> None:
    def run(config: Any) -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        command("launch", run, [])


@pytest.fixture
def training(user_environment: dict[str, str], small: list[str]) -> Iterator[Start]:
    "Start a long run of two workers in a process group of its own; it and its lines, up to one that begins as asked."
    started = []

    def start(until: str) -> tuple[subprocess.Popen[str], list[str]]:
        line = [sys.executable, "-u", "-m", "orchestrator.launch", *small, "--epochs", "100000", "--cpus", "2"]
        driver = subprocess.Popen(line, env=user_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  text=True, start_new_session=True)  # fmt: skip
        started.append(driver)
        assert driver.stdout is not None
        lines = [next(driver.stdout)]
        while not lines[-1].startswith(until):
            lines.append(next(driver.stdout))
        return driver, lines

    yield start
    for driver in started:
        driver.kill()
        driver.communicate()


def gone(pids: list[int], seconds: float) -> list[int]:
    "Wait until these processes have ended; those that have not."
    deadline = time.monotonic() + seconds
    while True:
        left = []
        for pid in pids:
            try:
                left += [pid] if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z" else []
            except OSError:
                continue
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "whole_group", "code"),
    [(signal.SIGINT, True, 130), pytest.param(signal.SIGTERM, False, 143, marks=pytest.mark.slow)],
)
def test_a_signal_ends_the_run_and_its_workers(
    training: Start,
    descendants: Callable[[int], dict[int, str]],
    tmp_path: Path,
    number: signal.Signals,
    whole_group: bool,
    code: int,
) -> None:
    driver, lines = training("2 ")  # the third epoch's row
    below = descendants(driver.pid)
    workers = [pid for pid, line in below.items() if line.startswith("ray::WorkerProcess")]
    assert len(workers) == 2
    (os.killpg if whole_group else os.kill)(driver.pid, number)
    assert gone(workers, 5) == [], "within 5 seconds"
    out, err = driver.communicate(timeout=20)
    assert driver.returncode == code, err
    assert "Traceback" not in out + err and "SIGTERM" not in err, err
    assert gone(list(below), 5) == [], "and all of Ray with them"
    rows = [line for line in [*lines, *out.splitlines()] if line[:1].isdigit()]
    history = next((tmp_path / "runs").rglob("history.csv")).read_text().splitlines()
    assert len(history) == 1 + len(rows) >= 4, "the history is kept"


def test_ctrl_c_while_ray_starts(training: Start, descendants: Callable[[int], dict[int, str]]) -> None:
    driver, _ = training("starting 2 CPU workers")
    deadline = time.monotonic() + 20
    while not any("gcs_server" in line for line in descendants(driver.pid).values()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    below = list(descendants(driver.pid))
    os.killpg(driver.pid, signal.SIGINT)
    out, err = driver.communicate(timeout=20)
    assert driver.returncode == 130, err
    assert "interrupted" in err
    assert "Traceback" not in out + err
    assert gone(below, 5) == []
