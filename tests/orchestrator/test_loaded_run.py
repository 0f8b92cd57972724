"LoadedRun: a run's directory is found and read, and whatever can be wrong with its files is said in one sentence."

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from learner.errors import UsageError
from learner.models import build
from learner.module import Buffer, Module
from orchestrator.loaded_run import JSON_LIMIT, LoadedRun, find_model


def refused(run: Path, file: str = "model.json") -> str:
    "What is said of the run as it is now: one line that names the file."
    with pytest.raises(UsageError) as caught:
        LoadedRun.open(str(run)).model()
    message = str(caught.value)
    assert str(run / file) in message
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    return message


@pytest.fixture
def change(run_copy: Path) -> Callable[..., Path]:
    "Write other entries into model.json; an entry that is None is taken out."

    def edit(**entries: Any) -> Path:
        about = json.loads((run_copy / "model.json").read_text()) | entries
        kept = {name: value for name, value in about.items() if value is not None}
        (run_copy / "model.json").write_text(json.dumps(kept))
        return run_copy

    return edit


def test_a_run_is_read_back_as_it_was_written(trained) -> None:
    run, about = LoadedRun.open(str(trained)), json.loads((trained / "model.json").read_text())
    assert (run.arch, list(run.classes), run.size) == (about["arch"], about["classes"], about["size"])
    assert list(run.normalize.mean) == about["normalize"]["mean"]
    state, saved = run.model().state_dict(), load_file(trained / "model.safetensors")
    assert state.keys() == saved.keys()
    assert all(np.array_equal(state[name].numpy(), saved[name]) for name in saved)
    assert not run.model().training


def test_the_newest_version_with_a_model_is_meant_by_the_folder_above(run_copy) -> None:
    parent = run_copy.parent / "runs"
    for number in (2, 9, 10, 11):
        (parent / f"version_{number}").mkdir(parents=True)
    for number in (2, 9, 10):
        (parent / f"version_{number}" / "model.json").write_bytes((run_copy / "model.json").read_bytes())
    assert find_model(str(parent)).name == "version_10"
    assert find_model(str(parent / "version_2")).name == "version_2"
    with pytest.raises(UsageError, match=r"version_11 has no model.json|version_11 is no run directory"):
        find_model(str(parent / "version_11"))


@pytest.mark.parametrize("place", ["missing", "empty", "file", "nul\0"])
def test_what_is_no_run_is_refused(place, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=place.rstrip("\0")):
        find_model(str(tmp_path / place))


def test_entries_that_older_runs_lack_have_defaults(change) -> None:
    run = LoadedRun.open(str(change(channels=None, valid_crop=None)))
    assert (run.channels, run.valid_crop) == (3, 0)


@pytest.mark.parametrize("name", ["arch", "classes", "size", "presize", "normalize"])
def test_a_missing_entry_is_named(change, name) -> None:
    assert repr(name) in refused(change(**{name: None}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("arch", 3),
        ("arch", "simple_cn"),
        ("classes", []),
        ("classes", "abcd"),
        ("classes", ["a", 2, "c", "d"]),
        ("classes", ["a", "a", "c", "d"]),
        ("classes", ["a" * 50_000] * 2),
        ("channels", 2),
        ("channels", True),
        ("size", 0),
        ("size", 24.0),
        ("size", 10**9),
        ("size", 10**400),
        ("presize", 12),
        ("presize", "27"),
        ("valid_crop", -0.1),
        ("valid_crop", float("nan")),
        ("normalize", []),
        ("normalize", {"mean": [0.5] * 3}),
        ("normalize", {"mean": [0.5] * 3, "std": [0.2] * 2}),
        ("normalize", {"mean": [0.5] * 3, "std": [0.2, 0.2, 0.0]}),
        ("normalize", {"mean": [0.5] * 3, "std": [0.2, 0.2, float("inf")]}),
        ("normalize", {"mean": [0.5, 0.5, 10**400], "std": [0.2] * 3}),
        ("normalize", {"mean": [0.5, 0.5, "x"], "std": [0.2] * 3}),
    ],
)
def test_an_entry_that_breaks_its_rule_is_named(change, name, value) -> None:
    assert name in refused(change(**{name: value})).replace("model 'simple_cn'", "arch")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"null", b"\xff\xfe{}", b"[" * 200_000, b'{"a":' * 100_000, b" " * (JSON_LIMIT + 1),
     b'{"size": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "list", "null", "bytes", "deep", "deeper", "huge", "digits"],
)  # fmt: skip
def test_a_file_that_is_no_json_object_is_refused(run_copy, content) -> None:
    (run_copy / "model.json").write_bytes(content)
    assert "another run" in refused(run_copy)


def test_weights_that_do_not_fit_are_refused_before_memory_is_taken_for_the_model(change) -> None:
    message = refused(change(classes=[f"class {number}" for number in range(500_000)]), "model.safetensors")
    assert "shape" in message
    assert "simple_cnn_bn" in message
    assert "missing" in refused(change(classes=list("abcd"), arch="resnet50"), "model.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_weights_that_were_cut_off_are_refused(run_copy, keep) -> None:
    file = run_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "can't be read" in refused(run_copy, "model.safetensors")


def test_a_model_may_count_in_whole_numbers(run_copy, monkeypatch) -> None:
    def counting(*args: Any) -> Module:
        model = build(*args)
        model.seen = Buffer(torch.zeros((), dtype=torch.int64))
        return model

    file = run_copy / "model.safetensors"
    save_file({**load_file(file), "seen": np.array(2**40 + 1)}, file)
    assert "unexpected: seen" in refused(run_copy, "model.safetensors")
    monkeypatch.setattr("orchestrator.loaded_run.build", counting)
    run = LoadedRun.open(str(run_copy))
    assert run.model().state_dict()["seen"] == run.arrays()["seen"] == 2**40 + 1
    save_file({**load_file(file), "seen": np.array(0.5)}, file)
    assert "seen is of torch.float64, the model's of torch.int64" in refused(run_copy, "model.safetensors")


def test_weights_that_are_missing_or_of_another_kind_are_refused(run_copy) -> None:
    file = run_copy / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "5.bias": tensors["5.bias"].astype(np.int64)}, file)
    assert "5.bias" in refused(run_copy, "model.safetensors")
    file.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    refused(run_copy, "model.safetensors")
    file.write_bytes(b"\x80\x04\x95pickled things are not read")
    refused(run_copy, "model.safetensors")
    file.unlink()
    assert "No such file" in refused(run_copy, "model.safetensors")
