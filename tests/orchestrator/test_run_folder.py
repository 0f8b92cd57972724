"The run directory: its number, its files, and that nobody ever reads half of one."

import csv
import errno
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from learner.errors import UsageError
from orchestrator.run_folder import HISTORY, RunFolder, write_aside

ROW = dict(zip(HISTORY, (0, 0.1 + 0.2, 1e-300, 1 / 3, 0.08333333333333334, 1234.5, 2.5), strict=True))


def test_versions_count_up(tmp_path: Path) -> None:
    parent = tmp_path / "runs" / "mine"
    for number in range(3):
        assert RunFolder.create(parent).path == parent / f"version_{number}"
    (parent / "version_1").rename(parent / "kept")
    (parent / "version_40").mkdir()
    (parent / "version_x").mkdir()
    (parent / "version_99.txt").touch()
    assert RunFolder.create(parent).path.name == "version_41", "one above the largest, gaps or not"


def test_many_at_once_get_numbers_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda _: RunFolder.create(tmp_path / "n").path, range(40)))
    assert sorted(folders) == sorted(tmp_path / "n" / f"version_{number}" for number in range(40))


def test_history_is_as_the_issue_wants_it(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "n")
    file = folder.path / "history.csv"
    assert file.read_text().strip() == "epoch,train_loss,valid_loss,accuracy,lr,images_per_second,seconds"
    folder.add_history(ROW)
    folder.add_history(ROW | {"epoch": 1})
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    for key, value in ROW.items():
        assert float(rows[0][key]) == value, "to the last bit"


@given(st.dictionaries(st.text(), st.text()))
def test_bad_images_are_read_as_they_were_written(bad: dict[str, str]) -> None:
    with TemporaryDirectory() as place:
        folder = RunFolder(Path(place))
        names = {name.replace("\0", ""): reason.replace("\0", "") for name, reason in bad.items()}
        folder.add_bad_images(list(names.items()))
        assert folder.bad_images() == names


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b'file,reason\n"', b"file,reason\na\na,b,c\n", b"file,reason\n" + b"x" * 200_000]
)
def test_a_list_of_bad_images_that_somebody_has_changed_is_no_harm(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad_images.csv").write_bytes(content)
    assert RunFolder(tmp_path).bad_images() == {}


def test_bad_images_may_have_names_of_any_bytes(tmp_path: Path) -> None:
    RunFolder(tmp_path).add_bad_images([(os.fsdecode(b"\xff.jpg"), "cut")])
    assert (tmp_path / "bad_images.csv").read_bytes() == b"file,reason\r\n\xff.jpg,cut\r\n"
    assert RunFolder(tmp_path).bad_images() == {os.fsdecode(b"\xff.jpg"): "cut"}


def test_bad_images_are_listed(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "n")
    folder.add_bad_images([("a, b.jpg", 'it is "cut"')])
    folder.add_bad_images([("a, b.jpg", 'it is "cut"'), ("c.jpg", "it is empty")])
    rows = list(csv.reader((folder.path / "bad_images.csv").read_text().splitlines()))
    assert rows == [["file", "reason"], ["a, b.jpg", 'it is "cut"'], ["c.jpg", "it is empty"]]


def test_a_model_is_tensors_and_json(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "n")
    tensors = {"0.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    folder.write_model(tensors, {"arch": "simple_cnn", "classes": ("a", "ü")})
    loaded = load_file(folder.path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    np.testing.assert_array_equal(loaded["0.weight"], tensors["0.weight"])
    assert json.loads((folder.path / "model.json").read_text()) == {"arch": "simple_cnn", "classes": ["a", "ü"]}


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    write_aside(file, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_aside(file, b"new")
    monkeypatch.undo()
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file], "nothing is left beside it"
    write_aside(file, b"new")
    assert file.read_bytes() == b"new"


def test_a_disk_that_can_only_be_read_by_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "The error names the file that was to be written, not that what was begun of it can't be removed."

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), ".aside")

    monkeypatch.setattr(os, "fsync", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(OSError, match=re.escape(f"'{tmp_path / 'file'}'")):
        write_aside(tmp_path / "file", b"new")


def test_what_the_disk_refused_is_not_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A model is written all the same, and nobody is told that the folder was removed."
    folder = RunFolder.create(tmp_path / "n")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: os.stat("/nowhere"))
        with pytest.raises(FileNotFoundError):
            folder.write_json("startup.json", {})
    assert not folder.restore()
    folder.write_json("startup.json", {})
    (folder.path / "startup.json").unlink()
    assert folder.restore()


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom orchestrator.run_folder import write_aside\n"
        "os.fsync = lambda _: os.kill(os.getpid(), 9)\nwrite_aside(Path(sys.argv[1]), b'new' * 1000)"
    )
    assert subprocess.run([sys.executable, "-c", script, file]).returncode == -9
    assert file.read_bytes() == b"old"


