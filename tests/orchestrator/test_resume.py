"A run that was stopped anywhere and resumed is the run that never stopped: weights, history and TensorBoard."

import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import cluster.worker
import orchestrator.driver
import orchestrator.find_lr
import orchestrator.fit
import orchestrator.resume
import tests.results
from cluster.checkpoint import Checkpoints
from cluster.faults import Failure, NoneLeft
from cluster.gang import LocalGang
from cluster.rank_learner import METRICS
from learner.errors import UsageError, UserError
from orchestrator.config import Config
from orchestrator.launch import main
from orchestrator.resume import _refuse_changes
from orchestrator.run_folder import HISTORY, RunFolder
from orchestrator.session import Session

OPTIONS = ["--epochs", "3", "--batch-size", "8", "--size", "16", "--arch", "simple_cnn_bn", "--momentum", "0.9",
           "--augment", "--ema", "0.9", "--local", "--name", "run"]  # fmt: skip
CHUNKS = 3 * (3 + 2)  # three batches to train on and two to validate, one a chunk


class StopAfter:
    "Stands in for the signals: asks to stop when it has let `chunks` chunks go."

    code = 130

    def __init__(self, chunks: int) -> None:
        self.left = chunks

    def __enter__(self) -> "StopAfter":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "22 training and 11 validation pictures in two classes."
    import numpy as np
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, n in (("train", 11), ("valid", 5)):
        for number, name in enumerate(("dark", "light")):
            (root / part / name).mkdir(parents=True)
            for i in range(n + (number if part == "valid" else 0)):
                pixels = rng.integers(0, 128, (20, 24, 3), dtype=np.uint8) + np.uint8(100 * number)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def launch(data: Path, runs: Path, *more: str) -> int:
    return main([*OPTIONS, "--data", str(data), "--runs", str(runs), "--data-dir", str(data.parent / "cache"), *more])


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The runs folder of a run that was left alone."
    runs = tmp_path_factory.mktemp("uninterrupted")
    assert launch(data, runs) == 0
    return runs


def assert_same(runs: Path, reference: Path) -> None:
    tests.results.assert_same(runs / "run" / "version_0", reference / "run" / "version_0")


