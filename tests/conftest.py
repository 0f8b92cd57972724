"What the tests of all packages share: one thread for torch, short hypothesis runs, a folder of small pictures."

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

# or a thread that waits for another holds the processor that this one needs: 5 s for a run of 0.2, on a busy machine
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

# compiled code is kept, as a user's Python does: else each process that tests start compiles all of ours, for 0.25 s
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# under nohup, what tests start would never hear a SIGHUP, and be waited for without an end; a handler is not inherited
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)
settings.register_profile("short", deadline=None, max_examples=25)
settings.load_profile("short")
torch.set_num_threads(1)

MakeFolder = Callable[..., Path]


@pytest.fixture
def image_folder(tmp_path: Path) -> MakeFolder:
    """A factory of folders: `image_folder({"cat": (6, 2), "dog": (5, 3)}, sizes=(16, 40))`.

    Gives root/train/CLASS/N.jpg and root/valid/CLASS/N.jpg, as many of each class as the two numbers say, with sides
    between `sizes`. Each class has a colour of its own under noise, so that a model can learn it.
    """

    def make(classes: Mapping[str, tuple[int, int]], sizes: tuple[int, int] = (16, 40), suffix: str = ".jpg") -> Path:
        rng = np.random.default_rng(7)
        for name, counts in classes.items():
            colour = rng.integers(40, 216, 3)
            for part, count in zip(("train", "valid"), counts, strict=True):
                for number in range(count):
                    picture = noisy(rng, colour, *rng.integers(*sizes, 2, endpoint=True))
                    save(picture, tmp_path / "images" / part / name / f"{number}{suffix}")
        return tmp_path / "images"

    return make


def noisy(rng: np.random.Generator, colour: np.ndarray, height: int, width: int) -> np.ndarray:
    "A picture uint8 (height, width, 3) of `colour` with noise."
    return (colour + rng.normal(0, 20, (height, width, 3))).clip(0, 255).astype(np.uint8)


def save(picture: np.ndarray, file: Path) -> None:
    "Write a picture, making its folder."
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(file)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Four classes of pictures of 20 to 60 pixels: 53 to train on and 29 to validate with, which nothing divides."
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(5)
    for name, counts in {"ant": (14, 8), "bee": (13, 7), "cat": (13, 7), "dog": (13, 7)}.items():
        colour = rng.integers(60, 196, 3)
        for part, count in zip(("train", "val"), counts):
            for number in range(count):
                save(noisy(rng, colour, *rng.integers(20, 60, 2, endpoint=True)), root / part / name / f"{number}.JPEG")
    return root


@pytest.fixture(scope="session")
def job(pictures: Path) -> Any:
    "What workers are told of `pictures`; tests replace what they are about."
    from cluster.messages import Job
    from learner.data.files import open_split
    from learner.data.normalize import Normalize

    split = open_split(pictures, seed=0)
    return Job(train=split.train, valid=split.valid, n_classes=4, arch="simple_cnn", size=24, presize=24,
               batch_size=8, seed=3, normalize=Normalize((0.5,) * 3, (0.25,) * 3), augment="none",
               sync_batchnorm=True, skip_bad_images=False)  # fmt: skip


@pytest.fixture(scope="session")
def fault_plan(tmp_path_factory: pytest.TempPathFactory) -> Any:
    "The faults that are to befall the workers of `ray_gang`: none, until a test writes some."
    from tests.chaos.injector import Plan

    return Plan(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def ray_gang(job: Any, fault_plan: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Three CPU workers and a spare, shared by all tests: `start(job, world_size)` seats some of them for another job.

    At the end, whatever befell them, no process, no shared memory and no file of theirs is left.
    """
    import cluster.crew
    import cluster.watchdog
    import tests.chaos.injector
    from cluster.faults import Tolerance
    from cluster.ray_cluster import own_ray
    from cluster.ray_gang import RayGang
    from tests.leftovers import living, shared_memory, wait_until_gone

    own_ray().cloudpickle.register_pickle_by_value(tests.chaos.injector)
    known = {"folder": fault_plan.folder, "root": Path(__file__).parents[1]}
    process = type("WorkerProcess", (tests.chaos.injector.FaultyProcess,), known)
    with patch.object(cluster.crew, "WorkerProcess", process):
        workers = cluster.crew.Workers(3, 0.0, "gloo")
        gang = RayGang(job, workers, tmp_path_factory.mktemp("logs"), Tolerance(spares=1))
        yield gang
        folder, watchdog = gang.cluster.folder, gang.cluster.watchdog.pid
        ours = {watchdog, *cluster.watchdog.members(folder)}
        segments = set().union(*map(shared_memory, ours))
        assert ours > living(location.pid for location in gang.locations).keys()  # a test may have killed some
        gang.close()
        assert wait_until_gone(lambda: living(ours | {*cluster.watchdog.members(folder)}), 60) == {}
        assert [name for name in (*segments, folder) if Path(name).exists()] == []


@pytest.fixture
def on_ray_gang(ray_gang: Any) -> Iterator[None]:
    "Commands that are run in this process have the workers of `ray_gang`, which are there already."
    from tests.commands import on_gang

    with on_gang(ray_gang):
        yield


@pytest.fixture(scope="session")
def user_environment() -> dict[str, str]:
    "The environment of a user who has no Ray running and never trained here."
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "GLOO_", "NCCL_")) and name not in ("RANK", "WORLD_SIZE")
    }


@pytest.fixture
def local_gang(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    "A factory of LocalGangs: `local_gang(job)`; afterwards the process is as it was before."
    from cluster.gang import LocalGang

    gangs, threads = [], torch.get_num_threads()

    def make(job: Any) -> LocalGang:
        gangs.append(LocalGang(job, "cpu", tmp_path))
        return gangs[-1]

    with patch.dict(os.environ):
        yield make
    for gang in gangs:
        gang.close()
    torch.set_num_threads(threads)


@pytest.fixture
def descendants() -> Callable[[int], dict[int, str]]:
    "A function of a process number: the processes below it, with their command lines."

    def look(root: int) -> dict[int, str]:
        children: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
        found, todo = [], [root]
        while todo:
            found += (below := children.get(todo.pop(), []))
            todo += below
        return {pid: _command(pid) for pid in found}

    return look


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