def test_what_a_killed_driver_left_half_written_is_swept_away(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "n")
    folder.write_json("config.json", {})
    (folder.path / ".mine").touch()
    kept = sorted(folder.path.rglob("*"))
    (folder.path / ".history.csv.12345").touch()
    (folder.path / "checkpoints" / ".step_7.123").mkdir(parents=True)
    (folder.path / "checkpoints" / ".step_7.123" / "state.safetensors").touch()
    folder.sweep()
    (folder.path / "checkpoints").rmdir()
    assert sorted(folder.path.rglob("*")) == kept


def test_one_process_at_a_time_trains_in_a_folder(tmp_path: Path) -> None:
    "A scheduler may begin a command anew while its old process still lives."
    folder = RunFolder.create(tmp_path / "run")
    folder.claim()
    claim = "import sys; from pathlib import Path; from orchestrator.run_folder import RunFolder as Folder; "
    claim += "Folder(Path(sys.argv[1])).claim()"
    other = subprocess.run([sys.executable, "-c", claim, str(folder.path)], capture_output=True, text=True)
    assert f"UsageError: {folder.path} is being trained by another process: wait for its end" in other.stderr
    folder.release()
    RunFolder(folder.path).claim()


@pytest.mark.parametrize("read_only", [False, True])
def test_what_was_reserved_and_not_needed_is_given_back(tmp_path: Path, monkeypatch, read_only: bool) -> None:
    "And the folder is released in any case: another error, such as that of the disk, may be on its way."
    folder = RunFolder.create(tmp_path / "run")
    folder.claim()
    before = sorted(folder.path.iterdir())
    folder.reserve_model({"w": np.zeros(9, np.float32)}, {"arch": "linear"})
    assert sum(path.stat().st_size for path in folder.path.glob(".model.*")) > 36
    if read_only:
        monkeypatch.setattr(Path, "unlink", lambda *_, **__: os.stat("/nowhere"))
    folder.release()
    RunFolder(folder.path).claim()
    assert (sorted(folder.path.iterdir()) == before) != read_only


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    begun, never, alone = RunFolder.create(tmp_path / "n"), RunFolder.create(tmp_path / "n"), tmp_path / "alone"
    (begun.logs / "rank_0.log").touch()
    for folder in (begun, never, RunFolder.create(alone)):
        folder.remove_unless_begun()
    assert begun.path.is_dir() and not never.path.exists() and not alone.exists()


@pytest.mark.parametrize("place", ["/proc", "/sys/kernel", "a-file"])
def test_where_nothing_can_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "a-file").touch()
    parent = tmp_path / place / "name"  # an absolute `place` stands alone
    with pytest.raises(UsageError) as caught:
        RunFolder.create(parent)
    assert f"the run directory {parent} can't be written: " in str(caught.value)
    assert "name another with --runs DIR" in str(caught.value)
    assert "\n" not in str(caught.value)
