"What is saved where a run ends before its time; the gang and the driver's clock are real, the faults are made up."

import re
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

import orchestrator.fit
import orchestrator.run_folder
from cluster.checkpoint import Checkpoints
from cluster.faults import Failure, WorkersFailed
from cluster.gang import LocalGang
from orchestrator.config import Config
from orchestrator.driver import Place, Spoiled, Stopped
from orchestrator.fit import Best, fit
from orchestrator.resume import Saver
from orchestrator.session import open_session
from orchestrator.stop import Interrupted, signals_as_before
from orchestrator.tracker import Tracker
from tests.commands import Ended, sentence
from tests.results import history


def ended_by(cause: Any, salvaged: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    "The steps that are saved of a run that `cause` ends after 5 of 7 steps, and whose workers then give `salvaged`."

    def end(*_: object) -> None:
        raise Stopped(Place(0, 5), cause)

    monkeypatch.setattr(orchestrator.fit, "train", end)
    config = Config(data=str(pictures), local=True, size=16, batch_size=8, epochs=2, name="run", runs=str(tmp_path),
                    data_dir=str(tmp_path), cache="off")  # fmt: skip
    with open_session(config) as session:
        monkeypatch.setattr(session.gang, "salvage", lambda: salvaged, raising=False)
        with pytest.raises(type(cause) if cause else Interrupted), signals_as_before():
            fit(session)
        return Checkpoints(session.folder.path / "checkpoints").steps()


def died() -> WorkersFailed:
    return WorkersFailed([Failure(0, "host", 7, "died", "gone")])


@pytest.mark.parametrize(
    ("cause", "value", "saved"),
    [(died(), 1.0, [5]), (died(), np.nan, []), (Spoiled("the loss became nan", 4), 1.0, [])],
)
def test_only_a_sound_state_is_saved(cause, value, saved, pictures, tmp_path, monkeypatch) -> None:
    "Where the driver finds a loss that is no number, the workers' weights are spoiled, and steps ahead of it."
    salvaged = {"0/weight": np.full(3, value, np.float32), "1/steps": np.array(7)}
    assert ended_by(cause, salvaged, pictures, tmp_path, monkeypatch) == saved
    assert any("saved" in note for note in getattr(cause, "__notes__", [])) == bool(saved)


def test_the_gang_is_told_of_a_stop(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "So that nobody waits for a replacement, or for one who hangs."
    heard, stopping = list[Callable[[], bool]](), list[bool]()

    def stop_the_run(gang: LocalGang, stop: Callable[[], bool]) -> None:
        heard.append(stop)
        stopping.append(stop())
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(LocalGang, "heed", stop_the_run)
    assert ended_by(None, None, pictures, tmp_path, monkeypatch) == [5]
    assert [*stopping, heard[0]()] == [False, True]


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    warnings: list[str] = []
    saver = Saver(Checkpoints(tmp_path), warnings.append)
    saver.save(1, {"0/weight": np.ones(2, np.float32)}, {})
    saver.save(2, {"0/weight": np.array([1, np.inf], np.float32), "1/count": np.array(3)}, {})
    assert not saver.finish()
    saver.close()
    assert saver.checkpoints.steps() == [1]
    assert warnings == ["warning: no checkpoint of step 2 is written: 0/weight is not finite; older ones are kept"]


@pytest.mark.parametrize("error", [MemoryError(), OSError(28, "No space left on device"), KeyError("a bug")])
def test_a_checkpoint_that_fails_is_no_end_of_those_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    write, warnings = Checkpoints.save, list[str]()
    saver, weights = Saver(Checkpoints(tmp_path), warnings.append), {"0/weight": np.ones(2, np.float32)}
    monkeypatch.setattr(Checkpoints, "save", Mock(side_effect=error))
    saver.save(1, weights, {})
    with suppress(KeyError):
        assert not saver.finish()
    assert not saver.finish()
    monkeypatch.setattr(Checkpoints, "save", write)
    saver.save(2, weights, {})
    assert saver.finish() and saver.checkpoints.steps() == [2]
    saver.close()
    told = {KeyError: [], MemoryError: ["not enough memory"], OSError: ["[Errno 28] No space left on device"]}[
        type(error)
    ]
    assert warnings == [f"warning: no checkpoint of step 1 could be written: {why}" for why in told]


def test_a_bug_in_writing_the_last_checkpoint_is_not_lost(small, here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoints, "save", Mock(side_effect=KeyError("a bug")))
    with pytest.raises(KeyError, match="a bug"):
        here(*small, "--local")


def test_a_checkpoint_is_written_while_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, disk = Checkpoints.save, threading.Event()
    monkeypatch.setattr(Checkpoints, "save", lambda *args: disk.wait(10) and write(*args))
    saver = Saver(Checkpoints(tmp_path), print)
    saver.save(1, {"0/weight": np.ones(2, np.float32)}, {})
    assert saver.checkpoints.steps() == [], "nobody waits for the disk"
    disk.set()
    assert saver.finish()
    saver.close()
    assert saver.checkpoints.steps() == [1]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(0, 4))
def test_best_is_the_first_highest_and_patience_counts_since_then(accuracies, patience) -> None:
    best = Best(patience)
    for number, accuracy in enumerate(accuracies):
        better = best.note({"epoch": number, "accuracy": accuracy})
        first = accuracies.index(max(accuracies[: number + 1]))
        assert better == (first == number)
        assert best.row is not None and best.row["epoch"] == first
        assert best.exhausted == (patience > 0 and number - first >= patience)


ACCURACIES = (0.2, 0.5, 0.4, 0.5, 0.9)  # of the second epoch is the best, until patience has run out


@pytest.fixture
def course(here: Callable[..., Ended], small: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    "Runs `launch --save-best --early-stop 2` on a disk that takes some models, then refuses so many."
    epoch, refusals = Tracker.epoch, list[bool]()
    write = orchestrator.run_folder.write_aside

    def scripted(tracker: Tracker, number: int, *args: Any) -> dict[str, Any]:
        return epoch(tracker, number, *args) | {"accuracy": ACCURACIES[number]}

    def refuse(path: Path, content: bytes) -> None:
        if path.name == "model.safetensors" and refusals and refusals.pop():
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    def run(full: int, *more: object, taken: int = 0) -> Ended:
        refusals[:] = [True] * full + [False] * taken
        options = [
            "--local",
            "--size",
            16,
            "--epochs",
            5,
            "--save-best",
            "--early-stop",
            2,
            "--keep",
            9,
            "--name",
            "run",
        ]
        return here(*small, *options, *more)

    monkeypatch.setattr(Tracker, "epoch", scripted)
    monkeypatch.setattr(orchestrator.run_folder, "write_aside", refuse)
    return run


def saved_epoch(run: Path) -> int:
    "After how many epochs the workers held the model that is saved."
    model, checkpoints = load_file(run / "model.safetensors"), Checkpoints(run / "checkpoints")
    states = {step // 7: checkpoints.load(step).tensors for step in checkpoints.steps()}
    same = (all((state[f"0/{name}"] == model[name]).all() for name in model) for state in states.values())
    return next(epochs for epochs, is_it in zip(states, same) if is_it)


@pytest.mark.parametrize("full", [0, 4])
def test_the_best_epoch_is_saved_and_patience_ends_the_run(full, course, tmp_path) -> None:
    "Also where the disk has no room for it when its turn comes, nor at the next epochs, but at the end."
    ended = course(full)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.count("warning: the model could not be written: No space left on device") == full
    assert "accuracy 0.5000 on the validation set after 2 epochs" in ended.out
    assert len(history(tmp_path / "runs" / "run" / "version_0")) == 4
    assert saved_epoch(tmp_path / "runs" / "run" / "version_0") == 2


def test_the_checkpoint_of_the_best_epoch_is_kept_beside_the_newest(course, tmp_path) -> None:
    assert course(0, "--keep", 1).code == 0
    assert Checkpoints(tmp_path / "runs" / "run" / "version_0" / "checkpoints").steps() == [14, 28]


@pytest.mark.parametrize(("taken", "kept", "saved"), [(0, True, 2), (1, True, 2), (0, False, 4)])
def test_a_disk_that_never_has_room_for_the_model(course, tmp_path, taken, kept, saved) -> None:
    """The command fails in one sentence, but behind the last checkpoint; resumed, it saves the best out of that one's.

    Also where the disk has an older best. If the checkpoint is gone, it saves what there still is.
    """
    ended = course(100, taken=taken)
    remedy = "then the same command with --resume last writes the model, and trains nothing again"
    sentence(ended, "No space left on device: ", "model.safetensors; make room", remedy, code=1)
    run = tmp_path / "runs" / "run" / "version_0"
    assert Checkpoints(run / "checkpoints").steps() == [7, 14, 21, 28]
    if not kept:
        shutil.rmtree(run / "checkpoints" / "step_14")
    ended = course(0, "--resume", "last")
    assert ended.code == 0 and f"accuracy 0.5000 on the validation set after {saved} epochs" in ended.out
    assert not [line for line in ended.out.splitlines() if re.match(r"\d ", line)]
    assert saved_epoch(run) == saved


def test_a_best_model_that_is_there_needs_no_more_room(course) -> None:
    assert course(0).code == 0
    ended = course(100, "--resume", "last")
    assert (ended.code, ended.err) == (0, "") and "after 2 epochs" in ended.out
