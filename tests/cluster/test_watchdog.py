"What the watchdog tells of the driver's end; that it does clean up is seen where drivers are killed in real runs."

import os
import signal
import subprocess

import pytest

from cluster import watchdog
from cluster.watchdog import LAST_WORDS, NOT_UP, PEACE, UP, watch


@pytest.mark.parametrize(("said", "told"), [(b"", NOT_UP), (UP, LAST_WORDS), (PEACE, ""), (UP + PEACE, "")])
def test_last_words(said: bytes, told: str) -> None:
    heard, says = os.pipe()
    os.write(says, said)
    os.close(says)
    assert watch(os.getpid(), heard) == told
    os.close(heard)


def test_a_driver_whose_ray_never_comes_up_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    "Ray waits for ever for a thread that the system refused it (ulimit -u)."
    monkeypatch.setattr(watchdog, "STARTING", 0.1)
    heard, says = os.pipe()
    with subprocess.Popen(["sleep", "60"], pass_fds=[says]) as driver:
        os.close(says)
        assert watch(driver.pid, heard) == NOT_UP
    assert driver.returncode == -signal.SIGKILL
    os.close(heard)
