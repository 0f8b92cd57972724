"What is saved where a run ends before its time; the gang and the driver's clock are real, the faults are made up."

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import orchestrator.fit
from cluster.checkpoint import Checkpoints
from cluster.faults import Failure, WorkersFailed
from orchestrator.config import Config
from orchestrator.driver import Place, Spoiled, Stopped
from orchestrator.fit import Best, fit
from orchestrator.resume import Saver
from orchestrator.session import open_session


def ended_by(cause: Any, salvaged: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    "The steps that are saved of a run that `cause` ends after 5 of 7 steps, and whose workers then give `salvaged`."

    def end(*_: object) -> None:
        raise Stopped(Place(0, 5), cause)

    monkeypatch.setattr(orchestrator.fit, "train", end)
    config = Config(data=str(pictures), local=True, size=16, batch_size=8, epochs=2, name="run", runs=str(tmp_path),
                    data_dir=str(tmp_path), cache="off")  # fmt: skip
    with open_session(config) as session:
        monkeypatch.setattr(session.gang, "salvage", lambda: salvaged, raising=False)
        with pytest.raises(type(cause)):
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


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    warnings: list[str] = []
    saver = Saver(Checkpoints(tmp_path), warnings.append)
    saver.save(1, {"0/weight": np.ones(2, np.float32)}, {})
    saver.save(2, {"0/weight": np.array([1, np.inf], np.float32), "1/count": np.array(3)}, {})
    assert not saver.finish()
    saver.close()
    assert saver.checkpoints.steps() == [1]
    assert warnings == ["warning: no checkpoint of step 2 is written: 0/weight is not finite; older ones are kept"]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.integers(0, 4))
def test_best_is_the_first_highest_and_patience_counts_since_then(accuracies, patience) -> None:
    best = Best(patience)
    for number, accuracy in enumerate(accuracies):
        better = best.note({"epoch": number, "accuracy": accuracy})
        first = accuracies.index(max(accuracies[: number + 1]))
        assert better == (first == number)
        assert best.row is not None and best.row["epoch"] == first
        assert best.exhausted == (patience > 0 and number - first >= patience)