@pytest.mark.parametrize("chunks", range(CHUNKS))
def test_stopped_at_any_batch_and_resumed(chunks, data, uninterrupted, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(orchestrator.driver.Pace, "seconds", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(orchestrator.fit, "Stop", lambda: StopAfter(chunks))
        assert launch(data, tmp_path) == 130
    assert len(tests.results.history(tmp_path / "run" / "version_0")) == chunks // 5
    assert launch(data, tmp_path, "--resume", "last") == 0
    assert os.listdir(tmp_path / "run") == ["version_0"]
    assert_same(tmp_path, uninterrupted)


def test_stopped_twice_and_resumed_with_another_pace(data, uninterrupted, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(orchestrator.driver.Pace, "seconds", 0.0)
        for chunks in (2, 6):
            patched.setattr(orchestrator.fit, "Stop", lambda chunks=chunks: StopAfter(chunks))
            assert launch(data, tmp_path, "--autoresume") == 130
    assert launch(data, tmp_path, "--autoresume") == 0
    assert_same(tmp_path, uninterrupted)


def test_a_broken_checkpoint_is_passed_over(data, uninterrupted, tmp_path, monkeypatch, capsys) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(orchestrator.driver.Pace, "seconds", 0.0)
        patched.setattr(orchestrator.fit, "Stop", lambda: StopAfter(7))
        assert launch(data, tmp_path) == 130
    newest = tmp_path / "run" / "version_0" / "checkpoints" / "step_5" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert launch(data, tmp_path, "--resume", "last") == 0
    assert "step_5 can't be used" in capsys.readouterr().out
    assert_same(tmp_path, uninterrupted)


@pytest.mark.parametrize("batch", [1, 2, 3, 6, 9])
def test_what_a_user_has_to_mend_costs_no_step(batch, data, uninterrupted, tmp_path, monkeypatch, capsys) -> None:
    "An image that can't be read: of training, or of validation (3, 9); the run goes on where it was."
    calls = itertools.count()

    def refuse(*_: object) -> None:
        if next(calls) == batch:
            raise UserError("x.png is no readable image")

    with monkeypatch.context() as patched:
        patched.setattr(cluster.worker, "refuse_bad", refuse)
        assert launch(data, tmp_path) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: x.png is no readable image; all completed steps are saved: go on with the same")
    epoch, within = divmod(batch, 5)
    assert (tmp_path / "run" / "version_0" / "checkpoints" / f"step_{3 * epoch + min(within, 3)}").is_dir()
    assert launch(data, tmp_path, "--resume", "last") == 0
    assert_same(tmp_path, uninterrupted)


@pytest.mark.parametrize(("how", "code"), [(["--resume", "last"], 2), (["--autoresume"], 0)])
def test_where_all_checkpoints_are_broken(how, code, data, uninterrupted, tmp_path, capsys) -> None:
    "Who asks to resume is refused; who leaves it to the command is told that it begins again."
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    broken = sorted((tmp_path / "run" / "version_0" / "checkpoints").iterdir())
    for folder in broken:
        (folder / "meta.json").write_bytes(b"")
    before = tests.results.history(tmp_path / "run" / "version_0")
    assert launch(data, tmp_path, *how) == code
    said, refused = capsys.readouterr()
    best = max(before, key=lambda row: float(row["accuracy"]))
    assert {folder.name for folder in broken} == {"step_6", "step_9", f"step_{3 * int(best['epoch']) + 3}"}
    assert all(f"warning: checkpoint {folder} can't be used: " in said for folder in broken)
    if code:
        assert "can be used; to begin anew, leave --resume out" in refused and refused.count("\n") == 1
        assert tests.results.history(tmp_path / "run" / "version_0") == before, "nothing was touched"
    else:
        assert "can be used: the run begins again, at step 0" in said
        assert_same(tmp_path, uninterrupted)


@pytest.fixture(scope="module")
def saved_often(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The runs folder of a run that saved after each chunk of training, and kept all of that."
    runs = tmp_path_factory.mktemp("often")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(orchestrator.driver.Pace, "seconds", 0.0)
        patched.setattr(orchestrator.driver, "SAVE_EVERY", 0.0)
        assert launch(data, runs, "--keep", "99") == 0
    return runs


def test_saves_in_the_midst_of_epochs_change_nothing(data, uninterrupted, saved_often) -> None:
    assert Checkpoints(saved_often / "run" / "version_0" / "checkpoints").steps() == list(range(1, 10))
    assert_same(saved_often, uninterrupted)


@pytest.mark.parametrize("step", [1, 5])
def test_a_save_in_the_midst_of_an_epoch_is_where_a_run_goes_on(
    step, data, uninterrupted, saved_often, tmp_path, capsys
) -> None:
    "As the driver leaves it that is killed before the next one: its history and curves may be ahead of it."
    shutil.copytree(saved_often, tmp_path, dirs_exist_ok=True)
    for later in range(step + 1, 10):
        shutil.rmtree(tmp_path / "run" / "version_0" / "checkpoints" / f"step_{later}")
    assert launch(data, tmp_path, "--resume", "last") == 0
    assert f"going on at step {step} of 9\n" in capsys.readouterr().out
    assert_same(tmp_path, uninterrupted)


OFTEN = """
import os, sys, orchestrator.driver
orchestrator.driver.Pace.seconds = orchestrator.driver.SAVE_EVERY = 0.0
def hook(event, args):
    if event == "os.mkdir" and ".step_5." in str(args[0]):
        os.kill(os.getpid(), 9)
sys.addaudithook(hook)
from orchestrator.launch import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_driver_killed_in_the_midst_of_an_epoch(data, uninterrupted, tmp_path, capsys) -> None:
    places = ["--data", str(data), "--data-dir", str(data.parent / "cache"), "--runs", str(tmp_path)]
    killed = subprocess.run([sys.executable, "-c", OFTEN, *OPTIONS, *places], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert launch(data, tmp_path, "--resume", "last") == 0
    assert "going on at step 4 of 9\n" in capsys.readouterr().out
    assert_same(tmp_path, uninterrupted)


KILLED = """
import os, sys
at, begun, calls = int(sys.argv[1]), False, 0
def hook(event, args):
    global begun, calls
    if event in ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove") and "/checkpoints/" in str(args[0]):
        begun = begun or "step_6" in str(args[0])  # the second of three
        calls += begun
        if begun and calls == at:
            os.kill(os.getpid(), 9)
sys.addaudithook(hook)
from orchestrator.launch import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_driver_killed_in_each_phase_of_a_checkpoint(data, uninterrupted, tmp_path) -> None:
    "At each file operation in turn, until the run gets through; each of them goes on to the same end."
    places = ["--data", str(data), "--data-dir", str(data.parent / "cache"), "--keep", "1", "--autoresume"]
    for moment in range(1, 40):
        runs = tmp_path / f"{moment}"
        command = [sys.executable, "-c", KILLED, f"{moment}", *OPTIONS, *places, "--runs", str(runs)]
        code = subprocess.run(command, capture_output=True, check=False).returncode
        assert code in (0, -signal.SIGKILL)
        assert launch(data, runs, "--keep", "1", "--autoresume") == 0
        assert_same(runs, uninterrupted)
        found, broken = Checkpoints(runs / "run" / "version_0" / "checkpoints").newest()
        assert found is not None and found.step == 9 and not broken
        assert not list(runs.rglob(".*")), "nothing half-written is left"
        if code == 0:
            assert moment > 10
            return
    pytest.fail("the run never got through")


def test_an_error_in_the_only_worker_costs_no_step(data, uninterrupted, tmp_path, monkeypatch, capsys) -> None:
    "It is shown once."
    calls = itertools.count()

    def fail(*_: object) -> None:
        if next(calls) == 6:
            raise RuntimeError("injected")

    with monkeypatch.context() as patched:
        patched.setattr(cluster.worker, "refuse_bad", fail)
        assert launch(data, tmp_path) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: a worker failed: rank 0 (host ") and "all completed steps are saved" in said
    assert said.count("Traceback") == said.count("\nRuntimeError: injected\n") == 1
    assert launch(data, tmp_path, "--resume", "last") == 0
    assert_same(tmp_path, uninterrupted)


def test_workers_that_all_die_while_they_load_begin_again(data, uninterrupted, tmp_path, monkeypatch, capsys) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(orchestrator.fit, "Stop", lambda: StopAfter(7))
        assert launch(data, tmp_path) == 130
    call, deaths = LocalGang.call, [NoneLeft([Failure(0, "host", 7, "died", "gone")])]
    run = tmp_path / "run" / "version_0"
    started = (run / "startup.json").read_text()

    def die_once(gang: LocalGang, method: str, *args: Any) -> Any:
        if method == "load" and deaths:
            raise deaths.pop()
        if method == "load":
            (run / "config.json").unlink()
        return call(gang, method, *args)

    monkeypatch.setattr(LocalGang, "call", die_once)
    assert launch(data, tmp_path, "--resume", "last") == 0
    assert "all begin again at the newest checkpoint" in capsys.readouterr().err
    log = (run / "logs" / "faults.log").read_text()
    assert "(host host, pid 7): gone" in log and "no worker is left: all begin again" in log
    assert (run / "config.json").exists(), "it was gone, and is known to whoever began again"
    assert (run / "startup.json").read_text() == started, "of the start of the command"
    assert_same(tmp_path, uninterrupted)


@pytest.mark.parametrize("method", ["run", "snapshot"])
@pytest.mark.parametrize(
    ("survivor", "told"),
    [
        (True, "go on with the same command and --resume last"),
        (False, "it could not be saved; --resume last goes on at step 3"),
    ],
)
def test_who_is_asked_to_stop_stops_though_workers_go(
    method, survivor, told, data, uninterrupted, tmp_path, monkeypatch, capsys
) -> None:
    """At the signal, in the second batch of the second epoch, they are lost in a step, or as their state is asked for.

    The disk is so slow that the checkpoint of the first epoch is not written until then.
    """
    call, calls = LocalGang.call_first, {"run": 0, "snapshot": 0}
    write, asked = Checkpoints.save, threading.Event()

    def go(gang: LocalGang, name: str, *args: Any) -> Any:
        calls[name] = calls.get(name, 0) + 1
        if name == "run" and calls["run"] == 7:
            signal.raise_signal(signal.SIGTERM)
        done = call(gang, name, *args)
        if name == method and calls[name] == {"run": 7, "snapshot": 2}[name]:
            raise NoneLeft([Failure(0, "host", 7, "died", "gone")])
        return done

    with monkeypatch.context() as patched:
        patched.setattr(orchestrator.driver.Pace, "seconds", 0.0)
        patched.setattr(LocalGang, "call_first", go)
        if not survivor:
            patched.setattr(LocalGang, "salvage", lambda gang: asked.set())
            patched.setattr(Checkpoints, "save", lambda *args: asked.wait(30) and write(*args))
        assert launch(data, tmp_path) == 143
    assert f"stopped in epoch 1: {told}" in capsys.readouterr().err
    assert launch(data, tmp_path, "--resume", "last") == 0
    assert_same(tmp_path, uninterrupted)


@pytest.mark.parametrize("often", [False, True])
def test_replicas_that_differ_get_no_checkpoint(often, data, tmp_path, monkeypatch, capsys) -> None:
    "Neither that of a stop, nor one in the midst of an epoch; here are not two workers, but two fingerprints."
    call, calls = LocalGang.call, itertools.count()

    def differ(gang: LocalGang, method: str, *args: Any) -> Any:
        if method == "checksums":
            return [{"0/weight": "1"}, {"0/weight": "2"}]
        return ["aa", "bb" if next(calls) else "aa"] if method == "fingerprint" else call(gang, method, *args)

    monkeypatch.setattr(orchestrator.driver.Pace, "seconds", 0.0)
    monkeypatch.setattr(LocalGang, "world_size", 2)
    monkeypatch.setattr(LocalGang, "call", differ)
    if often:
        monkeypatch.setattr(orchestrator.driver, "SAVE_EVERY", 0.0)
    else:
        monkeypatch.setattr(orchestrator.fit, "Stop", lambda: StopAfter(7))
    assert launch(data, tmp_path) == (1 if often else 130)
    said, step = capsys.readouterr().err, 1 if often else 3
    assert f"replicas differ in epoch {0 if often else 1}, after 2 batches, first in weight" in said
    assert often or f"stopped in epoch 1: it could not be saved; --resume last goes on at step {step}" in said
    assert Checkpoints(tmp_path / "run" / "version_0" / "checkpoints").steps() == [step]


def test_bad_images_of_before_the_stop_stay_listed(data, tmp_path, monkeypatch, capsys) -> None:
    "Stopped in its last validation, behind the training files that can't be read; the count at the end has them."
    broken = Path(shutil.copytree(data, tmp_path / "broken"))
    for name in ("train/dark/0.png", "train/light/3.png", "valid/light/4.png"):
        (broken / name).write_bytes(b"no picture, and not a short one either")
    assert launch(broken, tmp_path / "whole", "--bad-images", "skip") == 0
    assert "3 unreadable images were skipped" in capsys.readouterr().out
    with monkeypatch.context() as patched:
        patched.setattr(orchestrator.driver.Pace, "seconds", 0.0)
        patched.setattr(orchestrator.fit, "Stop", lambda: StopAfter(CHUNKS - 2))
        assert launch(broken, tmp_path / "stopped", "--bad-images", "skip") == 130
    assert launch(broken, tmp_path / "stopped", "--bad-images", "skip", "--resume", "last") == 0
    assert "3 unreadable images were skipped" in capsys.readouterr().out
    lists = [tmp_path / runs / "run" / "version_0" / "bad_images.csv" for runs in ("whole", "stopped")]
    assert lists[0].read_bytes() == lists[1].read_bytes()
    assert_same(tmp_path / "stopped", tmp_path / "whole")


def test_a_finished_run_resumes_to_its_own_end(data, uninterrupted, tmp_path, capsys) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run" / "version_0" / ".history.csv.12345").touch()  # of a driver that was killed as it wrote
    assert launch(data, tmp_path, "--resume", "last") == 0
    assert "after 3 epochs" in capsys.readouterr().out
    assert_same(tmp_path, uninterrupted)
    assert not list(tmp_path.rglob(".*"))


def test_a_run_that_another_process_trains_is_left_alone(data, uninterrupted, tmp_path, capsys) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    other = RunFolder(tmp_path / "run" / "version_0")
    other.claim()
    assert launch(data, tmp_path, "--autoresume") == 2
    assert "is being trained by another process" in capsys.readouterr().err
    other.release()
    assert_same(tmp_path, uninterrupted)


def test_a_rate_that_was_looked_for_since_is_no_run_to_go_on_with(data, uninterrupted, tmp_path, capsys) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    where = ["--data", str(data), "--runs", str(tmp_path), "--data-dir", str(data.parent / "cache")]
    assert orchestrator.find_lr.main([*OPTIONS, *where]) == 0
    capsys.readouterr()
    assert launch(data, tmp_path, "--autoresume") == 0
    assert "version_0" in capsys.readouterr().out
    assert_same(tmp_path, uninterrupted)


def test_nor_is_one_that_was_looked_for_in_vain(data, tmp_path, monkeypatch, capsys) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(orchestrator.fit, "Stop", lambda: StopAfter(7))
        assert launch(data, tmp_path) == 130
    where = ["--data", str(data), "--runs", str(tmp_path), "--data-dir", str(data.parent / "cache")]
    with monkeypatch.context() as patched:
        patched.setattr(Session, "range_test", Mock(side_effect=KeyboardInterrupt))
        assert orchestrator.find_lr.main([*OPTIONS, *where]) == 130
    assert (tmp_path / "run" / "version_1").exists()
    assert launch(data, tmp_path, "--autoresume") == 0
    assert "/version_0\n" in capsys.readouterr().out


def seen(run: Path) -> Any:
    return json.loads((run / "model.json").read_text())["normalize"]


def test_pictures_are_normalised_as_before_though_images_went(data, uninterrupted, tmp_path, monkeypatch) -> None:
    copy, run = Path(shutil.copytree(data, tmp_path / "data")), tmp_path / "run" / "version_0"
    with monkeypatch.context() as patched:
        patched.setattr(orchestrator.fit, "Stop", lambda: StopAfter(7))
        assert launch(copy, tmp_path) == 130
    (copy / "train" / "dark" / "0.png").unlink()
    assert launch(copy, tmp_path, "--resume", "last") == 0
    assert seen(run) == seen(uninterrupted / "run" / "version_0")
    assert launch(copy, tmp_path, "--name", "anew") == 0
    assert seen(run) != seen(tmp_path / "anew" / "version_0"), "or this shows nothing"
    config = run / "config.json"
    config.write_text(config.read_text().replace('"std": [', '"std": 3, "more": ['))
    assert launch(copy, tmp_path, "--resume", "last") == 2


def test_a_run_needs_what_it_started_from_no_more(data, uninterrupted, tmp_path, monkeypatch) -> None:
    "One that was begun before it was noted how pictures are normalised does."
    before = Path(shutil.copytree(uninterrupted / "run", tmp_path / "before"))
    about = json.loads((before / "version_0" / "model.json").read_text())
    about["normalize"] = normalize = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    (before / "version_0" / "model.json").write_text(json.dumps(about))
    with monkeypatch.context() as patched:
        patched.setattr(orchestrator.fit, "Stop", lambda: StopAfter(7))
        assert launch(data, tmp_path, "--init", str(before)) == 130
    run = tmp_path / "run" / "version_0"
    older = Path(shutil.copytree(run, tmp_path / "older"))
    config = json.loads((older / "config.json").read_text())
    del config["found"]["normalize"]
    (older / "config.json").write_text(json.dumps(config))
    assert launch(data, tmp_path, "--init", str(before), "--resume", str(older)) == 0
    shutil.rmtree(before)
    assert launch(data, tmp_path, "--init", str(before), "--resume", "last") == 0
    assert seen(run) == seen(older) == normalize


def test_a_path_is_the_same_however_it_is_written(data, uninterrupted, tmp_path, monkeypatch, capsys) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(data.parent)
    assert launch(Path("data0/../data0"), tmp_path, "--resume", "last") == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "version_0" / "config.json").read_text())
    assert config["data"] == str(data)


def test_all_that_is_other_than_before_is_named_before_data_are_looked_for(uninterrupted, capsys) -> None:
    more = "--resume", str(uninterrupted / "run"), "--lr", "0.5", "--epochs", "4"
    assert launch(Path("s3://no.where"), uninterrupted, *more) == 2
    said = capsys.readouterr().err
    parts = "was begun with --data /", "and with --epochs 3, not 4", "and with --lr 0.1, not 0.5; resume it"
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(("given", "dropped"), [
    ({"fine_tune": 1}, {"schedule": "constant"}), ({"moms": "0.95,0.85,0.95"}, {"momentum": 0.5}),
])  # fmt: skip
def test_what_an_older_run_took_and_dropped_need_not_be_given(tmp_path, given, dropped) -> None:
    "Nor could it be."
    config = Config(data=str(tmp_path), **given)
    before = {**dataclasses.asdict(config), "data": str(tmp_path), **dropped}
    (tmp_path / "config.json").write_text(json.dumps(before))
    _refuse_changes(config, tmp_path)
    with pytest.raises(UsageError, match="--seed"):
        _refuse_changes(dataclasses.replace(config, seed=7), tmp_path)


def test_a_metric_that_is_new_since_is_unknown_in_the_rows_before(monkeypatch) -> None:
    monkeypatch.setitem(METRICS, "top_2", METRICS["accuracy"])
    monkeypatch.setattr(orchestrator.resume, "HISTORY", (*HISTORY, "top_2"))
    saved = dict.fromkeys(HISTORY, 0.5)
    row = orchestrator.resume._row(saved)
    assert math.isnan(row.pop("top_2")) and row == saved


def test_what_a_killed_driver_has_reserved_is_free_before_anything_is_written(
    data, uninterrupted, tmp_path, monkeypatch
) -> None:
    "It may be all the room that there is."
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    reserved = tmp_path / "run" / "version_0" / ".model.safetensors.4194303"
    reserved.write_bytes(bytes(9))
    write, there = RunFolder.write_json, list[bool]()
    monkeypatch.setattr(RunFolder, "write_json", lambda *args: there.append(reserved.exists()) or write(*args))
    assert launch(data, tmp_path, "--resume", "last") == 0
    assert there and not any(there)


def test_a_run_may_be_named_by_the_folder_of_its_versions(data, uninterrupted, tmp_path, capsys) -> None:
    "As for all other commands."
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    assert launch(data, tmp_path / "elsewhere", "--resume", str(tmp_path / "run")) == 0
    assert "going on at step 9" in capsys.readouterr().out
    assert_same(tmp_path, uninterrupted)


def test_what_was_refused_is_no_run_to_go_on_with(data, uninterrupted, tmp_path, capsys) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    (tmp_path / "file").touch()
    assert launch(data, tmp_path, "--cache", str(tmp_path / "file" / "store")) == 2, "once its directory is there"
    assert os.listdir(tmp_path / "run") == ["version_0"]
    assert launch(data, tmp_path, "--resume", "last") == 0
    assert_same(tmp_path, uninterrupted)


def test_a_bad_image_may_be_skipped_from_where_it_stopped_a_run(data, tmp_path, monkeypatch, capsys) -> None:
    "As the error says. The first images, which are looked at before the run begins, are not enough to find it."
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    (copy / "valid" / "dark" / "0.png").write_bytes(b"no picture")
    assert launch(copy, tmp_path) == 1
    assert "--bad-images skip; all completed steps are saved" in capsys.readouterr().err
    assert launch(copy, tmp_path, "--resume", "last", "--bad-images", "skip") == 0
    said = capsys.readouterr().out
    assert "going on at step 3" in said and "1 unreadable image was skipped" in said


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--resume", "last", "--lr", "0.5"], "was begun with --lr 0.1, not 0.5"),
        (["--resume", "last", "--batch-size", "9"], "was begun with --batch-size 8, not 9"),
        (["--resume", "last", "--activations"], "was begun without --activations; resume it"),
        (["--resume", "nowhere"], "--resume nowhere: there is no run in nowhere"),
        (["--resume", "last", "--name", "other"], "--resume last: there is no run in"),
    ],
)
def test_what_cannot_be_resumed_is_refused(more, sentence, data, uninterrupted, capsys) -> None:
    assert launch(data, uninterrupted, *more) == 2
    assert sentence in capsys.readouterr().err


def test_other_data_than_before_is_refused_or_said(data, uninterrupted, tmp_path, capsys) -> None:
    "Also at another place; what the run was begun with is compared, class by class and image by image."
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    copy, settings = tmp_path / "copy", ["--resume", "last", "--data"]
    shutil.copytree(data, copy)
    config = tmp_path / "run" / "version_0" / "config.json"
    config.write_text(config.read_text().replace(f'"data": "{data}"', f'"data": "{copy}"'))
    assert launch(data, tmp_path, *settings, str(copy)) == 0
    assert "warning" not in capsys.readouterr().out, "nothing but the place is another"

    (copy / "train" / "dark" / "0.png").unlink()
    assert launch(data, tmp_path, *settings, str(copy)) == 0
    assert "warning: images or labels are not those that the run was begun with" in capsys.readouterr().out

    more = Path(shutil.copytree(copy / "train" / "light", copy / "train" / "more"))
    assert launch(data, tmp_path, *settings, str(copy)) == 2
    assert "other classes: [] are gone, ['more'] are new; put the data back" in capsys.readouterr().err

    for file in list(more.iterdir()):
        file.rename(copy / "train" / "dark" / f"more {file.name}")
    assert launch(data, tmp_path, *settings, str(copy)) == 2
    assert "was begun with 3 steps an epoch, and the images that there are now make 4" in capsys.readouterr().err


@pytest.mark.parametrize("how", [["--resume", "last"], ["--resume", "{run}"], ["--autoresume"]])
def test_a_run_whose_configuration_is_gone_is_no_reason_to_begin_anew(data, uninterrupted, tmp_path, capsys, how):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "run" / "version_0"
    (run / "config.json").unlink()
    assert launch(data, tmp_path, *(word.format(run=run) for word in how)) == 2
    assert f"{run} has checkpoints, but no config.json" in capsys.readouterr().err
    assert os.listdir(tmp_path / "run") == ["version_0"]


def test_autoresume_begins_where_there_is_nothing(data, uninterrupted, tmp_path) -> None:
    assert launch(data, tmp_path, "--autoresume") == 0
    assert_same(tmp_path, uninterrupted)


def test_a_disk_that_refuses_the_checkpoint_is_a_warning(data, uninterrupted, tmp_path, monkeypatch, capsys) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cluster.checkpoint._write", full)
    assert launch(data, tmp_path) == 0
    assert capsys.readouterr().out.count("No space left on device") == 3
    assert_same(tmp_path, uninterrupted)


def test_a_real_signal_saves_and_says_how_to_go_on(data, tmp_path) -> None:
    "Each to a run of its own; all start at once."
    codes = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
    with ExitStack() as stack:
        runs = {
            number: stack.enter_context(subprocess.Popen(
                [sys.executable, "-m", "orchestrator.launch", *OPTIONS, "--data", f"{data}", "--epochs", "100000",
                 "--data-dir", str(data.parent / "cache"), "--runs", f"{tmp_path / str(code)}"],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            ))
            for number, code in codes.items()
        }  # fmt: skip
        for number, process in runs.items():
            assert process.stdout is not None and process.stderr is not None
            for line in process.stdout:
                if line.startswith("3 "):  # the fourth epoch's row: training is under way
                    process.send_signal(number)
                    break
            process.stdout.read()
            assert process.wait(30) == codes[number]
            assert "go on with the same command and --resume last" in process.stderr.read()
            folder = tmp_path / str(codes[number]) / "run" / "version_0" / "checkpoints"
            assert list(folder.glob("step_*"))
