"Malicious pickles in the place of every file that the programs read: refused in a sentence, and never unpickled."

import json
from pathlib import Path

import pytest

from learner.errors import UserError
from learner.resnet import load_torchvision, resnet18
from tests.commands import sentence

KINDS = ["0", "2", "5", "torch.save"]
FILES = ["model.safetensors", "model.json", "config.json"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", FILES)
def test_in_a_run_that_is_evaluated(spoilt: Path, malice, refused, kind: str, file: str) -> None:
    (spoilt / file).write_bytes(malice(kind))
    refused("evaluate", spoilt, "--local", parts=(str(spoilt / file), "can't be read"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", FILES[:2])
def test_in_a_run_that_predicts_or_that_another_starts_from(
    spoilt: Path, malice, refused, arguments, pictures: Path, kind: str, file: str
) -> None:
    (spoilt / file).write_bytes(malice(kind))
    refused("predict", spoilt, pictures, parts=(str(spoilt / file), "can't be read"))
    refused("launch", *arguments, "--init", spoilt, parts=(str(spoilt / file), "can't be read"))
    refused("export", spoilt, parts=(str(spoilt / file), "can't be read"))


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_configuration_of_a_run_that_is_resumed(spoilt: Path, malice, refused, arguments, kind: str) -> None:
    (spoilt / "config.json").write_bytes(malice(kind))
    refused("launch", *arguments, "--resume", spoilt, parts=(str(spoilt / "config.json"), "can't be read"))


@pytest.mark.parametrize(("kind", "file"), [("torch.save", "state.safetensors"), ("2", "meta.json")])
def test_in_a_checkpoint(spoilt: Path, malice, command, arguments, kind: str, file: str) -> None:
    "It is passed over with a warning; and where it is the only one there is nothing to resume."
    (checkpoint,) = (spoilt / "checkpoints").iterdir()
    (checkpoint / file).write_bytes(malice(kind))
    ended = command("launch", *arguments, "--resume", spoilt)
    assert f"warning: checkpoint {checkpoint} can't be used: " in ended.out
    assert "no checkpoint of" in sentence(ended)
    assert command("launch", *arguments, "--autoresume", "--name", "spoilt").code == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["resnet18.pth", "resnet18.pt", "resnet18.safetensors"])
def test_as_weights_of_torchvision(tmp_path: Path, malice, kind: str, name: str) -> None:
    (tmp_path / name).write_bytes(malice(kind))
    with pytest.raises(UserError, match=f"{name} can't be read as safetensors.*weights_only=True"):
        load_torchvision(resnet18(), tmp_path / name)


@pytest.mark.parametrize("kind", KINDS)
def test_as_configuration_labels_split_images_and_archive(
    tmp_path: Path, malice, refused, arguments, pictures: Path, kind: str
) -> None:
    for name in ("x.toml", "x.csv", "x.txt", "x.tgz", "x.zip"):
        (tmp_path / name).write_bytes(malice(kind))
    refused("launch", *arguments, "--config", tmp_path / "x.toml", parts=("x.toml can't be read",))
    refused("launch", *arguments, "--labels-csv", tmp_path / "x.csv", parts=("x.csv",))
    refused("launch", *arguments, "--split", tmp_path / "x.txt", parts=("x.txt",))
    for name in ("x.tgz", "x.zip"):
        refused("launch", *arguments, "--data", tmp_path / name)  # what torch.save writes is a zip, without images


def test_in_the_store_of_decoded_images(malice, command, arguments, tmp_path: Path) -> None:
    "Whatever a store holds is pixels, and counts where its checksums fit."
    options = [argument for argument in arguments if argument not in ("--cache", "off")]
    assert command("launch", *options).code == 0
    (store,) = (tmp_path / "runs" / "stores").glob("[0-9a-f]*")
    for name in ("pixels", "checksums"):
        content = malice("2")
        size = (store / name).stat().st_size
        (store / name).write_bytes(content[:size].ljust(size, b"\0"))
    ended = command("launch", *options)
    assert (ended.code, ended.err) == (0, "")


def test_the_reader_of_history_is_the_checkpoint_alone(spoilt: Path, malice, command, arguments) -> None:
    "history.csv is written anew from what the checkpoint says."
    before = (spoilt / "history.csv").read_text()
    (spoilt / "history.csv").write_bytes(malice("5"))
    assert command("launch", *arguments, "--resume", spoilt).code == 0
    assert (spoilt / "history.csv").read_text() == before
    assert json.loads((spoilt / "config.json").read_text())["epochs"] == 1
