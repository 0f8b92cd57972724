"Each example, run in this process on little data: what its docstring claims comes true, and it says what is not real."

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from learner.data import shapes

PARTS = ("imagenet", "breeds")
EXAMPLES = Path(__file__).parents[2] / "examples"
SCALING = "import scaling; print(scaling.main(cpus=2, n=100, epochs=2)['--cpus 2'])"


@pytest.fixture(autouse=True)
def undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    "Examples write pictures where they are, and a LocalGang changes the environment and torch's threads."
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    with patch.dict(os.environ, HOME=str(tmp_path)):
        yield
    torch.set_num_threads(threads)


def example(name: str) -> Any:
    "The example as a module."
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_png(file: Path) -> bool:
    return file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_examples_are_short_explained_and_in_the_readme(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) < 120
    assert text.startswith('"""')
    assert f"examples/{file.name}" in (EXAMPLES.parent / "README.md").read_text()


def test_digits_reach_what_the_chapter_prints(capsys: pytest.CaptureFixture[str]) -> None:
    reached = example("digits").main()
    assert reached["pixel similarity"] >= 0.95
    assert reached["linear model"] >= 0.97
    assert reached["simple_net"] >= 0.98
    assert reached["pixel similarity"] < min(reached["linear model"], reached["simple_net"])
    assert "This is NOT MNIST" in capsys.readouterr().out


def test_digits_take_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = example("digits")
    digits.generate(tmp_path / "mine", n_train=40, n_valid=20)
    assert len(list((tmp_path / "mine/valid/7").glob("*.png"))) == 10
    assert digits.main(str(tmp_path / "mine"), epochs=1).keys() == {"pixel similarity", "linear model", "simple_net"}
    assert "NOT MNIST" not in capsys.readouterr().out


def test_the_learner_learns(capsys: pytest.CaptureFixture[str]) -> None:
    row = example("learner_from_scratch").main(n_train=1000, n_valid=200, size=32, epochs=8)
    assert row["accuracy"] > 0.5, "far above the tenth that chance gives"
    assert row["train_loss"] < row["valid_loss"] < 2
    out = capsys.readouterr().out
    assert "98,970 parameters" in out
    assert "LR finder: " in out


def test_pets_are_told_apart_by_transfer_learning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = example("pets").main(n=800, size=32, epochs=4)
    assert accuracy > 0.5, "far above the fifth that chance gives"
    assert is_png(tmp_path / "pets.png")
    out = capsys.readouterr().out
    assert "These are NOT pets" in out
    assert "was taken for" in out


def test_pets_get_a_new_head_and_two_disjoint_sets(tmp_path: Path) -> None:
    pets = example("pets")
    model = pets.simple_cnn_bn(n_out=5)
    body = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("5.")}
    pets.replace_head(model, n_out=3)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert [name for name, _ in model.named_parameters()][-2:] == ["5.weight", "5.bias"]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in body.items() if "running" not in name)
    pets.pets_like(tmp_path, n=20)
    known, new = ({file.name.rpartition("_")[0] for file in (tmp_path / part).iterdir()} for part in PARTS)
    assert known | new == set(shapes.CLASSES)
    assert not known & new


def test_an_own_optimizer_equals_the_named_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reached = example("optimizers_and_data").main(n=400, size=32, epochs=3)
    assert reached.pop("difference") < 1e-6
    assert max(reached.values()) > 0.65
    assert reached["our RMSProp"] == reached["RMSProp"]
    assert is_png(tmp_path / "batch.png")
    assert "'momentum' is unknown" in capsys.readouterr().out


def test_augmentation_shows_what_it_claims(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = example("augmentation").main(n=16, side=80, size=64)
    once, thrice = found["turned by 30 degrees"], found["by 10 degrees, three times"]
    assert found["sharpness as it is"] > once > 1.1 * thrice
    assert found["difference of a half"] == 0
    assert found.keys() >= {"seconds, one by one", "seconds, as one batch"}
    assert is_png(tmp_path / "augmented.png") and "look at augmented.png" in capsys.readouterr().out


def test_the_gang_does_what_the_driver_does() -> None:
    assert example("scaling").main(n=100, epochs=2) == {"--local": pytest.approx(0, abs=1e-6)}


@pytest.mark.slow
def test_two_workers_do_what_one_does(user_environment: dict[str, str]) -> None:
    "In a process of its own, since this one may have a Ray of other tests."
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(EXAMPLES)!r}); {SCALING}"]
    done = subprocess.run(command, env=user_environment, capture_output=True, text=True, timeout=120)
    *said, apart = done.stdout.splitlines()
    assert done.returncode == 0 and float(apart) < 1e-4, done.stderr
    assert any("--cpus 2 gives the same history" in line for line in said)
