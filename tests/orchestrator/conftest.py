"What the tests of the orchestrator share: commands run in this process or in one of their own, as a user runs them."

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.commands import Ended, run_here, run_there, undisturbed


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    "Leave this process as it was."
    with undisturbed():
        yield


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    "Run `python -m orchestrator.launch` with these arguments in this process: `here('--epochs', 0)`."
    return partial(run_here, capsys, "launch")


@pytest.fixture(scope="session")
def there(user_environment: dict[str, str]) -> Callable[..., Ended]:
    "Run a command in a process of its own: `there('launch', '--epochs', 0)`."
    return partial(run_there, user_environment)


@pytest.fixture
def small(pictures: Path, tmp_path: Path) -> list[str]:
    "Arguments of a run of a second or two, which leaves nothing outside of `tmp_path`."
    folders = ["--data", str(pictures), "--data-dir", str(tmp_path / "cache"), "--runs", str(tmp_path / "runs")]
    return [*folders, "--cache", "off", "--size", "24", "--batch-size", "8", "--epochs", "1"]


@pytest.fixture(scope="session")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A finished run on `pictures`, whose validation crops; tests leave it as it is, or work on a copy."
    from orchestrator.launch import main

    folder = tmp_path_factory.mktemp("trained")
    options = "--arch simple_cnn_bn --size 24 --batch-size 8 --epochs 2 --lr 0.02 --augment --cache off --local"
    places = ["--data", str(pictures), "--data-dir", str(folder), "--runs", str(folder), "--name", "trained"]
    with undisturbed():
        assert main([*options.split(), *places]) == 0
    return folder / "trained" / "version_0"


@pytest.fixture
def run_copy(trained: Path, tmp_path: Path) -> Path:
    "A copy of `trained` to do with as one likes."
    return Path(shutil.copytree(trained, tmp_path / "copy"))
