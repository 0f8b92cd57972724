"evaluate: the numbers of the run's own last validation, from its directory alone, on one worker or two."

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from orchestrator import evaluate
from tests.commands import run_here


def numbers(out: str) -> dict[str, float]:
    "The rates that were printed."
    lines = out.split("\n\n")[2].splitlines()
    return {line.rpartition(" ")[0].strip(): float(line.rpartition(" ")[2]) for line in lines}


def table(out: str) -> list[list[str]]:
    "The printed table of classes."
    return [line.split() for line in out.split("\n\n")[1].splitlines()]


def last_row(run: Path) -> dict[str, float]:
    "The last row of history.csv."
    with open(run / "history.csv", newline="") as file:
        return {name: float(value) for name, value in list(csv.DictReader(file))[-1].items()}


def test_it_equals_the_last_validation_of_the_run(trained) -> None:
    rates = evaluate.run({"run": str(trained), "local": True})
    row = last_row(trained)
    assert rates["accuracy"] == row["accuracy"]
    assert rates["loss"] == pytest.approx(row["valid_loss"], abs=1e-6)


@pytest.mark.parametrize("options", ["--augment full --ema 0.5 --size 16:24", "--channels 1 --precision bf16"])
def test_it_does_so_however_the_run_was_trained(small, here, tmp_path, options) -> None:
    assert here(*small, *options.split(), "--local", "--name", "other").code == 0
    run = tmp_path / "runs" / "other"
    rates = evaluate.run({"run": str(run), "local": True, "batch_size": 7})
    row = last_row(run / "version_0")
    assert rates["accuracy"] == row["accuracy"]
    assert rates["loss"] == pytest.approx(row["valid_loss"], abs=1e-3 if "bf16" in options else 1e-5)


def test_two_workers_count_what_one_counts(trained, on_ray_gang, capsys) -> None:
    assert evaluate.main([str(trained), "--local"]) == 0
    one = capsys.readouterr().out
    ended = run_here(capsys, "evaluate", trained, "--cpus", "2")
    assert (ended.code, ended.err) == (0, "")
    assert "2 CPU workers" in ended.out
    assert table(one) == table(ended.out)
    losses = [numbers(out).pop("loss") for out in (one, ended.out)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-6)
    assert {**numbers(one), "loss": 0} == {**numbers(ended.out), "loss": 0}
    assert [row[0] for row in table(one)] == ["class", "ant", "bee", "cat", "dog"]
    assert sum(int(row[-1]) for row in table(one)[1:]) == 29


def test_other_data_are_measured_by_their_validation_part_or_whole(trained, image_folder, capsys) -> None:
    root = image_folder({"dog": (4, 2), "ant": (3, 0)})
    rates = evaluate.run({"run": str(trained), "data": str(root), "local": True})
    assert "\n2 images, the validation part of" in capsys.readouterr().out
    assert rates["error_rate"] == 1 - rates["accuracy"]
    assert evaluate.main([str(trained), "--data", str(root / "train"), "--local"]) == 0
    assert f"\n7 images, all of {root / 'train'}" in (out := capsys.readouterr().out)
    assert [row[-1] for row in table(out)] == ["images", "3", "0", "0", "4"]
    assert evaluate.main([str(trained), "--data", str(root / "train"), "--split", "random:0.5", "--local"]) == 0
    assert "\n4 images, the validation part of" in capsys.readouterr().out


def test_a_runs_data_are_known_by_any_path_from_any_place(here, image_folder, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "link").symlink_to(image_folder({"ant": (4, 0), "dog": (4, 0)}) / "train")
    monkeypatch.chdir(tmp_path)
    options = "--size 16 --batch-size 4 --epochs 1 --cache off --local --name a --runs runs --data-dir ."
    assert here(*options.split(), "--data", "./link/").code == 0
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    for data in ([], ["--data", "../link"], ["--data", str(tmp_path / "link")]):
        assert evaluate.main(["../runs/a", "--local", *data]) == 0
        assert "\n2 images, the validation part of" in capsys.readouterr().out


def test_a_class_that_the_run_does_not_know_is_named(trained, image_folder, capsys) -> None:
    root = image_folder({"dog": (2, 1), "eel": (2, 1)})
    assert evaluate.main([str(trained), "--data", str(root), "--local"]) == 2
    assert "'eel'" in capsys.readouterr().err


def test_unreadable_images_fail_or_are_left_out_and_named(trained, image_folder, capsys) -> None:
    root = image_folder({"dog": (1, 3), "ant": (1, 2)})
    (root / "valid" / "ant" / "0.jpg").write_bytes(b"no picture")
    arguments = [str(trained), "--data", str(root), "--local"]
    assert evaluate.main(arguments) == 1
    assert "--bad-images skip" in capsys.readouterr().err
    assert evaluate.main([*arguments, "--bad-images", "skip"]) == 0
    out = capsys.readouterr().out
    assert "\n1 unreadable image was left out:" in out
    assert str(root / "valid" / "ant" / "0.jpg") in out
    assert sum(int(row[-1]) for row in table(out)[1:]) == 4


def test_what_has_no_prediction_is_wrong_and_in_no_table(run_copy, capsys) -> None:
    file = run_copy / "model.safetensors"
    save_file({name: np.full_like(array, np.nan) for name, array in load_file(file).items()}, file)
    assert evaluate.main([str(run_copy), "--local"]) == 0
    out = capsys.readouterr().out
    assert float(re.search(r"^accuracy +(\S+)$", out, re.M)[1]) == 0
    n = int(re.search(r"^(\d+) images, ", out, re.M)[1])
    assert f"\n{n} images have no prediction" in out and {int(row[-1]) for row in table(out)[1:]} == {0}


@pytest.mark.parametrize(("name", "value"), [("seed", None), ("data", 3), ("batch_size", 0), ("split", "by magic")])
def test_a_broken_configuration_is_named(run_copy, name, value, capsys) -> None:
    settings = json.loads((run_copy / "config.json").read_text()) | {name: value}
    if value is None:
        del settings[name]
    (run_copy / "config.json").write_text(json.dumps(settings))
    assert evaluate.main([str(run_copy), "--local"]) == 2
    assert str(run_copy / "config.json") in (err := capsys.readouterr().err)
    assert name.replace("_", "-") in err


def test_training_logs_are_left_alone(trained) -> None:
    before = (trained / "logs" / "rank_0.log").read_text()
    evaluate.run({"run": str(trained), "local": True})
    assert (trained / "logs" / "rank_0.log").read_text() == before


@pytest.mark.parametrize("module", ["evaluate", "predict", "interpret", "export"])
def test_help_and_mistakes_need_no_torch(module) -> None:
    lines = ["import sys", f"from orchestrator.{module} import main", "main(['--bogus'])"]
    lines += ["assert 'torch' not in sys.modules", "main(['--help'])"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "RUN" in done.stdout
    assert "error" in done.stderr
