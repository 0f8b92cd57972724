"What the tests of the orchestrator share: commands run in this process or in one of their own, as a user runs them."

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
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


@pytest.fixture(autouse=True)
def undisturbed() -> Iterator[None]:
    "A command run in this process changes the environment, torch's threads, signals and hooks; put them back."
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    with patch.dict(os.environ), patch.object(threading, "excepthook", threading.excepthook):
        yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    "Run `python -m orchestrator.launch` with these arguments in this process: `here('--epochs', 0)`."

    def run(*arguments: Any) -> Ended:
        from orchestrator.launch import main

        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def there(user_environment: dict[str, str]) -> Callable[..., Ended]:
    "Run it in a process of its own."

    def run(*arguments: Any, module: str = "orchestrator.launch") -> Ended:
        line = [sys.executable, "-m", module, *map(str, arguments)]
        done = subprocess.run(line, env=user_environment, capture_output=True, text=True, timeout=120)
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def small(pictures: Path, tmp_path: Path) -> list[str]:
    "Arguments of a run of a second or two, which leaves nothing outside of `tmp_path`."
    folders = ["--data", str(pictures), "--data-dir", str(tmp_path / "cache"), "--runs", str(tmp_path / "runs")]
    return [*folders, "--cache", "off", "--size", "24", "--batch-size", "8", "--epochs", "1"]


@pytest.fixture(scope="session")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A finished run on `pictures`, whose validation crops; tests leave it as it is, or work on a copy."
    from orchestrator.launch import main

    folder, threads = tmp_path_factory.mktemp("trained"), torch.get_num_threads()
    options = "--arch simple_cnn_bn --size 24 --batch-size 8 --epochs 2 --lr 0.02 --augment --cache off --local"
    places = ["--data", str(pictures), "--data-dir", str(folder), "--runs", str(folder), "--name", "trained"]
    handler = signal.getsignal(signal.SIGTERM)
    with patch.dict(os.environ):
        assert main([*options.split(), *places]) == 0
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)
    return folder / "trained" / "version_0"


@pytest.fixture
def run_copy(trained: Path, tmp_path: Path) -> Path:
    "A copy of `trained` to do with as one likes."
    return Path(shutil.copytree(trained, tmp_path / "copy"))
