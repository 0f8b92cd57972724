"--init: a run that starts from another's weights starts where that one ended; other classes get a new head."

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from learner.models import build
from orchestrator.initial import start_from

TINY = ("--arch", "simple_cnn_bn", "--lr", "1e-12", "--local", "--name", "second")


def test_with_the_same_classes_it_starts_with_the_old_accuracy(trained, small, here, tmp_path) -> None:
    ended = here(*small, *TINY, "--seed", "7", "--augment", "--init", trained)
    assert ended.code == 0, ended.err
    assert "numbers of its simple_cnn_bn are kept\n" in ended.out
    second = tmp_path / "runs" / "second" / "version_0"
    rows = [list(csv.DictReader((run / "history.csv").read_text().splitlines()))[-1] for run in (trained, second)]
    about = [json.loads((run / "model.json").read_text()) for run in (trained, second)]
    assert about[0] == about[1]
    # one epoch moves BatchNorm's running statistics, if nothing else
    assert float(rows[1]["accuracy"]) == pytest.approx(float(rows[0]["accuracy"]), abs=0.15)
    first, after = (load_file(run / "model.safetensors") for run in (trained, second))
    for name in first:
        if "running" not in name:
            np.testing.assert_allclose(after[name], first[name], atol=1e-9)


def test_with_other_classes_the_body_is_kept_and_the_head_is_new(trained, small, here, image_folder, tmp_path) -> None:
    root = image_folder({"ant": (9, 2), "eel": (9, 2), "fox": (8, 1)})
    options = [*small, *TINY, "--init", str(trained.parent)]
    ended = here(*options, "--data", str(root))
    assert ended.code == 0, ended.err
    assert "its head (5.weight, 5.bias) is new, as the classes are: 3, there 4" in ended.out
    first = load_file(trained / "model.safetensors")
    after = load_file(tmp_path / "runs" / "second" / "version_0" / "model.safetensors")
    for name in first:
        if "running" not in name and not name.startswith("5."):
            np.testing.assert_allclose(after[name], first[name], atol=1e-9)
    assert after["5.weight"].shape == (3, 128)
    assert abs(after["5.weight"]).max() > 0.01
    assert abs(after["5.bias"]).max() < 1e-9


def test_as_many_but_other_classes_have_a_new_head_too(trained, job) -> None:
    job = replace(job, arch="simple_cnn_bn")
    started, told = start_from(str(trained), job, ("ant", "bee", "cat", "eel"))
    assert "is new" in told
    assert not {"5.weight", "5.bias"} & started.weights.keys()
    started, told = start_from(str(trained), job, ("ant", "bee", "cat", "dog"))
    assert "is new" not in told
    assert {"5.weight", "5.bias"} <= started.weights.keys()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--arch", "simple_cnn"], "pass --arch simple_cnn_bn"),
        (["--channels", "1"], "pass --channels 3"),
        (["--init", "/nowhere"], "/nowhere is no folder"),
    ],
)
def test_a_run_that_does_not_fit_is_refused_before_anything_is_written(
    trained, small, here, options, said, tmp_path
) -> None:
    ended = here(*small, *TINY, "--init", trained, *options)
    assert ended.code == 2
    assert said in ended.err
    assert not (tmp_path / "runs").exists()


def test_a_file_of_torchvisions_weights_is_where_a_resnet_starts(small, here, tmp_path) -> None:
    "Which names those are, test_resnet.py compares with a twin in torch.nn; here they reach the workers, and stay."
    torch.manual_seed(3)
    weights = {name: tensor.clone() for name, tensor in build("resnet18", 3, 1000).state_dict().items()}
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights | {"bn1.num_batches_tracked": torch.tensor(7)}, tmp_path / "resnet18.safetensors")
    options = [*small, *TINY, "--init", tmp_path / "resnet18.safetensors", "--body-lr", "0.01"]
    ended = here(*options, "--arch", "resnet18", "--size", 32)
    assert ended.code == 0, ended.err
    assert "its head (fc.weight, fc.bias) is new" in ended.out
    run = tmp_path / "runs" / "second" / "version_0"
    after, about = load_file(run / "model.safetensors"), json.loads((run / "model.json").read_text())
    for name, tensor in weights.items():
        if "running" not in name and not name.startswith("fc."):
            np.testing.assert_allclose(after[name], tensor, atol=1e-9)
    assert after["fc.weight"].shape == (4, 512)
    assert about["normalize"]["mean"] == [0.485, 0.456, 0.406]
    for arch, said in (
        ("resnet34", "does not hold the weights of resnet34"),
        ("simple_cnn", "and --arch is simple_cnn"),
    ):
        ended = here(*options, "--arch", arch)
        assert ended.code == 2 and said in ended.err
