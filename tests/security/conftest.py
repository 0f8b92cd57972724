"What attacks share: commands run in this process or in one of their own, what a refusal looks like, a run to spoil."

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import Ended, run_here, run_there, sentence, undisturbed


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    "Leave this process as it was."
    with undisturbed():
        yield


Command = Callable[..., Ended]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    "Run `python -m orchestrator.NAME` with arguments in this process: `command('launch', '--epochs', 0)`."
    return partial(run_here, capsys)


@pytest.fixture
def there(user_environment: dict[str, str]) -> Command:
    "As `command`, in a process of its own."
    return partial(run_there, user_environment)


@pytest.fixture
def refused(command: Command) -> Callable[..., str]:
    "Run a command that must end with exit code 2 and one plain sentence, which is returned, `parts` being in it."

    def run(name: str, *arguments: Any, parts: tuple[str, ...] = ()) -> str:
        return sentence(command(name, *arguments), *parts)

    return run


@pytest.fixture(scope="session")
def finished(pictures: Path, user_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A finished run on `pictures`, in a process of its own; tests work on copies."
    folder = tmp_path_factory.mktemp("finished")
    line = [sys.executable, "-m", "orchestrator.launch", *options(pictures, folder), "--name", "finished"]
    subprocess.run(line, check=True, env=user_environment, capture_output=True, timeout=120)
    return folder / "finished" / "version_0"


def options(pictures: Path, runs: Path) -> list[str]:
    "Arguments of a run of a second, which leaves nothing outside of `runs`."
    text = "--arch simple_cnn_bn --size 24 --batch-size 8 --epochs 1 --lr 0.02 --cache off --local --momentum 0.9"
    return [*text.split(), "--data", str(pictures), "--data-dir", str(runs), "--runs", str(runs)]


@pytest.fixture
def arguments(pictures: Path, tmp_path: Path) -> list[str]:
    "See `options`: a run in `tmp_path`/runs."
    return options(pictures, tmp_path / "runs")


@pytest.fixture
def spoilt(finished: Path, tmp_path: Path) -> Path:
    "A copy of the finished run to do with as one likes."
    return Path(shutil.copytree(finished, tmp_path / "runs" / "spoilt" / "version_0"))


class Exploit:
    "Makes a folder where it is unpickled."

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def malice(tmp_path: Path) -> Iterator[Callable[[str], bytes]]:
    "Pickles by kind that make a folder where they are unpickled; checks afterwards that none was."
    exploited = tmp_path / "exploited"

    def make(kind: str) -> bytes:
        if kind == "torch.save":
            file = tmp_path / "exploit.pt"
            torch.save({"weight": Exploit(exploited)}, file)
            return file.read_bytes()
        return pickle.dumps(Exploit(exploited), protocol=int(kind))

    yield make
    assert not exploited.exists()
