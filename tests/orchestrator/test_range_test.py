"The range test across the gang: what one process finds, one decision to stop, and not a trace left."

import csv
import dataclasses
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing import event_accumulator

from cluster.gang import LocalGang
from cluster.messages import Chunk, Job, Report
from cluster.ray_gang import RayGang
from learner.errors import UserError
from learner.lr_range import RangeTest
from orchestrator.driver import Pace, Plan
from orchestrator.find_lr import main
from orchestrator.range_test import range_test, suggestion


def plan_of(job: Job) -> Plan:
    "The clock of a run of this job."
    return Plan(n_train=len(job.train), n_valid=len(job.valid), batch_size=job.batch_size, epochs=1,
                schedule="one_cycle", lr=0.1, momentum=job.momentum or 0.0)  # fmt: skip


@pytest.fixture
def found(job: Job, monkeypatch: pytest.MonkeyPatch) -> Job:
    "A job with all that a finder must put back, and half the usual number of rates."
    monkeypatch.setattr("orchestrator.range_test.RangeTest", partial(RangeTest, n_steps=50))
    return replace(job, arch="simple_cnn_bn", momentum=0.9, augment="crop", presize=27)


def test_a_gang_finds_what_one_process_finds(
    ray_gang: RayGang, local_gang: Callable[[Job], LocalGang], found: Job
) -> None:
    one = range_test(plan_of(found), local_gang(found))
    ray_gang.start(found, 2)
    many = range_test(plan_of(found), ray_gang)
    sane = sum(lr < 0.01 for lr in one.lrs)
    assert sane > 20
    assert many.losses[:sane] == pytest.approx(one.losses[:sane], rel=1e-4)
    assert len(many.losses) == pytest.approx(len(one.losses), abs=3), "where it diverges, rounding grows too"
    assert suggestion(many) == pytest.approx(suggestion(one), rel=1e-9)


def test_accumulated_parts_give_the_curve_of_the_whole_batch(
    ray_gang: RayGang, local_gang: Callable[[Job], LocalGang], found: Job
) -> None:
    plain = replace(found, arch="simple_cnn")  # BatchNorm's statistics are a part's
    whole = range_test(plan_of(plain), local_gang(plain))
    ray_gang.start(replace(plain, accumulate=3), 2)
    parts = range_test(plan_of(plain), ray_gang)
    sane = sum(lr < 0.01 for lr in whole.lrs)
    assert parts.losses[:sane] == pytest.approx(whole.losses[:sane], rel=1e-4)


def train_after(gang: Any, plan: Plan) -> list[float]:
    "The losses of an epoch."
    return [loss for reports in gang.stream(plan.chunks(True, 0, Pace())) for loss in reports[0].losses]


def test_no_trace_is_left(ray_gang: RayGang, found: Job) -> None:
    plan = plan_of(found)
    ray_gang.start(found, 3)
    fresh, losses = ray_gang.call("fingerprint"), train_after(ray_gang, plan)
    ends = ray_gang.call("fingerprint")
    ray_gang.start(found, 3)
    test = range_test(plan, ray_gang)
    assert test.diverged or len(test.losses) == len(test.planned)
    assert ray_gang.call("fingerprint") == fresh
    assert train_after(ray_gang, plan) == losses, "bit for bit"
    assert ray_gang.call("fingerprint") == ends


class Scripted:
    "A gang of two whose losses are given; its ranks forget nothing unless told to."

    world_size = 2

    def __init__(self, losses: Callable[[float], float], forgets: bool = True) -> None:
        self.losses, self.forgets = losses, forgets
        self.steps, self.calls, self.state = 0, list[str](), "fresh"

    def stream(self, chunks: Iterable[Chunk]) -> Iterator[list[Report]]:
        for chunk in chunks:
            self.steps, self.state = self.steps + len(chunk.hypers), "changed"
            losses = [8 * self.losses(hypers["lr"]) for hypers in chunk.hypers]
            batches = {"count": [8.0] * len(losses), "loss": losses}
            yield [Report(rank, chunk, batches, 4 * len(losses), {}) for rank in range(2)]

    def call(self, method: str, *args: Any) -> list[Any]:
        self.calls.append(method)
        if method == "load" and self.forgets:
            self.state = args[0]
        return [self.state] * 2

    def call_first(self, method: str, *args: Any) -> Any:
        return self.call(method, *args)[0]


PLAN = Plan(n_train=53, n_valid=29, batch_size=8, epochs=1, schedule="one_cycle", lr=0.0)


def valley(lr: float) -> float:
    "A loss that is least at a rate of 0.3."
    return 1 + (math.log10(lr) - math.log10(0.3)) ** 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e9])
