"Hostile configuration files, command lines and lists: endless, deep, binary, of wrong types; a sentence for each."

import os
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.errors import UsageError
from orchestrator.command_line import FILE_LIMIT, parse
from orchestrator.config import Config

HOSTILE = {
    "binary": bytes(range(256)),
    "nul": b'data = "a\0b"',
    "other encoding": "name = 'ü'".encode("utf-16"),
    "deep lists": b"epochs = " + b"[" * 30_000,
    "closed deep lists": b"epochs = " + b"[" * 5_000 + b"]" * 5_000,
    "deep keys": b"epochs" + b".a" * 10_000 + b" = 1",
    "deep tables": b"[epochs" + b".a" * 10_000 + b"]",
    "digits": b"epochs = " + b"9" * 10_000,
    "large": b"epochs = " + b"9" * 400,
    "twice": b"epochs = 1\nepochs = 2",
    "table": b"[epochs]\na = 1",
    "date": b"epochs = 2026-01-01",
    "long name": b"x" * 50_000 + b" = 1",
    "long value": b"schedule = '" + b"x" * 60_000 + b"'",
    "escapes in a value": b'schedule = "\\u001b[2Jx"',
    "escapes in a name": b'"\\u001b]0;owned\\u0007" = 1',
    "escapes in a table": b'[epochs."\\u001b[31m"]\na = 1',
    "nul in a folder": b'runs = "a\\u0000b"',
    "nul in the data": b'data = "a\\u0000b"',
    "nul in a list": b'split = "a\\u0000.txt"',
    "line end in a run": b'resume = "a\\nb"',
    "many": b"".join(b"k%d = 1\n" % number for number in range(5_000)),
    "infinite": b"lr = inf",
    "no number": b"lr = nan",
    "whole but no integer": b"epochs = 1.0",
    "other paths": b'name = "../../x"',
    "absolute": b'name = "/tmp/x"',
    "dots": b'name = ".."',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_one_sentence(refused, arguments, tmp_path: Path, kind: str) -> None:
    (tmp_path / "x.toml").write_bytes(HOSTILE[kind])
    names = ("--epochs", "--lr", "--runs", "--data", "--name")  # flags would win over the file
    kept = [one for pair in zip(arguments[::2], arguments[1::2]) if pair[0] not in names for one in pair]
    assert len(refused("launch", *kept, "--config", tmp_path / "x.toml")) < 600
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["endless", "huge", "folder", "missing"])
def test_a_file_without_an_end_is_not_read_to_it(refused, arguments, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "x.toml"
    if kind == "endless":
        place = Path("/dev/zero")
    elif kind == "huge":
        with open(place, "wb") as sparse:
            sparse.truncate(2**42)
    elif kind == "folder":
        place.mkdir()
    said = refused("launch", *arguments, "--config", place, parts=(f"--config {place} can't be read: ",))
    assert kind in ("folder", "missing") or f"longer than {FILE_LIMIT:,} bytes" in said


NAMES = sorted(Config.__dataclass_fields__)
TOML = st.recursive(
    st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(name=st.sampled_from(NAMES), value=TOML)
@settings(max_examples=300)
def test_any_value_is_taken_or_refused_with_its_name(name: str, value: Any) -> None:
    try:
        Config(**{name: value})
    except UsageError as error:
        assert name.replace("_", "-") in str(error).replace("_", "-") or name in ("size", "label_regex", "labels_csv")
        assert len(str(error)) < 1500


@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@settings(max_examples=200)
def test_any_bytes_are_options_or_a_refusal(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_bytes(content)
    with suppress(UsageError):
        assert parse(["--config", str(file)]) == Config(**tomllib.loads(content.decode()))


LISTS = {
    "nul": b"path,label\ntrain/ant/0.JPEG,a\0b\n",
    "huge field": b"path,label\nx," + b"y" * 200_000,
    "quote without end": b'path,label\nx,"' + b"y\n" * 100_000,
    "other encoding": "path,label\nx,ü\n".encode("utf-16"),
    "binary": bytes(range(256)) * 10,
    "escapes": b"path,label\ntrain/ant/0.JPEG,\x1b[2J\n",
    "escapes in a column": b"path,\x1b[2J,other\nx,y,z\n",
    "many columns": b"path," + b",".join(b"c%d" % number for number in range(3000)) + b"\nx,y\n",
    "paths": b"path,label\n../../etc/passwd,a\n/etc/shadow,b\n",
    "empty": b"",
    "commas": b"," * 100_000,
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_hostile_table_of_labels_is_one_sentence(refused, arguments, tmp_path: Path, kind: str) -> None:
    (tmp_path / "x.csv").write_bytes(LISTS[kind])
    said = refused("launch", *arguments, "--labels-csv", tmp_path / "x.csv")
    assert "x.csv" in said or "train/ant/0.JPEG: its label is" in said


@pytest.mark.parametrize("name", ["x.csv", "x.txt"])
@pytest.mark.parametrize("kind", ["pipe", "endless", "huge"])
def test_a_list_without_an_end_is_not_read(refused, arguments, tmp_path: Path, name: str, kind: str) -> None:
    place = tmp_path / name
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "endless":
        place.symlink_to("/dev/zero")
    else:
        with open(place, "wb") as sparse:
            sparse.truncate(2**42)
    option = "--labels-csv" if name == "x.csv" else "--split"
    refused("launch", *arguments, option, place, parts=(f"{place} can't be read: ",))


@pytest.mark.parametrize("content", [b"\0", b"\xff\xfe", b"../../etc/passwd\n", b"\x1b[2J\n", b"x" * 1_000_000])
def test_a_hostile_list_of_files_is_one_sentence(refused, arguments, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    refused("launch", *arguments, "--split", tmp_path / "x.txt", parts=("x.txt",))
