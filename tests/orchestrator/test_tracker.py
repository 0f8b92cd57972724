"What a run leaves for people: TensorBoard's own reader, the history and the terminal must agree with the reports."

import csv
import math
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.messages import Chunk, Report
from learner.callbacks.activations import BINS, LIMIT, NEAR, activation_sums
from orchestrator.board import Board
from orchestrator.phases import Phases
from orchestrator.run_folder import HISTORY, RunFolder
from orchestrator.tally import Tally
from orchestrator.terminal import Terminal
from orchestrator.tracker import Tracker

LOSSES, COUNTS = [[6.0, 3.0], [2.0, 5.0]], [[3, 3], [1, 3]]  # of two ranks in two steps
SECONDS = {"total": 2.0, "data": 0.5, "communication": 0.25}


def reports(train: bool, step: int, bad: tuple[tuple[str, str], ...] = ()) -> list[Report]:
    "Of two ranks about two batches."
    hypers = ({"lr": 0.1, "momentum": 0.9}, {"lr": 0.2, "momentum": 0.8}) if train else ({}, {})
    chunk = Chunk(train, 0, 0, step, hypers)
    counts = [float(sum(n)) for n in zip(*COUNTS)]
    batches = {"count": counts, "loss": [sum(each) for each in zip(*LOSSES)], "accuracy": [1.0, 2.0]}
    return [Report(rank, chunk, batches, sum(COUNTS[rank]), SECONDS, list(bad) if rank else []) for rank in range(2)]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run")


