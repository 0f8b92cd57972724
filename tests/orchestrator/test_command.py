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

from cluster.watchdog import LAST_WORDS
from learner.errors import UsageError, UserError
from orchestrator.command import command

Start = Callable[..., tuple[subprocess.Popen[str], list[str]]]
STOPPING = "\nstopping between two steps (Ctrl-C again: at once) ...\n"
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
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "error: there is not enough memory: "),
        (OSError(30, "Read-only", "/a"), 1, "error: Read-only: /a; have its disk take what is written again, or name"),
        (OSError(27, "File too large", "/a"), 1, "error: File too large: /a; allow larger files (ulimit -f); epochs"),
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


def test_who_reads_no_further_ends_it_without_a_word() -> None:
    code = "from orchestrator.command import command; import sys\n"
    code += "sys.exit(command('predict', lambda _: [print(i) for i in range(10**5)], [], lambda *_: None))"
    start = [sys.executable, "-c", code]
    with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (141, "")


def test_a_pipe_of_its_own_that_broke_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe", "the store's")

    assert command("launch", run, []) == 1
    assert capsys.readouterr().err.startswith("error: Broken pipe: the store's")


def test_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert command("launch", lambda config: None, []) == 2
    assert capsys.readouterr().err == "error: the folder that this is called in was removed: cd to one that is there\n"


def test_a_bug_is_not_dressed_up() -> None:
    def run(config: Any) -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        command("launch", run, [])


@pytest.fixture
def training(user_environment: dict[str, str], small: list[str]) -> Iterator[Start]:
    "Start a long run of two workers in a process group of its own; it and its lines, up to one that begins as asked."
    started = []

    def start(until: str, epochs: int = 100_000) -> tuple[subprocess.Popen[str], list[str]]:
        line = [sys.executable, "-u", "-m", "orchestrator.launch", *small, "--epochs", f"{epochs}", "--cpus", "2"]
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


@pytest.mark.slow
@pytest.mark.parametrize("wait", [0.0, 0.05, 0.1, 0.15, 0.2, 0.3])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_run_that_is_done_ends(training: Start, tmp_path: Path, wait: float, number: int) -> None:
    "It comes too late: half of the end would be a mess, such as no model, or Ray's own idea of how to end a process."
    driver, _ = training("2 ", epochs=3)  # the last row
    time.sleep(wait)
    driver.send_signal(number)
    _, err = driver.communicate(timeout=30)
    assert (driver.returncode, err.replace(STOPPING, "")) == (0, "")
    assert len(list(tmp_path.rglob("model.safetensors"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("gap", [0.05, 0.15, 0.25, 0.35])
def test_three_times_ctrl_c(training: Start, gap: float) -> None:
    "At once means: once Ray is gone."
    driver, _ = training("2 ")
    for _ in range(3):
        if driver.poll() is None:
            driver.send_signal(signal.SIGINT)
        time.sleep(gap)
    _, err = driver.communicate(timeout=30)
    assert driver.returncode == 130 and "Traceback" not in err and LAST_WORDS not in err


@pytest.mark.parametrize("wait", [
    0.9, *(pytest.param(seconds, marks=pytest.mark.slow) for seconds in (0.05, 0.5, 1.2, 1.5, 2.0)),
])  # fmt: skip
def test_sigterm_while_ray_and_the_workers_start(training: Start, descendants: Any, wait: float) -> None:
    "Ray's C++ would print a stack, and end the process in its own way; or make of our exit code a 1."
    driver, _ = training("starting 2 CPU workers")
    time.sleep(wait)
    below = list(descendants(driver.pid))
    driver.send_signal(signal.SIGTERM)
    _, err = driver.communicate(timeout=30)
    assert driver.returncode == 143, err
    assert err.strip().startswith("ended from outside: workers are stopped") and len(err.strip().splitlines()) == 1
    assert gone(below, 5) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_rates_are_tested(user_environment: Any, small: Any, tmp_path: Path, number: int) -> None:
    line = [
        sys.executable,
        "-u",
        "-m",
        "orchestrator.find_lr",
        *small,
        "--cpus",
        "2",
        "--arch",
        "resnet18",
        "--size",
        "96",
    ]
    with subprocess.Popen(
        line, env=user_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as driver:
        deadline = time.monotonic() + 60
        while not list(tmp_path.rglob("lr_finder.csv")) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        driver.send_signal(number)
        _, err = driver.communicate(timeout=30)
    assert driver.returncode == 128 + number and err == "\nended from outside: workers are stopped, no rate was found\n"


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
