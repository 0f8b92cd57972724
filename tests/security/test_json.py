"Hostile JSON in every file of a run that the programs read: huge, deep, of wrong types, or true in form but a lie."

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

from cluster import checkpoint as checkpoints
from cluster.checkpoint import Checkpoint, Checkpoints
from learner.errors import UsageError, UserError
from learner.memory import memory_size
from learner.reading import parse_object
from orchestrator.driver import Plan
from orchestrator.resume import standing_of
from orchestrator.run_folder import HISTORY

DEEP = b"[" * 200_000
HOSTILE = {
    "empty": b"",
    "cut": b'{"arch": "simple',
    "list": b"[1]",
    "null": b"null",
    "number": b"1e400",
    "deep": DEEP,
    "deep objects": b'{"a":' * 100_000,
    "digits": b'{"size": ' + b"9" * 5000 + b"}",
    "no text": b"\xff\xfe\xfd",
    "nul": b'{"a": 1}\0',
    "control": b'{"\x1b]0;owned\x07": 1',
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("file", ["model.json", "config.json"])
def test_what_is_no_object_is_refused(spoilt: Path, refused, arguments, kind: str, file: str) -> None:
    (spoilt / file).write_bytes(HOSTILE[kind])
    refused("evaluate", spoilt, "--local", parts=(str(spoilt / file),))
    if file == "config.json":
        refused("launch", *arguments, "--resume", spoilt, parts=(str(spoilt / file),))


@pytest.mark.parametrize("file", ["model.json", "config.json"])
def test_what_is_huge_or_endless_is_not_read(spoilt: Path, refused, arguments, file: str) -> None:
    place = spoilt / file
    with open(place, "wb") as sparse:
        sparse.truncate(2**42)
    said = refused("launch", *arguments, "--resume" if file == "config.json" else "--init", spoilt, parts=(str(place),))
    assert "4,398,046,511,104 bytes" in said
    place.unlink()
    place.symlink_to("/dev/zero")
    option = "--resume" if file == "config.json" else "--init"
    refused("launch", *arguments, option, spoilt)
    place.unlink()
    os.mkfifo(place)
    refused("launch", *arguments, option, spoilt)


@given(
    content=st.binary() | st.recursive(st.none() | st.floats() | st.text(), st.lists).map(json.dumps).map(str.encode)
)
def test_any_bytes_are_an_object_or_a_value_error(content: bytes) -> None:
    with suppress(ValueError):
        assert isinstance(parse_object(content), dict)


@pytest.mark.parametrize(
    ("name", "value"),
    [("arch", "simple_cnn_bn\x1b[2J"), ("arch", ["simple_cnn_bn"]), ("classes", ["\x1b]0;x\x07", "b", "c", "d"]),
     ("classes", ["a\u202eb", "b", "c", "d"]), ("size", 1e400), ("size", -(10**30)), ("normalize", {"mean": [[]] * 3})],
)  # fmt: skip
def test_wrong_entries_of_a_model_are_named(spoilt: Path, refused, pictures: Path, name: str, value: Any) -> None:
    about = json.loads((spoilt / "model.json").read_text()) | {name: value}
    (spoilt / "model.json").write_text(json.dumps(about))
    refused("predict", spoilt, pictures, parts=(str(spoilt / "model.json"),))


@pytest.mark.parametrize("name", ["data", "epochs", "label_regex", "arch"])
@pytest.mark.parametrize("value", [3.5, None, [1], {"a": {}}, "\x1b[31m", float("nan"), 10**400, "x" * 100_000])
def test_wrong_entries_of_a_configuration_are_named(spoilt: Path, refused, arguments, name: str, value: Any) -> None:
    if name == "label_regex" and value is None:
        return
    about = json.loads((spoilt / "config.json").read_text()) | {name: value}
    (spoilt / "config.json").write_text(json.dumps(about))
    said = refused("launch", *arguments, "--resume", spoilt, parts=(str(spoilt),))
    assert len(said) < 800


# a checkpoint whose digest is right, since an attacker can compute one as well

PLAN = Plan(n_train=53, n_valid=29, batch_size=8, epochs=3, schedule="one_cycle", lr=0.1)
ROW = dict.fromkeys(HISTORY, 0.5)
META = {"epoch": 1, "batch": 2, "tally": None, "rows": [ROW], "lr": 0.1, "step": 9}


def test_the_place_of_an_honest_checkpoint_is_taken() -> None:
    standing = standing_of(Checkpoint(9, {}, META, Path("x")), PLAN)
    assert (standing.place.epoch, standing.place.batch, standing.lr) == (1, 2, 0.1)


LIES: list[dict[str, Any]] = [
    {"epoch": 2}, {"epoch": -1}, {"epoch": 10**30}, {"epoch": float("inf")}, {"epoch": float("nan")}, {"epoch": "x"},
    {"batch": -5}, {"batch": 8}, {"batch": None}, {"lr": 0}, {"lr": float("inf")}, {"lr": float("nan")}, {"lr": None},
    {"rows": []}, {"rows": [ROW] * 2}, {"rows": [{}]}, {"rows": [{**ROW, "accuracy": "=1"}]}, {"rows": 3},
    {"tally": 3}, {"tally": {"sums": {"loss": [1]}}},
]  # fmt: skip


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_a_checkpoint_that_lies_about_its_place_is_refused(lie: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"checkpoint a/b does not say where the run stood .*; remove it") as caught:
        standing_of(Checkpoint(9, {}, {**META, **lie}, Path("a/b")), PLAN)
    assert len(str(caught.value)) < 600


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(name=st.sampled_from(sorted(META)), value=ANYTHING, tally=ANYTHING)
@settings(max_examples=200)
def test_whatever_a_checkpoint_says_is_a_place_or_a_refusal(name: str, value: Any, tally: Any) -> None:
    for meta in ({**META, name: value}, {**META, "tally": {"sums": {}, "bad_images": [], "samples": {}, name: tally}}):
        with suppress(UsageError):
            standing_of(Checkpoint(9, {}, meta, Path("x")), PLAN)


Sign = Callable[..., Path]


@pytest.fixture
def sign(tmp_path: Path) -> Sign:
    "Write a checkpoint of step 5 with this content and the digest that fits it."

    def write(state: bytes, meta: dict[str, Any] | None = None) -> Path:
        folder = tmp_path / "signed" / "step_5"
        folder.mkdir(parents=True, exist_ok=True)
        about = {**(meta or {}), "step": 5}
        digest = hashlib.sha256(state + json.dumps(about, sort_keys=True).encode()).hexdigest()
        (folder / "state.safetensors").write_bytes(state)
        (folder / "meta.json").write_text(json.dumps({**about, "sha256": digest}))
        return folder

    return write


def tensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    "A safetensors file that says this of itself."
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(dtype: str, shape: list[int], offsets: list[int], data: bytes = b"\0\0") -> bytes:
    return tensors({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, data)


LYING = {
    "empty": b"",
    "short": b"\1\0\0",
    "endless header": tensors(b"{}", length=2**62),
    "header beyond the file": tensors(b"{}", length=50_000),
    "deep header": tensors(DEEP),
    "header is a list": tensors([]),
    "unknown type": one("ZZ", [1], [0, 2]),
    "type of another library": one("BF16", [1], [0, 2]),
    "float8": one("F8_E4M3", [2], [0, 2]),
    "hole": one("U8", [1], [1, 2]),
    "beyond the end": one("U8", [9], [0, 9]),
    "backwards": one("U8", [1], [2, 1]),
    "overflow": one("U8", [2**62, 4], [0, 2]),
    "negative": one("U8", [-1], [0, 2]),
    "dimensions": one("U8", [1] * 100, [0, 1], b"\0"),
    "more data": one("U8", [1], [0, 1]),
    "not its shape": one("F32", [7], [0, 2]),
}


@pytest.mark.parametrize("kind", LYING)
def test_tensors_that_lie_are_refused(spoilt: Path, refused, pictures: Path, sign: Sign, kind: str) -> None:
    folder = sign(LYING[kind])
    with pytest.raises(UserError, match=r"step_5 can't be used: ") as caught:
        Checkpoints(folder.parent).load(5)
    assert len(str(caught.value)) < 500
    (spoilt / "model.safetensors").write_bytes(LYING[kind])
    refused("predict", spoilt, pictures, parts=(str(spoilt / "model.safetensors"),))


def test_a_checkpoint_larger_than_memory_is_not_read(sign: Sign, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sign(save({"a": np.zeros(10)}))
    assert Checkpoints(folder.parent).load(5).tensors["a"].tolist() == [0] * 10
    with open(folder / "state.safetensors", "wb") as sparse:
        sparse.truncate(memory_size())
    with pytest.raises(UserError, match=r"bytes, and .* are the most"):
        Checkpoints(folder.parent).load(5)
    monkeypatch.setattr(checkpoints, "META_LIMIT", 10)
    with pytest.raises(UserError, match="bytes, and 10 are the most"):
        Checkpoints(folder.parent).load(5)


@pytest.mark.parametrize("name", ["step_²", "step_٣", "step_-1", "step_07", "step_1e3", "step_" + "9" * 200, "step_"])
def test_folders_that_only_look_like_checkpoints_are_none(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert Checkpoints(tmp_path).newest() == (None, [])


def spoil_names(state: dict[str, np.ndarray]) -> None:
    state["0/\x1b[31mx"] = np.zeros(1)


def spoil_number(state: dict[str, np.ndarray]) -> None:
    state["²/x"] = np.zeros(1)


def spoil_shape(state: dict[str, np.ndarray]) -> None:
    name = next(name for name in state if name.startswith("0/"))
    state[name] = np.zeros((7, 7, 7), np.float32)


def spoil_type(state: dict[str, np.ndarray]) -> None:
    name = next(name for name in state if name.startswith("0/"))
    state[name] = state[name].astype(np.int64)


def spoil_optimizer(state: dict[str, np.ndarray]) -> None:
    name = next(name for name in state if name.startswith("1/"))
    state[name] = state[name].astype(np.int8)


def spoil_callback(state: dict[str, np.ndarray]) -> None:
    state["2/x"] = np.zeros(3)


def lose_half(state: dict[str, np.ndarray]) -> None:
    for name in list(state)[::2]:
        del state[name]


@pytest.mark.parametrize(
    "spoil", [spoil_names, spoil_number, spoil_shape, spoil_type, spoil_optimizer, spoil_callback, lose_half]
)
def test_a_checkpoint_of_another_model_is_refused(
    spoilt: Path, command, arguments, spoil: Callable[[dict[str, np.ndarray]], None]
) -> None:
    (folder,) = (spoilt / "checkpoints").iterdir()
    state, meta = load_file(folder / "state.safetensors"), json.loads((folder / "meta.json").read_text())
    del meta["sha256"]
    spoil(state)
    save_file(state, folder / "state.safetensors")
    content = (folder / "state.safetensors").read_bytes()
    meta["sha256"] = hashlib.sha256(content + json.dumps(meta, sort_keys=True).encode()).hexdigest()
    (folder / "meta.json").write_text(json.dumps(meta))
    ended = command("launch", *arguments, "--resume", spoilt)
    assert ended.code == 2, ended
    assert len(ended.err.splitlines()) == 1 and str(folder) in ended.err
    assert ended.err.strip().isprintable()
