"`python -m orchestrator.launch` as a user runs it: in one process, on two workers, and what both leave behind."

import csv
import json
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.ray_cluster import PREFIX
from learner.data.files import open_split
from learner.data.images import decode
from learner.data.normalize import Normalize
from learner.models import build
from tests.commands import run_there
from tests.leftovers import living, wait_until_gone

OPTIONS = "--arch simple_cnn_bn --size 24 --batch_size 8 --epochs 2 --lr auto --momentum 0.9 --augment --seed 3"
TAGS = {
    *(f"train/{what}" for what in ("loss", "lr", "momentum")),
    *(f"epoch/{what}" for what in ("train_loss", "valid_loss", "accuracy", "train_accuracy")),
    *(f"speed/{what}" for what in ("images_per_second", "waiting_for_data", "waiting_for_communication")),
}


@dataclass(frozen=True)
class Run:
    "A finished run: what was printed, its directory, and when its command was given."

    out: str
    path: Path
    began: float = 0.0

    @property
    def history(self) -> list[dict[str, float]]:
        "The rows of history.csv."
        with open(self.path / "history.csv", newline="") as file:
            return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]

    def json(self, name: str) -> Any:
        "A JSON file."
        return json.loads((self.path / name).read_text())

    def events(self) -> EventAccumulator:
        "What TensorBoard reads of it."
        events = EventAccumulator(str(self.path / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
        events.Reload()
        return events


@pytest.fixture(scope="module")
def runs(user_environment: dict[str, str], pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    "The same run in one process and on two workers; neither needs a home folder, nor writes there: /proc lets nobody."
    folder, done = tmp_path_factory.mktemp("launch"), {}
    homeless = user_environment | {"HOME": "/proc", "MPLCONFIGDIR": str(folder)}
    for name, how in (("local", ["--local"]), ("two", ["--cpus", "2"])):
        began = time.time()
        places = ["--data", pictures, "--data-dir", folder, "--runs", folder, "--name", name]
        ended = run_there(homeless, "launch", *OPTIONS.split(), *how, *places)
        assert (ended.code, ended.err) == (0, "")
        done[name] = Run(ended.out, folder / name / "version_0", began)
    return done


@pytest.mark.parametrize("name", ["local", "two"])
def test_the_run_directory_has_all_files(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    for file in ("config.json", "history.csv", "model.safetensors", "model.json", "logs/rank_0.log"):
        assert (run.path / file).stat().st_size > 0, file
    assert any((run.path / "tensorboard").iterdir())
    assert (run.path / "logs" / "rank_1.log").exists() == (name == "two")
    assert not [file for file in run.path.iterdir() if file.name.startswith(".")], "nothing half-written"


@pytest.mark.parametrize("name", ["local", "two"])
def test_the_configuration_is_resolved_printed_and_saved(runs: dict[str, Run], name: str) -> None:
    run, config = runs[name], runs[name].json("config.json")
    assert (config["size"], config["batch_size"], config["lr"], config["seed"]) == (24, 8, "auto", 3)
    wanted = {"local_batch": "8" if name == "local" else "4", "classes": 4, "train_images": 53, "valid_images": 29}
    wanted |= {"steps_per_epoch": 7, "steps": 14, "run_directory": str(run.path)}
    assert config["resolved"].items() >= wanted.items()
    before = run.out[: run.out.index("train_loss")]
    names = ", ".join(json.loads((run.path / "model.json").read_text())["classes"])
    for key, value in {**wanted, "arch": "simple_cnn_bn", "batch_size": 8, "classes": f"4: {names}"}.items():
        assert re.search(rf"^{key} +{re.escape(str(value))}$", before, re.MULTILINE), f"{key}, before training"


@pytest.mark.parametrize("name", ["local", "two"])
def test_the_terminal_has_a_table_and_an_end(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    lines = run.out.splitlines()
    header = lines.index(next(line for line in lines if line.startswith("epoch ")))
    assert lines[header].split() == ["epoch", "train_loss", "valid_loss", "accuracy", "images/s", "time"]
    for line, row in zip(lines[header + 1 :], run.history):
        assert line.split()[:4] == [f"{row['epoch']:.0f}", *(f"{row[key]:.6f}" for key in list(row)[1:4])]
    assert re.search(rf"^accuracy {run.history[-1]['accuracy']:.4f} ", run.out, re.MULTILINE)
    assert f"run directory: {run.path}" in lines
    assert re.fullmatch(rf"look at it: +\S*tensorboard --logdir {run.path.parent.parent}", lines[-1])
    assert "\x1b" not in run.out and "\r" not in run.out, "no bar where there is no terminal"


@pytest.mark.parametrize("name", ["local", "two"])
def test_the_time_to_the_first_step_is_kept_by_phase(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    phases, step = run.json("startup.json"), run.events().Scalars("train/loss")[0]
    gang = ["model"] if name == "local" else ["Ray", "workers", "process group and model"]
    assert list(phases) == ["import", "data", *gang, "lr finder", "first step"]
    assert min(phases.values()) > 0
    told, written = sum(phases.values()), (run.path / "startup.json").stat().st_mtime
    assert step.wall_time - run.began - 1 < told < written - run.began + 0.05, "all the time since the command"


def test_without_the_lr_finder_its_phase_is_not_there(trained: Path) -> None:
    assert list(json.loads((trained / "startup.json").read_text())) == ["import", "data", "model", "first step"]


def test_two_workers_tell_what_one_tells(runs: dict[str, Run]) -> None:
    one, two = runs["local"].history, runs["two"].history
    assert [row["epoch"] for row in one] == [0, 1]
    for a, b in zip(one, two, strict=True):
        for key in ("train_loss", "valid_loss", "accuracy", "lr"):
            assert b[key] == pytest.approx(a[key], rel=2e-4), key
    suggestions = [re.search(r"LR finder: (\d+) steps, suggestion (\S+);", run.out) for run in runs.values()]
    assert suggestions[0] and suggestions[1]
    assert suggestions[0][2] == suggestions[1][2]


@pytest.mark.parametrize("name", ["local", "two"])
def test_tensorboard_has_what_was_promised(runs: dict[str, Run], name: str) -> None:
    run, events = runs[name], runs[name].events()
    ranks = {f"speed/images_per_second_rank_{rank}" for rank in range(2 if name == "two" else 1)}
    assert set(events.Tags()["scalars"]) >= TAGS | ranks
    assert set(events.Tags()["images"]) >= {"lr_finder", "train/samples"}
    for tag in ("train/loss", "train/lr", "train/momentum"):
        assert [event.step for event in events.Scalars(tag)] == list(range(14)), tag
    for key in ("train_loss", "valid_loss", "accuracy"):
        assert [e.value for e in events.Scalars(f"epoch/{key}")] == pytest.approx([row[key] for row in run.history])
    peak = float(re.search(r"suggestion (\S+);", run.out)[1])  # type: ignore[index]
    assert max(event.value for event in events.Scalars("train/lr")) == pytest.approx(peak, rel=0.1)
    for tag in ("speed/waiting_for_data", "speed/waiting_for_communication"):
        assert all(0 <= event.value <= 1 for event in events.Scalars(tag))


@pytest.mark.parametrize("name", ["local", "two"])
def test_the_saved_model_is_the_one_that_was_measured(runs: dict[str, Run], name: str, pictures: Path) -> None:
    run, about = runs[name], runs[name].json("model.json")
    assert about["classes"] == ["ant", "bee", "cat", "dog"]
    model = build(about["arch"], about["channels"], len(about["classes"]))
    model.load_state_dict(
        {key: torch.tensor(value) for key, value in load_file(run.path / "model.safetensors").items()}
    )
    valid = open_split(pictures, seed=0).valid
    margin = (about["presize"] - about["size"]) // 2
    cut = slice(margin, margin + about["size"])
    images = torch.tensor(np.stack([decode(file, about["presize"]) for file in valid.files]))[:, cut, cut]
    preds = model.eval()(Normalize(**{key: tuple(value) for key, value in about["normalize"].items()})(images))
    right = (preds.argmax(1) == torch.tensor(valid.targets)).float().mean().item()
    assert right == pytest.approx(run.history[-1]["accuracy"], abs=1e-6)
    assert torch.nn.functional.cross_entropy(preds, torch.tensor(valid.targets)).item() == pytest.approx(
        run.history[-1]["valid_loss"], rel=1e-4
    )


def test_a_run_leaves_nothing_in_the_temporary_folder(runs: dict[str, Run]) -> None:
    events = next((runs["two"].path / "tensorboard").iterdir())
    driver = events.name.split(".")[-2]  # TensorBoard puts the process number there
    assert not Path("/proc", driver).exists()
    assert not list(Path(tempfile.gettempdir()).glob(f"{PREFIX}{driver}-*"))
    worker = re.search(r"\(pid (\d+)", (runs["two"].path / "logs" / "rank_0.log").read_text())
    assert worker and not living([int(worker[1])])
    assert not wait_until_gone(Path("/proc", worker[1]).exists, 10), "init clears orphans away, within a second or so"


def test_what_is_asked_for_beyond_the_plain_loop_arrives(here, small, tmp_path: Path) -> None:
    how = "--local --name y --epochs 2 --arch simple_cnn_bn --optimizer adamw --lr 0.01 --body-lr 0.1"
    ended = here(*small, *how.split(), "--lsuv", "--activations", "--balance-classes", "--decay-weights-only")
    assert ended.code == 0, ended.err
    run = Run(ended.out, tmp_path / "runs" / "y" / "version_0")
    events = run.events()
    for layer in ("0_ConvLayer", "5_Linear"):
        assert [event.step for event in events.Histograms(f"activations/{layer}")] == [0, 7], "once an epoch"
        assert len(events.Scalars(f"activations_near_zero/{layer}")) == 2
    rates = zip(events.Scalars("train/body_lr"), events.Scalars("train/lr"))
    assert all(body.value == pytest.approx(head.value / 10) for body, head in rates)
    assert events.Scalars("activations_std/5_Linear")[0].value == pytest.approx(1, abs=0.5), "LSUV made it so"
    plain = here(*small, *how.split())
    assert plain.code == 0
    assert Run("", tmp_path / "runs" / "y" / "version_1").history != run.history
