"A checkpoint is whole or not there: what is damaged, cut, killed half-way or hostile is passed over, and said."

import json
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.checkpoint import Checkpoints
from learner.errors import UserError

TENSORS = {"model.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "optimizer.0.steps": np.array(7)}


def test_what_was_saved_comes_back(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.newest() == (None, [])
    checkpoints.save(12, TENSORS, {"epoch": 3, "rows": [1.5, None]})
    found, broken = checkpoints.newest()
    assert found is not None and not broken
    assert found.step == 12 and found.meta["epoch"] == 3 and found.meta["rows"] == [1.5, None]
    assert found.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(found.tensors[name], tensor)
        assert found.tensors[name].dtype == tensor.dtype


def test_the_newest_are_kept_and_one_can_be_replaced(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 9, 10, 100):
        checkpoints.save(step, TENSORS, {"epoch": step})
    assert checkpoints.steps() == [10, 100]
    checkpoints.save(100, TENSORS, {"epoch": -1})
    assert checkpoints.load(100).meta["epoch"] == -1 and checkpoints.steps() == [10, 100]


def test_where_a_run_begins_is_no_best_step(tmp_path) -> None:
    "Of which --on-nan rollback has a checkpoint, too."
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (0, 3):
        checkpoints.save(step, TENSORS, {})
        assert checkpoints.steps() == [step]


def test_the_best_is_kept_beside_the_newest(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step, best, kept in [(1, 1, [1]), (2, 1, [1, 2]), (3, 1, [1, 3]), (4, 4, [4]), (5, 4, [4, 5]), (5, 4, [4, 5])]:
        checkpoints.save(step, TENSORS, {}, best)
        assert checkpoints.steps() == kept and len(os.listdir(tmp_path)) == len(kept)


@given(part=st.sampled_from(["state.safetensors", "meta.json"]), place=st.floats(0, 1, exclude_max=True),
       flip=st.integers(1, 255))  # fmt: skip
def test_any_flipped_bit_is_seen_and_the_one_before_is_used(tmp_path_factory, part, place, flip) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, TENSORS, {"epoch": 0})
    path = checkpoints.save(2, TENSORS, {"epoch": 1}) / part
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= flip
    path.write_bytes(content)
    found, broken = checkpoints.newest()
    assert found is not None
    if found.step == 2:
        assert part == "meta.json" and found.meta == {"epoch": 1, "step": 2}, "only the spelling may have changed"
    else:
        assert found.step == 1 and len(broken) == 1 and "step_2 can't be used" in broken[0]


@pytest.mark.parametrize("harm", ["cut", "empty", "no meta", "no state", "huge json", "deep json", "list", "pickle"])
def test_damage_of_every_kind_is_one_sentence(tmp_path, harm) -> None:
    checkpoints = Checkpoints(tmp_path)
    folder = checkpoints.save(5, TENSORS, {})
    state, meta = folder / "state.safetensors", folder / "meta.json"
    if harm == "cut":
        state.write_bytes(state.read_bytes()[:-3])
    elif harm == "empty":
        meta.write_bytes(b"")
    elif harm.startswith("no"):
        (meta if harm == "no meta" else state).unlink()
    elif harm == "huge json":
        meta.write_text('{"step": 1' + "0" * 5000 + "}")
    elif harm == "deep json":
        meta.write_text("[" * 100_000)
    elif harm == "list":
        meta.write_text("[5]")
    else:
        state.write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(UserError, match=r"checkpoint .*step_5 can't be used: "):
        checkpoints.load(5)
    found, broken = checkpoints.newest()
    assert found is None and len(broken) == 1
    assert not (tmp_path / "exploited").exists()


class Exploit:
    "Leaves a file where it is unpickled."

    def __reduce__(self):
        return os.system, ("touch exploited",)


KILLED = """
import os, sys
from itertools import count
from pathlib import Path
import numpy as np
from cluster.checkpoint import Checkpoints

def save_and_die(folder, step, at):
    calls = count(1)
    def hook(event, args):
        if event in ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove") and str(folder) in str(args[0]):
            if next(calls) == at: os.kill(os.getpid(), 9)
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(1, {"w": np.zeros(3)}, {})
    sys.addaudithook(hook)
    checkpoints.save(step, {"w": np.ones(3)}, {})

for moment in range(1, 40):
    if not (child := os.fork()):
        save_and_die(Path(sys.argv[1], str(moment)), int(sys.argv[2]), moment)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(moment, code)
    if not code: break
"""


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_writer_killed_at_any_moment_leaves_a_sound_checkpoint(tmp_path, step) -> None:
    "SIGKILL at each file operation of a save in turn, until one gets through: of the next step, or of the same again."
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(step)]
    killed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    moments, codes = killed[::2], [int(code) for code in killed[1::2]]
    assert codes == [-signal.SIGKILL] * (len(codes) - 1) + [0] and len(codes) > 6
    for moment in moments:
        found, _ = Checkpoints(tmp_path / moment).newest()
        assert found is not None and found.step in (1, step)
        assert found.tensors["w"].tolist() in ([[0.0] * 3] * (found.step == 1) + [[1.0] * 3] * (found.step == step))
    assert found.tensors["w"].tolist() == [1.0] * 3
    for moment in moments:
        Checkpoints(tmp_path / moment, keep=1).save(step, {"w": np.zeros(3)}, {})
        left = [name for name in os.listdir(tmp_path / moment) if name[0] != "."]  # RunFolder.sweep removes these
        assert len(left) == 1, "what a killed writer had not removed is gone by the next time"
    assert len(os.listdir(tmp_path / moments[-1])) == 1


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, TENSORS, {})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(2, TENSORS, {})
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_1"]
    assert checkpoints.load(1).meta["step"] == 1
    with pytest.raises(UserError, match="step_2"):
        checkpoints.load(2)


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_disk_that_fails_at_any_call_leaves_a_sound_checkpoint(tmp_path, monkeypatch, call) -> None:
    "And the next one is written, once the disk is well again."
    real, calls = getattr(os, call), 0
    for failing in range(1, 10):
        checkpoints, calls = Checkpoints(tmp_path / f"{failing}", keep=1), 0
        checkpoints.save(1, TENSORS, {})

        def flaky(*args: object, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(5, "Input/output error")
            real(*args)

        with monkeypatch.context() as patched:
            patched.setattr(os, call, flaky)
            try:
                checkpoints.save(2, TENSORS, {})
            except OSError:
                assert checkpoints.newest()[0] is not None and not checkpoints.newest()[1]
            else:
                assert calls == failing - 1 > 0
                return
        checkpoints.save(3, TENSORS, {})
        assert os.listdir(checkpoints.folder) == ["step_3"]
    pytest.fail("no save got through")


@pytest.mark.parametrize("moment", ["before the rename", "after it"])
def test_a_step_that_is_written_again_is_never_gone(tmp_path, monkeypatch, moment) -> None:
    checkpoints, rename, seen = Checkpoints(tmp_path, keep=1), os.rename, []

    def fail(*args: str) -> None:
        if moment == "after it":
            rename(*args)
        seen.append(Checkpoints(tmp_path).newest()[0])
        raise OSError(5, "Input/output error")

    checkpoints.save(4, TENSORS, {"lr": 1.0})
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        checkpoints.save(4, TENSORS, {"lr": 0.5})
    monkeypatch.undo()
    found, broken = checkpoints.newest()
    assert found is not None and seen[0] is not None and not broken
    assert found.meta["lr"] == seen[0].meta["lr"] == (0.5 if moment == "after it" else 1.0)
    checkpoints.save(4, TENSORS, {"lr": 0.25})
    assert len(os.listdir(tmp_path)) == 1 and checkpoints.load(4).meta["lr"] == 0.25


def test_one_that_is_broken_never_crowds_out_a_sound_one(tmp_path) -> None:
    "The newest is broken, a run goes on from the one before, and keeps but one."
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (3, 9):
        folder = checkpoints.save(step, TENSORS, {})
    (folder / "meta.json").write_bytes(b"")
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (4, 9, 10):
        checkpoints.save(step, TENSORS, {})
        found, _ = checkpoints.newest()
        assert found is not None and found.step == step
    assert os.listdir(tmp_path) == ["step_10"]


def test_all_is_forced_to_the_disk_before_it_bears_its_name_and_so_is_the_name(tmp_path, monkeypatch) -> None:
    "What a power cut would leave can't be tried; what was asked of the disk before can."
    asked, fsync, rename = list[tuple[str, int]](), os.fsync, os.rename

    def note_sync(number: int) -> None:
        path = os.readlink(f"/proc/self/fd/{number}")
        asked.append((os.path.basename(path), os.stat(path).st_size if os.path.isfile(path) else 0))
        fsync(number)

    def note_rename(*args: str) -> None:
        asked.append(("renamed", 0))
        rename(*args)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    folder = Checkpoints(tmp_path / "all").save(3, TENSORS, {})
    sizes = {name: (folder / name).stat().st_size for name in ("state.safetensors", "meta.json")}
    aside = (f".step_3.{os.getpid()}", 0)
    assert asked == [*sizes.items(), aside, ("renamed", 0), ("all", 0)]


def test_meta_is_json_that_anyone_can_read(tmp_path) -> None:
    folder = Checkpoints(tmp_path).save(3, TENSORS, {"epoch": 1})
    assert json.loads((folder / "meta.json").read_text())["epoch"] == 1
