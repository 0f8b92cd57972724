"""Each row under "Bad input", tried as a user would: the exit code, one sentence with the value and the remedy.

In this process where no second worker is needed, since every process of its own costs seconds.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from cluster.not_finite import FiniteGuard
from cluster.rank_learner import RankLearner
from learner.data.files import open_split
from learner.data.loader import epoch_order
from orchestrator.tracker import Tracker
from tests.results import history

Here = Callable[..., Any]


def refused(ended: Any, code: int, *parts: str) -> str:
    "Check the exit code and that stderr is one sentence with these parts; that sentence."
    lines = ended.err.splitlines()
    assert ended.code == code, ended.err
    assert len(lines) == 1 and lines[0].startswith("error: "), ended.err
    assert "Traceback" not in ended.out + ended.err
    for part in parts:
        assert re.search(part, lines[0]), f"{part!r} is not in {lines[0]!r}"
    return lines[0]


USAGE = [
    (["--bacth-size", "8"], ["--bacth-size is unknown", "did you mean --batch-size"]),
    (["--arch", "simple_cn"], ["'simple_cn' is unknown", "did you mean simple_cnn", "simple_cnn_bn"]),
    (["--arch", "alexnet"], ["'alexnet' is unknown", "known are .*simple_cnn"]),
    (["--data", "imagenette16"], ["'imagenette16'", "did you mean .*imagenette160", "shapes"]),
    (["--data", "no-such-dataset"], ["'no-such-dataset'", "folder", "archive", "URL", "shapes"]),
    (["--data", "/no/such/folder"], ["/no/such/folder", "does not exist"]),
    (["--schedule", "triangular"], ["--schedule triangular", "one_cycle", "constant", "cosine"]),
    (["--batch-size", "0"], ["--batch-size 0 is not possible", "1 or more"]),
    (["--batch-size", "-8"], ["--batch-size -8 is not possible", "1 or more"]),
    (["--batch-size", "3", "--cpus", "4"], ["--batch-size 3", "4 workers", "use 4 or more"]),
    (["--batch-size", "eight"], ["--batch-size: 'eight' is no whole number"]),
    (["--epochs", "0"], ["--epochs 0 is not possible", "1 or more"]),
    (["--lr", "-1"], ["--lr -1.0 is not possible", "above 0, auto or own"]),
    (["--bad-images", "ignore"], ["--bad-images ignore", "fail, skip"]),
    (["--cpus", "0"], ["--cpus 0 is not possible", "1 or more"]),
    (["--local", "--cpus", "2"], ["--local is one worker in this process, but 2"]),
    (["--gpus", "1", "--cpus", "1"], ["--gpus 1 and --cpus 1 exclude each other"]),
    (["--cache", "/proc/stores"], ["--cache /proc/stores is not possible: /proc/stores: No such file"]),
    (["--cache", __file__], ["--cache .* is not possible: .*: File exists; name a folder that can be written"]),
    (["--address", "somewhere", "--cpus", "2"], ["--address somewhere is not possible", "HOST:PORT"]),
    (["--name", "a/b"], ["--name a/b is not possible", "letters, digits"]),
    (["--config", "/no/such.toml"], ["--config /no/such.toml can't be read: No such file"]),
    (["shapes"], ["shapes is unknown", "--help"]),
    (["--runs", "~nobody-we-know/runs"], ["~nobody-we-know/runs can't be told", "Set HOME"]),
    (["--data-dir", "~nobody-we-know"], ["~nobody-we-know can't be told", "Set HOME"]),
]


@pytest.mark.parametrize(("arguments", "parts"), USAGE, ids=lambda value: " ".join(value)[:40])
def test_what_is_refused_before_anything_starts(
    here: Here, small: list[str], tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    refused(here(*small, *arguments), 2, *parts)
    assert not [*tmp_path.glob("runs/*")], "no run directory is left of what was refused"


@pytest.mark.skipif(torch.cuda.device_count() >= 4, reason="4 GPUs are there")
def test_more_gpus_than_there_are(here: Here, small: list[str]) -> None:
    there = torch.cuda.device_count()
    refused(here(*small, "--gpus", 4), 2, f"--gpus 4: {there} GPUs are visible", "--cpus 4")


@pytest.fixture
def folder(pictures: Path, tmp_path: Path) -> Path:
    "A copy of the pictures that may be spoilt."
    return Path(shutil.copytree(pictures, tmp_path / "copy"))


def no_images(folder: Path) -> None:
    for file in folder.rglob("*.JPEG"):
        file.rename(file.with_suffix(".txt"))


def one_class(folder: Path) -> None:
    for part in ("train", "val"):
        for name in ("bee", "cat", "dog"):
            shutil.rmtree(folder / part / name)


def empty_train(folder: Path) -> None:
    for file in (folder / "train").rglob("*.JPEG"):
        file.unlink()


FOLDERS: list[tuple[str, Callable[[Path], Any], list[str]]] = [
    ("no images", no_images, ["copy has no images", r"\.jpeg", "right folder"]),
    ("nothing", lambda folder: [shutil.rmtree(folder), folder.mkdir()], ["copy has no images"]),
    ("no train", lambda folder: shutil.rmtree(folder / "train"), ["copy.* training part", "train/", "val/", "random"]),
    ("no val", lambda folder: shutil.rmtree(folder / "val"), ["copy.* validation part", "valid/", "train/", "random"]),
    ("empty train", empty_train, ["copy.* training part", "has images|no images"]),
    ("one class", one_class, ["copy.* only one class, 'ant'", "two or more", "label"]),
    (
        "unknown",
        lambda folder: (folder / "val/bee").rename(folder / "val/bees"),
        ["'bees'", "'bee'", "no training image"],
    ),
]


@pytest.mark.parametrize(("spoil", "parts"), [row[1:] for row in FOLDERS], ids=[row[0] for row in FOLDERS])
def test_folders_that_are_no_dataset(
    here: Here, small: list[str], folder: Path, tmp_path: Path, spoil: Callable[[Path], Any], parts: list[str]
) -> None:
    spoil(folder)
    refused(here(*small, "--data", folder), 2, *parts)
    assert not (tmp_path / "runs").exists()


def spoilt(folder: Path, how: str, part: str = "train", place: int = -1) -> Path:
    "Spoil the image that comes at this place in the epoch (the last: long after the run began), and return it."
    split = open_split(folder, 42)
    files = split.train.files if part == "train" else split.valid.files
    number = epoch_order(len(files), 42, 0)[place] if part == "train" else place
    file, content = Path(files[number]), Path(files[number]).read_bytes()
    changed = {"empty": b"", "text": b"no image at all", "truncated": content[: len(content) // 2]}
    file.write_bytes(changed[how]) if how in changed else file.unlink()
    return file


REASONS = {"empty": "the file is empty", "text": "cannot identify image file", "truncated": "(?i)truncated"}


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("how", REASONS)
def test_an_unreadable_image_is_named(here: Here, small: list[str], folder: Path, how: str, place: int) -> None:
    file = spoilt(folder, how, place=place)
    ended = here(*small, "--data", folder)
    refused(ended, 1, f"{re.escape(str(file))} is no readable image", REASONS[how], "--bad-images skip")


def test_an_unreadable_validation_image_is_named(here: Here, small: list[str], folder: Path) -> None:
    file = spoilt(folder, "empty", part="val")
    refused(here(*small, "--data", folder), 1, f"{file} is no readable image", "--bad-images skip")


def test_skipped_images_are_counted_and_listed(here: Here, small: list[str], folder: Path, tmp_path: Path) -> None:
    bad = {str(spoilt(folder, how, place=place)) for how, place in (("empty", 0), ("text", 20), ("truncated", -1))}
    bad.add(str(spoilt(folder, "text", part="val")))
    ended = here(*small, "--data", folder, "--bad-images", "skip", "--epochs", 2)
    assert (ended.code, ended.err) == (0, "")
    listed = next((tmp_path / "runs").rglob("bad_images.csv"))
    rows = [line.split(",")[0] for line in listed.read_text().splitlines()]
    assert rows[0] == "file"
    assert sorted(rows[1:]) == sorted(bad), "each once, although it was met in each epoch"
    assert f"4 unreadable images were skipped; see {listed}" in ended.out
    for file in bad:
        assert ended.out.count(f"skipped {file}: ") == 1


def test_nothing_but_unreadable_images(here: Here, small: list[str], folder: Path) -> None:
    for file in (folder / "train").rglob("*.JPEG"):
        file.write_bytes(b"")
    refused(here(*small, "--data", folder, "--bad-images", "skip"), 1, "train/.*is no readable image")


@pytest.mark.parametrize("place", ["/proc/runs", "a-file", "a-file/below"])
def test_a_run_directory_that_can_not_be_written(here: Here, small: list[str], tmp_path: Path, place: str) -> None:
    (tmp_path / "a-file").touch()
    ended = here(*small, "--runs", tmp_path / place)
    refused(ended, 2, f"run directory .*{place}.* can't be written", "--runs DIR")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    "A factory of real disks of a given size."
    mounted = []

    def mount(size: str) -> Path:
        place = tmp_path / f"disk-{size}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], capture_output=True)
        if done.returncode:
            pytest.skip(f"a full disk needs a real one, and mounting is not permitted: {done.stderr.decode().strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("size", ["24k", "400k"])
def test_a_disk_that_fills(there: Here, small: list[str], tiny_disk: Callable[[str], Path], size: str) -> None:
    place = tiny_disk(size)  # full with the first picture, or with the weights
    ended = there("launch", *small, "--runs", place, "--epochs", 2, "--arch", "simple_cnn_bn")
    refused(ended, 1, "No space left on device", "make room, or name another disk with --runs DIR", "history.csv")
    done = [line for line in ended.out.splitlines() if re.match(r"\d ", line)]
    history = next(place.rglob("history.csv")).read_text().splitlines()
    assert len(history) == 1 + len(done) == (1 if size == "24k" else 3), "the epochs that were done are kept"
    assert not list(place.rglob("model.*")), "half a model is none"
    assert ("no checkpoint is there to go on from" in ended.err) == (size == "400k")


@pytest.fixture
def after_epoch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[Tracker], object]], None]:
    "A function that has something happen once that epoch's row is written."
    plans: dict[int, Callable[[Tracker], object]] = {}
    write = Tracker.epoch

    def write_and_happen(tracker: Tracker, epoch: int, *args: Any) -> dict[str, Any]:
        row = write(tracker, epoch, *args)
        plans.get(epoch, lambda tracker: None)(tracker)
        return row

    monkeypatch.setattr(Tracker, "epoch", write_and_happen)
    return plans.__setitem__


def fill_up(place: Path) -> None:
    "Leave no room on that disk."
    with suppress(OSError), open(place / "filler", "wb", 0) as file:
        while True:
            file.write(bytes(4096))


def test_a_disk_that_is_full_at_the_end(
    here: Here, small: list[str], tiny_disk: Callable[[str], Path], after_epoch: Callable
) -> None:
    "The model has its room since the beginning."
    place = tiny_disk("2m")
    after_epoch(0, lambda _: fill_up(place))
    ended = here(*small, "--runs", place, "--epochs", 2)
    assert (ended.code, ended.err) == (0, "") and "no checkpoint of step 14 could be written" in ended.out
    assert load_file(next(place.rglob("model.safetensors"))) and next(place.rglob("model.json")).read_text()
    assert not list(place.rglob(".*"))


def test_a_disk_that_is_full_for_a_while(
    here: Here, small: list[str], tiny_disk: Callable[[str], Path], after_epoch: Callable
) -> None:
    "Training goes on, loudly; what is told of it is complete again once there is room."
    place = tiny_disk("2m")  # room for the model beside two checkpoints of its size, the last of which is being written

    def fill(tracker: Tracker) -> None:
        fill_up(place)
        tracker.text("long", "x" * 10_000)  # more than is left of the file's last block

    after_epoch(1, fill)
    after_epoch(3, lambda _: (place / "filler").unlink())
    ended = here(*small, "--runs", place, "--epochs", 6, "--keep", 1)
    assert (ended.code, ended.err) == (0, "")
    for text in (
        r"no checkpoint of step \d+ could be written",
        "history.csv could not be written",
        "curves have a gap",
    ):
        assert re.search(f"warning: .*{text}.*", ended.out), text
    assert ended.out.count("No space left on device") >= 3
    history = next(place.rglob("history.csv")).read_text().splitlines()
    assert [line.split(",")[0] for line in history] == ["epoch", "0", "1", "2", "3", "4", "5"]
    assert list(place.rglob("model.safetensors")) and not list(place.rglob(".*"))


def test_a_run_directory_that_somebody_removes(
    here: Here, small: list[str], tmp_path: Path, after_epoch: Callable
) -> None:
    run = tmp_path / "runs" / "run" / "version_0"
    after_epoch(1, lambda _: shutil.rmtree(run))
    ended = here(*small, "--runs", tmp_path / "runs", "--name", "run", "--epochs", 4)
    assert (ended.code, ended.err) == (0, "")
    assert f"{run} was gone: it is made again" in ended.out
    assert len((run / "history.csv").read_text().splitlines()) == 5
    names = {"config.json", "history.csv", "model.json", "model.safetensors", "checkpoints", "tensorboard", "logs"}
    assert names <= set(os.listdir(run))
    again = here(*small, "--runs", tmp_path / "runs", "--name", "run", "--epochs", 4, "--resume", "last")
    assert again.code == 0, "it can be resumed"


def test_a_loss_that_is_no_number(here: Here, small: list[str]) -> None:
    refused(here(*small, "--lr", "1e30"), 1, "the loss became (nan|inf) at step [1-3] ", "learning rate", "lower --lr")


def test_what_is_noticed_late_is_not_saved(
    here: Here, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "On a GPU workers do not look before each step; the driver does when all is spoiled."
    monkeypatch.setattr(FiniteGuard, "look", lambda guard, params: None)
    wanted = r"the loss became (nan|inf) at step [1-3] \(learning rate .*\), in the batch of /.* more; begin anew with"
    refused(here(*small, "--lr", "1e30"), 1, wanted)
    assert list(tmp_path.rglob("history.csv")) and not list(tmp_path.rglob("step_*"))


def test_a_rollback_halves_the_rate(here: Here, small: list[str], tmp_path: Path) -> None:
    ended = here(*small, "--lr", "1e30", "--on-nan", "rollback", "--max-restarts", 2)
    rates = re.findall(r"the loss became (?:nan|inf) at step [1-3] \(learning rate (\S+)\)", ended.err)
    assert ended.code == 1
    assert len(rates) == 3
    assert [float(a) / float(b) for a, b in pairwise(rates)] == pytest.approx([2, 2], rel=1e-3)
    assert ended.err.count("back to the last checkpoint, at half the rate") == 2
    assert ended.out.count("run_directory") == 1, "what the run is is said once"
    (log,) = tmp_path.rglob("faults.log")
    assert [log.read_text().count(what) for what in ("the loss became", "back to the last")] == [3, 2]


def test_steps_can_be_skipped(here: Here, small: list[str]) -> None:
    ended = here(*small, "--lr", "1e30", "--on-nan", "skip")
    assert ", of a loss or gradient that is not finite" in ended.out


def test_a_run_that_skips_all_steps_comes_to_an_end(here: Here, small: list[str], tmp_path: Path) -> None:
    ended = here(*small, "--lr", "1e30", "--on-nan", "skip", "--epochs", 4)
    assert "all completed steps" not in refused(
        ended, 1, "all steps of epoch 1 had to be skipped", "begin anew with a lower --lr"
    )
    (run,) = tmp_path.rglob("version_0")
    again = here(
        *small, "--lr", "1e30", "--on-nan", "stop", "--epochs", 4, "--runs", tmp_path / "runs", "--resume", run
    )
    refused(again, 1, "the loss became (nan|inf) at step"), "it goes on from before them, and sees for itself"


def test_a_validation_without_finite_numbers(
    here: Here, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "It is told as it is, and no best epoch; the weights are finite, and with them training goes on, also resumed."
    get_loss = RankLearner.get_loss

    def spoiled(learner: RankLearner) -> None:
        if not learner.model.training and learner.epoch:
            learner.preds = learner.preds * float("nan")
        get_loss(learner)

    monkeypatch.setattr(RankLearner, "get_loss", spoiled)
    command = [*small, "--epochs", 2, "--save-best", "--name", "run"]
    ended = here(*command)
    assert (ended.code, ended.err) == (0, "")
    assert re.findall(r"fault \d: the validation of epoch (\d) came to a loss of nan", ended.out) == ["1"]
    first, second = history(tmp_path / "runs" / "run" / "version_0")
    assert float(first["accuracy"]) > 0
    assert (second["valid_loss"], second["accuracy"]) == ("nan", "0.0")
    assert "after 1 epoch\n" in ended.out, "the best of them"
    assert "after 1 epoch\n" in here(*command, "--resume", "last").out


def test_debug_shows_where(here: Here, small: list[str]) -> None:
    ended = here(*small, "--arch", "alexnet", "--debug")
    assert ended.code == 2
    assert ended.err.startswith("Traceback (most recent call last)")
    assert ended.err.splitlines()[-1].startswith("error: model 'alexnet' is unknown")


def test_no_cluster_at_the_address(here: Here, small: list[str]) -> None:
    ended = here(*small, "--address", "127.0.0.1:1", "--cpus", 2)
    refused(ended, 1, "no Ray cluster could be joined at 127.0.0.1:1: Connection refused", "ray start --head")


def test_a_failing_worker_is_named_first(here: Here, on_ray_gang: None, small: list[str], folder: Path) -> None:
    file = spoilt(folder, "empty", part="val")  # the last of all is the last rank's
    ended = here(*small, "--data", folder, "--cpus", 2)
    assert ended.code == 1
    first, *rest = ended.err.splitlines()
    assert re.fullmatch(
        rf"error: a worker failed: rank 1 \(host \S+, pid \d+\): {re.escape(str(file))} is no readable image: "
        r"the file is empty.*--bad-images skip", first
    )  # fmt: skip
    assert rest[:-1] in ([], ["(1 more lost touch with a failed worker)"])
    assert rest[-1] == "all completed steps are saved: go on with the same command and --resume last"


def test_usage_is_refused_without_torch(user_environment: dict[str, str]) -> None:
    script = (
        "import sys\nfrom orchestrator.launch import main\ncode = main(['--epochs', '0'])\n"
        "assert not {'torch', 'ray'} & set(sys.modules)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=user_environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: --epochs 0 is not possible: it must be 1 or more\n")
