"Names that stand for places or reach a terminal: runs, classes, and what an error repeats."

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.errors import CONTROL, printable
from orchestrator.config import Config
from orchestrator.summary import default_name


@given(data=st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_a_run_named_after_its_data_lies_in_the_folder_of_runs(data: str) -> None:
    if any(character in data for character in "\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"):
        return
    name = default_name(Config(data=data))
    assert Path("runs", name).resolve().parent == Path("runs").resolve()
    assert name and name not in (".", "..")


@pytest.mark.parametrize(
    "name", ["..", ".", "", "/tmp/x", "a/../..", "a\0", "\x1b[2J", "a\n", "-rf", "~", "a\\b", "a b"]
)
def test_a_name_with_a_trick_is_refused(refused, arguments, name: str, tmp_path: Path) -> None:
    refused("launch", *arguments, f"--name={name}", parts=("--name",))
    assert not (tmp_path / "runs").exists()


@given(text=st.text())
def test_nothing_that_drives_a_terminal_is_left_in_an_error(text: str) -> None:

    shown = printable(text)
    assert not re.search(rf"(?!\n){CONTROL}", shown)
    assert printable(shown) == shown
    if not re.search(CONTROL, text) and len(text) < 1000:
        assert shown == text


@pytest.mark.parametrize("folder", ["\x1b[2J", "a\rb", "a\u202eb"])
def test_classes_that_could_drive_a_terminal_are_refused(
    refused, arguments, pictures: Path, tmp_path: Path, folder: str
) -> None:
    "By the name of their folder, and by a pattern that finds them in a file's name."

    copy = Path(shutil.copytree(pictures, tmp_path / "copy"))
    for part in ("train", "val"):
        (copy / part / "ant").rename(copy / part / folder)
    refused("launch", *arguments, "--data", copy, parts=("control characters",))


@pytest.mark.parametrize("version", ["version_9" * 20, "version_²", "version_-1", "version_0x1", "version_"])
def test_folders_that_only_look_like_versions_are_none(refused, arguments, tmp_path: Path, version: str) -> None:
    (tmp_path / "runs" / "x" / version).mkdir(parents=True)
    refused("launch", *arguments, "--name", "x", "--resume", "last", parts=("there is no run in",))


def test_links_in_the_place_of_a_run_lead_nowhere_new(spoilt: Path, command, arguments, tmp_path: Path) -> None:
    "A checkpoint that is a link is neither removed nor followed when old ones are."
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    (spoilt / "checkpoints" / "step_1").symlink_to(outside)
    about = json.loads((spoilt / "config.json").read_text()) | {"epochs": 2}
    (spoilt / "config.json").write_text(json.dumps(about))
    ended = command("launch", *arguments, "--resume", spoilt, "--epochs", "2", "--keep", "1")
    assert (ended.code, ended.err) == (0, "")
    assert (outside / "precious").exists()
