"Ctrl-C, SIGTERM and SIGHUP: the first is noted, a second Ctrl-C is at once."

import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from orchestrator.stop import Stop, signals_as_before

STUCK = """
import sys, time
import cluster.worker
from orchestrator.launch import main

def stick(*_):
    print("in the midst of a step", flush=True)
    for _ in range(3000):
        time.sleep(0.1)  # a signal that comes as a sleep begins is seen when it ends

cluster.worker.Worker._batch = stick
sys.exit(main(sys.argv[1:]))
"""


def caught(number: int) -> bool:
    "Whether this signal, which comes now, is a KeyboardInterrupt."
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt:
        return True
    return False


@pytest.mark.parametrize(
    ("signals", "last"),
    [
        ([signal.SIGINT], False),
        ([signal.SIGTERM], False),
        ([signal.SIGHUP], False),
        ([signal.SIGHUP, signal.SIGTERM], False),
        ([signal.SIGINT, signal.SIGINT], True),
        ([signal.SIGTERM, signal.SIGINT], True),
        ([signal.SIGINT, signal.SIGTERM], False),
        ([signal.SIGTERM, signal.SIGTERM], False),
    ],
)
def test_only_a_second_ctrl_c_is_at_once(signals, last, capsys: pytest.CaptureFixture[str]) -> None:
    with signals_as_before(), Stop() as stop:
        assert (stop(), stop.code) == (False, 0)
        assert [caught(number) for number in signals] == [False] * (len(signals) - 1) + [last]
        assert stop() and stop.code in [128 + number for number in signals]
    assert capsys.readouterr().err.count("stopping between two steps (Ctrl-C again: at once)") == 1


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_the_signals_are_their_owners_again() -> None:
    "Also where the body came to no end."
    before = handlers()
    with pytest.raises(ZeroDivisionError), Stop():
        assert handlers() != before
        1 / 0  # noqa: B018
    assert handlers() == before


@pytest.mark.parametrize("times", [1, 2])
def test_once_a_run_is_to_stop_it_ends_in_peace(times: int) -> None:
    "What comes while it closes is too late; and then the signals are their owners' again."
    before = handlers()
    with signals_as_before():
        with suppress(KeyboardInterrupt), Stop():
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
    assert handlers() == before


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_ends_a_run_in_the_midst_of_a_step(small: list[str], user_environment, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STUCK, *small, "--local"]
    with subprocess.Popen(
        command, env=user_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        assert any("in the midst" in line for line in run.stdout)
        run.send_signal(signal.SIGINT)
        assert any("stopping between two steps" in line for line in run.stderr)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (
        130,
        "\ninterrupted: workers are stopped, epochs that were done, if any, are in history.csv\n",
    )
