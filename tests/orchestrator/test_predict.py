"predict: the probabilities of a plain forward pass, for people and for programs."

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from learner.models import build
from orchestrator import predict


def plain(run: Path, file: Path) -> dict[str, float]:
    "What the run's model says of an image, computed by hand."
    about = json.loads((run / "model.json").read_text())
    model = build(about["arch"], 3, len(about["classes"])).load_state_dict(load_file(run / "model.safetensors")).eval()
    with Image.open(file) as image:
        image.draft(None, (2 * about["presize"],) * 2)
        pixels = torch.from_numpy(np.array(image.convert("RGB")))
    planes = pixels.permute(2, 0, 1)[None]
    pixels = F.interpolate(planes, (about["presize"],) * 2, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    edge = (about["presize"] - about["size"]) // 2
    middle = pixels[edge : edge + about["size"], edge : edge + about["size"]] / 255
    normal = (middle - torch.tensor(about["normalize"]["mean"])) / torch.tensor(about["normalize"]["std"])
    with torch.no_grad():
        return dict(zip(about["classes"], model(normal.permute(2, 0, 1)[None]).softmax(1)[0].tolist()))


@pytest.fixture
def files(pictures) -> list[Path]:
    "Five images."
    return sorted((pictures / "val").glob("*/*"))[::6]


def test_probabilities_equal_a_plain_forward_pass(trained, files, capsys) -> None:
    assert predict.main([str(trained), *map(str, files), "--json", "--batch-size", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["file"] for one in found] == list(map(str, files))
    for one, file in zip(found, files):
        wanted = plain(trained, file)
        assert one["probabilities"] == pytest.approx(wanted, abs=1e-5)
        assert list(one["probabilities"]) == sorted(wanted, key=lambda name: -wanted[name])
        assert one["label"] == max(wanted, key=lambda name: wanted[name])
        assert one["probability"] == max(one["probabilities"].values())


def test_a_folder_stands_for_its_images_and_top_for_how_many_classes(trained, pictures, files, capsys) -> None:
    assert predict.main([str(trained), str(files[0]), str(pictures / "val" / "dog"), "--top", "2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [str(files[0]), *sorted(map(str, (pictures / "val" / "dog").iterdir()))]
    best = sorted(plain(trained, files[0]).items(), key=lambda item: -item[1])
    assert lines[0][1:] == [text for name, chance in best[:2] for text in (name, f"{chance:.4f}")]


def test_unreadable_images_are_named_once_the_others_are_done(trained, files, tmp_path, capsys) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "torn.jpg").write_bytes(files[0].read_bytes()[:200])
    bad = [str(tmp_path / name) for name in ("empty.jpg", "torn.jpg", "missing.jpg")]
    asked = [bad[0], str(files[0]), bad[1], str(files[1]), bad[2]]
    assert predict.main([str(trained), *asked]) == 1
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()] == list(map(str, files[:2]))
    assert "3 of 5 images" in said.err
    assert all(file in said.err for file in bad)
    assert predict.main([str(trained), *asked, "--json", "--batch-size", "1"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [one["file"] for one in found] == asked
    assert ["error" in one for one in found] == [True, False, True, False, True]


def test_images_may_come_between_and_after_options(trained, files, capsys) -> None:
    assert predict.main([str(trained), str(files[0]), "--json", str(files[1]), "--top=1", str(files[2])]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3


def test_a_name_of_any_bytes_can_be_printed(trained, files, tmp_path, capsys) -> None:
    odd = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    shutil.copy(os.fsencode(files[0]), odd)
    assert predict.main([str(trained), os.fsdecode(odd)]) == 0
    assert "caf\\udce9.jpg" in capsys.readouterr().out


def test_probabilities_that_are_no_numbers_are_null_in_json(run_copy, files, capsys) -> None:
    from safetensors.torch import save_file

    tensors = load_file(run_copy / "model.safetensors")
    save_file({**tensors, "5.bias": tensors["5.bias"] * float("nan")}, run_copy / "model.safetensors")
    assert predict.main([str(run_copy), str(files[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)[0]["probability"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "RUN"),
        (["RUN"], "IMAGE"),
        (["RUN", "x.jpg", "--top", "0"], "--top"),
        (["RUN", "x.jpg", "--top", "some"], "--top"),
        (["RUN", "x.jpg", "--jsn"], "did you mean --json"),
        (["/nowhere", "x.jpg"], "/nowhere is no folder"),
        (["RUN", "EMPTY"], "has no images"),
        (["RUN", "\x1b[2J.jpg"], "has control characters in its name"),
    ],
)
def test_mistakes_are_named(trained, tmp_path, arguments, said, capsys) -> None:
    places = {"RUN": str(trained), "EMPTY": str(tmp_path)}
    assert predict.main([places.get(argument, argument) for argument in arguments]) == 2
    assert said in capsys.readouterr().err
