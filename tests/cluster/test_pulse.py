"The driver's view of pulses, by a clock of the test's; and a worker whose driver is gone."

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from cluster import worker_process
from cluster.meeting import KeyStore, Meeting
from cluster.pulse import HELD_UP, PERIOD, Watch
from tests.leftovers import wait_until_gone


def watched() -> tuple[Watch, Callable[[float], None], Callable[[int], None]]:
    "A watch of one worker `a`, a function that lets time pass, and one by which the worker says something."
    store, now = KeyStore("127.0.0.1"), [0.0]
    watch = Watch(store, lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    def say(beat: int) -> None:
        store.write("pulse/a", json.dumps([beat, 1, 2, "computing"]))

    watch.expect(["a"])
    return watch, wait, say


def test_silence_is_counted_from_the_last_sign() -> None:
    watch, wait, say = watched()
    say(0)
    watch.look("a")
    for _ in range(20):
        wait(PERIOD)
        life = watch.look("a")
    assert round(life.silent, 6) == round(life.still, 6) == 20 * PERIOD
    say(1)
    life = watch.look("a")
    assert (life.silent, round(life.still, 6)) == (0.0, 20 * PERIOD), "it lives, but nothing has moved"


def test_while_the_driver_was_held_up_nobody_was_silent() -> None:
    watch, wait, say = watched()
    say(0)
    watch.look("a")
    wait(60 * HELD_UP)
    life = watch.look("a")
    assert life.silent == life.still == 0.0
    wait(PERIOD)
    assert round(watch.look("a").silent, 6) == PERIOD


def test_a_gpu_is_made_ready_before_anybody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    "No thread runs meanwhile, also not the one of the pulse."
    done: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(worker_process, "start_pulse", lambda *_: done.append("pulse"))
    worker_process.WorkerProcess("0", Meeting("127.0.0.1", 1), "nccl", True, "/nowhere")
    assert done == [torch.device("cuda", 0), "pulse"]


WORKER = """
import sys, threading
from cluster.meeting import Meeting
from cluster.pulse import Sign, start_pulse

start_pulse(Meeting("127.0.0.1", int(sys.argv[1])), "a", Sign, lambda store: None)
threading.Event().wait()
"""


def test_a_worker_whose_driver_is_gone_ends_within_ten_seconds() -> None:
    "By itself: who joined another's Ray cluster has no watchdog there, and Ray may take its time."
    driver = [KeyStore("127.0.0.1")]
    command = [sys.executable, "-c", WORKER, f"{driver[0].meeting.port}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as worker:
        assert wait_until_gone(lambda: not driver[0].read("pulse/a"), 60) is False
        driver.clear()
        try:
            assert worker.wait(10) == 1
        finally:
            worker.kill()
        assert worker.stderr is not None and "the driver's store is gone" in worker.stderr.read()
