"What a run's output goes to may fail: a closed terminal, the end of a pipe, a full disk. The run goes on."

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.launch import main
from orchestrator.terminal import enduring_output

TALK = """
import sys
from orchestrator.terminal import enduring_output

with enduring_output():
    print("begun", flush=True)
    sys.stdin.readline()
    for stream in sys.stdout, sys.stderr:
        for _ in range(5000):
            print("more than any buffer holds", file=stream)
        print("and at once", file=stream, flush=True)
sys.exit(7)
"""


def pipe() -> tuple[int, Callable[[], None]]:
    "Where to write, and how its reader goes."
    reader, writer = os.pipe()
    return writer, lambda: os.close(reader)


def terminal() -> tuple[int, Callable[[], None]]:
    reader, writer = pty.openpty()
    return writer, lambda: os.close(reader)


def full_disk() -> tuple[int, Callable[[], None]]:
    return os.open("/dev/full", os.O_WRONLY), lambda: None


@pytest.mark.parametrize("make", [pipe, terminal, full_disk])
def test_a_program_outlives_its_output(make: Callable[[], tuple[int, Callable[[], None]]]) -> None:
    "And its exit code is its own: Python's is 120 where it can't write what is left."
    output, end = make()
    with subprocess.Popen([sys.executable, "-c", TALK], stdin=subprocess.PIPE, stdout=output, stderr=output) as talking:
        os.close(output)
        end()
        talking.communicate(b"\n", timeout=60)
    assert talking.returncode == 7


def test_what_can_be_written_is(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with enduring_output():
        print("rows")
        print("errors", file=sys.stderr)
        assert not sys.stdout.isatty()
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("rows\n", "errors\n")


def test_what_can_not_be_printed_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    "Once, where it can be seen."
    with open("/dev/full", "w") as full, pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "stdout", full)
        with enduring_output():
            for _ in range(3):
                print("row", flush=True)
    assert capsys.readouterr().err.count("warning: what is printed can't be written: No space left on device; ") == 1


def test_a_run_outlives_its_output(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Begun without errors' stream, onto a disk that is full."
    with open("/dev/full", "w") as full, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", full)
        patched.setattr(sys, "stderr", None)
        assert main([*small, "--local"]) == 0
    assert len(list((tmp_path / "runs").rglob("model.safetensors"))) == 1