def scalars(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    "All scalars that TensorBoard reads there: step and value."
    events = EventAccumulator(str(folder.path / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("seconds, told", [(0.0, False), (0.9, False), (31.25, True)])
def test_an_epoch_says_what_of_it_was_compiling(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], seconds: float, told: bool
) -> None:
    tracker, learned, measured = Tracker(folder, Terminal()), Tally(), Tally()
    tracker.start(4)
    first, second = reports(True, 0)
    learned.add([first, replace(second, seconds={**SECONDS, "compiling": seconds})])
    measured.add(reports(False, 2))
    tracker.epoch(3, 2, 0.2, learned, measured)
    tracker.close()
    assert ("note: epoch 3 includes 31.2 s of compiling" in capsys.readouterr().out) == told


def test_steps_and_epochs_arrive_in_tensorboard(folder: RunFolder) -> None:
    tracker = Tracker(folder, Terminal())
    tracker.start(4)
    learned, measured = Tally(), Tally()
    for train, tally in ((True, learned), (False, measured)):
        tally.add(reports(train, 5 if train else 7))
        tracker.chunk(reports(train, 5 if train else 7))
    row = tracker.epoch(0, 6, 0.2, learned, measured)
    tracker.close()
    seen = scalars(folder)
    per_step = {"train/loss": [2.0, 8 / 6], "train/lr": [0.1, 0.2], "train/momentum": [0.9, 0.8]}
    for tag, values in per_step.items():
        assert [step for step, _ in seen[tag]] == [5, 6], tag
        assert [value for _, value in seen[tag]] == pytest.approx(values), tag
    per_epoch = {
        "epoch/train_loss": 1.6, "epoch/valid_loss": 1.6, "epoch/accuracy": 0.3, "epoch/train_accuracy": 0.3,
        "speed/images_per_second": row["images_per_second"], "speed/images_per_second_rank_0": 6 / 1.75,
        "speed/images_per_second_rank_1": 4 / 1.75, "speed/waiting_for_data": 0.25,
        "speed/waiting_for_communication": 0.125,
    }  # fmt: skip
    for tag, value in per_epoch.items():
        assert [value for _, value in seen[tag]] == pytest.approx([value]), tag
    assert seen.keys() == per_step.keys() | per_epoch.keys()


def many(first: int, n: int) -> list[Report]:
    "Of a chunk of so many steps, whose loss is the step's number; what they are trained with changes on the way."
    chunk = Chunk(
        True, 0, 0, first, tuple({"lr": 0.1} if i < n // 2 else {"momentum": 0.9, "lr": 0.2} for i in range(n))
    )
    columns = {"count": [2.0] * n, "loss": [2.0 * step for step in range(first, first + n)]}
    return [Report(0, chunk, columns, 2 * n, SECONDS)]


def test_curves_can_be_read_while_they_grow(folder: RunFolder) -> None:
    "Chunk by chunk, and to the last step, however long events are (their length depends on the step's number)."
    tracker = Tracker(folder, Terminal())
    events = EventAccumulator(str(folder.path / "tensorboard"), size_guidance={"scalars": 0})
    for first in (0, 300):
        tracker.chunk(many(first, 300))
        events.Reload()
        assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(i, i) for i in range(first + 300)]
    rates, momenta = ([(e.step, round(e.value, 6)) for e in events.Scalars(f"train/{x}")] for x in ("lr", "momentum"))
    assert rates == [(step, 0.1 if step % 300 < 150 else 0.2) for step in range(600)]
    assert momenta == [(step, 0.0 if step % 300 < 150 else 0.9) for step in range(600)]
    tracker.close()


def test_a_run_that_resumes_replaces_what_was_there(folder: RunFolder) -> None:
    for first, n in ((None, 300), (200, 50)):
        tracker = Tracker(folder, Terminal(), first)
        tracker.chunk(many(first or 0, n))
        tracker.close()
    assert scalars(folder)["train/loss"] == [(i, i) for i in range(250)]


@pytest.mark.parametrize("copied", [False, True])
def test_curves_whose_folder_is_gone_begin_anew(
    folder: RunFolder, copied: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    "Though the file that is open takes all; with an epoch, and said once. So it is where a copy is in its place."
    tracker, board = Tracker(folder, Terminal()), folder.path / "tensorboard"
    tracker.chunk(many(0, 2))
    board.rename(folder.path / "elsewhere")
    if copied:
        shutil.copytree(folder.path / "elsewhere", board)
    tracker.chunk(many(2, 2))
    tracker.chunk(many(4, 2))
    assert capsys.readouterr().out.count(f"warning: {board} could not be written: ") == 1
    tracker.board.renew()
    tracker.chunk(many(6, 2))
    tracker.close()
    assert [step for step, _ in scalars(folder)["train/loss"]] == ([0, 1] if copied else []) + [6, 7]
    assert not capsys.readouterr().out


def test_a_clock_that_is_set_back_doubles_no_points(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    "The run that goes on at step 2 has its files read last."
    for first, hours in ((None, 0), (2, -1), (3, 1)):
        now = time.time() + 3600 * hours
        with monkeypatch.context() as patched:
            patched.setattr("orchestrator.board.time", SimpleNamespace(time=lambda now=now: now))
            board = Board(folder.path / "tensorboard", print, first)
            board.add_steps(first or 0, [{"x": float(hours)}] * 3)
            board.close()
    assert scalars(folder)["x"] == [(0, 0.0), (1, 0.0), (2, -1.0), (3, 1.0), (4, 1.0), (5, 1.0)]


def test_the_row_is_the_history_in_full(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(folder, Terminal())
    tracker.start(4)
    learned, measured = Tally(), Tally()
    learned.add(reports(True, 0))
    measured.add(reports(False, 2))
    learned.elapsed, measured.elapsed = 61.5, 1.0
    rows = [tracker.epoch(epoch, 2 * epoch + 1, math.pi / 30, learned, measured) for epoch in range(2)]
    tracker.close()
    written = list(csv.DictReader((folder.path / "history.csv").read_text().splitlines()))
    for row, line in zip(rows, written, strict=True):
        assert tuple(line) == HISTORY
        assert {key: float(value) for key, value in line.items()} == row, "to the last bit"
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["epoch", "train_loss", "valid_loss", "accuracy", "images/s", "time"]
    assert first.split() == ["0", "1.600000", "1.600000", "0.300000", f"{10 / 61.5:.0f}", "01:02"]
    assert second.split()[0] == "1"
    assert [header.index("accuracy")] == [first.index("0.300000")], "columns are aligned"


def test_bad_images_are_named_once(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(folder, Terminal())
    for step in (0, 2):
        tracker.chunk(reports(True, step, bad=(("b.jpg", "it is cut"), ("a.jpg", "it is empty"))))
    tracker.close()
    assert capsys.readouterr().out.count("skipped a.jpg: it is empty") == 1
    assert (folder.path / "bad_images.csv").read_text().split() == [
        "file,reason", "a.jpg,it", "is", "empty", "b.jpg,it", "is", "cut",
    ]  # fmt: skip
    assert len(tracker.bad_images) == 2


def test_what_can_wait_is_done_while_workers_have_enough_to_do(folder: RunFolder) -> None:
    "Not behind the first step, which lasts longer than what is then under way; by the end of the epoch at the latest."
    done: list[str] = []
    tracker = Tracker(folder, Terminal())
    tracker.phases = Phases()
    tracker.at_leisure.append(lambda: done.append("first"))
    brief = [replace(report, seconds=SECONDS | {"total": 0.05}) for report in reports(True, 2)]
    for number, (chunk, n) in enumerate([(reports(True, 0), 0), (brief, 0), (reports(True, 4), 1), (brief, 1)]):
        tracker.chunk(chunk)
        assert len(done) == n, number
    tracker.at_leisure.append(lambda: done.append("last"))
    tally = Tally()
    tally.add(brief)
    tracker.epoch(0, 3, 0.1, tally, tally)
    tracker.close()
    assert done == ["first", "last"]


def test_a_picture_arrives_as_it_is(folder: RunFolder) -> None:
    tracker = Tracker(folder, Terminal())
    tracker.picture("some/picture", Image.new("RGB", (100, 50), "red"), 3)
    tracker.close()
    events = EventAccumulator(str(folder.path / "tensorboard"))
    events.Reload()
    (image,) = events.Images("some/picture")
    assert (image.step, image.width, image.height) == (3, 100, 50)
    pixels = np.asarray(Image.open(BytesIO(image.encoded_image_string)).convert("RGB"))
    assert (pixels == [255, 0, 0]).all()


def test_activations_of_all_ranks_arrive_as_one_histogram(folder: RunFolder) -> None:
    "What each layer gives: half of the numbers on each rank."
    numbers = torch.randn(1000, dtype=torch.float64)
    parts = [activation_sums(part, NEAR, LIMIT, BINS).numpy() for part in numbers.split(500)]
    tracker = Tracker(folder, Terminal())
    tracker.start(4)
    tracker.chunk([replace(one, activations={6: {"0_Linear": sums}}) for one, sums in zip(reports(True, 5), parts)])
    tracker.close()
    [event] = EventAccumulator(str(folder.path / "tensorboard")).Reload().Histograms("activations/0_Linear")
    value = event.histogram_value
    assert (event.step, value.num) == (6, 1000)
    assert (value.sum, value.sum_squares) == pytest.approx((numbers.sum().item(), numbers.square().sum().item()))
    edges = [-math.inf, *value.bucket_limit[:-1], math.inf]
    assert value.bucket == np.histogram(numbers, edges)[0].tolist()
    seen = scalars(folder)
    assert seen["activations_std/0_Linear"] == [(6, pytest.approx(numbers.std(correction=0).item()))]
    assert seen["activations_near_zero/0_Linear"] == [(6, pytest.approx((numbers.abs() < NEAR).double().mean().item()))]


ANOTHER = """
import sys
import cluster.rank_learner as ranks
from learner.metrics import top_k
ranks.METRICS["top_2"] = top_k(2)
ranks.NAMES = ("count", "loss", *ranks.METRICS)
from orchestrator.launch import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_metric_that_is_added_is_shown_everywhere(small: list[str], tmp_path: Path) -> None:
    line = [sys.executable, "-c", ANOTHER, *small, "--local", "--epochs", "2"]
    said = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60).stdout
    header = next(row.split() for row in said.splitlines() if row.startswith("epoch "))
    assert header[3:5] == ["accuracy", "top_2"]
    run = next(tmp_path.rglob("history.csv")).parent
    rows = list(csv.DictReader((run / "history.csv").read_text().splitlines()))
    assert all(1 >= float(row["top_2"]) >= float(row["accuracy"]) for row in rows) and len(rows) == 2
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {"epoch/top_2", "epoch/train_top_2"} <= {*events.Tags()["scalars"]}