def test_one_decision_stops_all(bad: float) -> None:
    gang = Scripted(lambda lr: valley(lr) if lr < 1 else bad)
    test = range_test(PLAN, gang)  # type: ignore[arg-type]
    first_bad = next(i for i, lr in enumerate(test.planned) if lr >= 1)
    assert test.diverged
    assert len(test.losses) == first_bad + (bad == 1e9)
    assert gang.steps <= first_bad + 1 + 2 * 5, "no more than what was in flight"
    assert gang.calls == ["fingerprint", "snapshot", "load", "fingerprint"]
    assert gang.state == "fresh"


def test_all_rates_are_tried_if_nothing_diverges() -> None:
    gang = Scripted(valley)
    test = range_test(PLAN, gang)  # type: ignore[arg-type]
    assert gang.steps == len(test.losses) == len(test.planned)
    least = test.lrs[test.smoothed.index(min(test.smoothed))]
    assert suggestion(test) == pytest.approx(least / 10)


def test_batches_without_a_readable_image_neither_end_the_test_nor_move_its_rates(monkeypatch) -> None:
    gang, unread = Scripted(valley), (0, 1, *range(7, 100, 3))
    stream = gang.stream

    def unreadable(chunks: Iterable[Chunk]) -> Iterator[list[Report]]:
        for reports in stream(chunks):
            for i in range(len(reports[0].counts)):
                if reports[0].chunk.step + i in unread:
                    reports[0].batches["count"][i] = reports[0].batches["loss"][i] = 0.0  # which is no mean
            yield reports

    gang.stream = unreadable  # type: ignore[method-assign]
    test, whole = (range_test(PLAN, one) for one in (gang, Scripted(valley)))  # type: ignore[arg-type]
    assert not test.diverged and test.lrs == whole.lrs
    known = [2, 2, *(i - 1 if i in unread else i for i in range(2, 100))]
    assert test.losses == [whole.losses[i] for i in known]


def test_a_trace_that_was_left_is_an_error() -> None:
    with pytest.raises(UserError, match="did not restore"):
        range_test(PLAN, Scripted(valley, forgets=False))  # type: ignore[arg-type]


def test_no_falling_loss_is_said_so() -> None:
    test = RangeTest()
    for step in range(len(test.planned)):
        test.add(1.0 + step)
    with pytest.raises(UserError, match="--lr RATE"):
        suggestion(test)
    nothing = range_test(PLAN, Scripted(lambda lr: math.nan))  # type: ignore[arg-type]
    assert nothing.losses == []
    with pytest.raises(UserError, match="--lr RATE"):
        suggestion(nothing)


def test_momentum_is_on_during_the_test() -> None:
    gang, seen = Scripted(valley), list[dict[str, float]]()
    stream = gang.stream

    def spy(chunks: Iterable[Chunk]) -> Iterator[list[Report]]:
        for reports in stream(chunks):
            seen.extend(reports[0].chunk.hypers)
            yield reports

    gang.stream = spy  # type: ignore[method-assign]
    range_test(dataclasses.replace(PLAN, momentum=0.9), gang)  # type: ignore[arg-type]
    assert all(hypers["momentum"] == 0.9 for hypers in seen)


def test_the_command_leaves_its_suggestions_and_the_curve_in_three_forms(small, tmp_path: Path, capsys) -> None:
    assert main([*small, "--local", "--name", "found", "--batch-size", "27", "--arch", "linear"]) == 0
    said = dict(
        line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.split()[:1] and line[0] != " "
    )
    folder = tmp_path / "runs/found/version_0"
    header, *rows = list(csv.reader((folder / "lr_finder.csv").read_text().splitlines()))
    assert header == ["lr", "loss", "smoothed"] and len(rows) > 20
    assert float(rows[0][0]) == pytest.approx(1e-6) and all(math.isfinite(float(loss)) for _, loss, _ in rows)
    assert said.keys() >= {"minimum", "steepest", "valley", "slide"}
    least = min(rows[10:], key=lambda row: float(row[2]))
    assert float(said["minimum"]) == pytest.approx(float(least[0]) / 10, rel=0.01)
    assert (folder / "lr_finder.png").read_bytes().startswith(b"\x89PNG")
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    assert "lr_finder" in events.Reload().Tags()["images"]
    assert not (folder / "model.json").exists() and not list((folder / "checkpoints").glob("*"))


def test_a_trained_run_is_not_touched(small, trained: Path, tmp_path: Path, capsys) -> None:
    "Not where it is named, nor where a file of options says --autoresume."
    run = Path(shutil.copytree(trained, tmp_path / "runs/run/version_0"))
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    options = [*small, "--local", "--name", "run", "--arch", "linear"]
    assert main([*options, "--resume", "last"]) == 2
    assert "--resume last: a range test goes on with no run" in capsys.readouterr().err
    assert main([*options, "--autoresume"]) == 0
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    assert (tmp_path / "runs/run/version_1/lr_finder.csv").exists()
