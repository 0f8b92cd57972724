"The driver's clock, its passes over the data, and when it stops a run; the gang is a fake one, but for the last test."

import dataclasses
import math
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import orchestrator.driver
from cluster.faults import Failure, WorkersFailed
from cluster.messages import Chunk, Report
from cluster.shards import n_batches
from learner.errors import UserError
from orchestrator.driver import (
    CHEAP,
    SAVE_EVERY,
    Due,
    Pace,
    Place,
    Plan,
    Replicas,
    Stopped,
    fingerprint,
    one_pass,
    train,
)
from orchestrator.tally import Tally

PLAN = Plan(n_train=53, n_valid=29, batch_size=8, epochs=2, schedule="one_cycle", lr=0.4)


class FakeGang:
    "Two ranks that claim to have done what they were told; `loss(step)` is what each step gave."

    world_size = 2

    def __init__(self, plan: Plan, loss=lambda step: 2.0, prints=("aa", "aa"), lost: int = 0) -> None:
        self.plan, self.loss, self.prints, self.lost = plan, loss, list(prints), lost
        self.done: list[Chunk] = []

    def stream(self, chunks: Iterable[Chunk]) -> Iterator[list[Report]]:
        for chunk in chunks:
            self.done.append(chunk)
            yield [self._report(rank, chunk) for rank in range(2)]

    def _report(self, rank: int, chunk: Chunk) -> Report:
        n = self.plan.n_train if chunk.train else self.plan.n_valid
        sizes = [min(self.plan.batch_size, n - b * self.plan.batch_size) for b in numbers(chunk)]
        counts = [size // 2 if rank else size - size // 2 for size in sizes]
        if not chunk.train and chunk.first == 0:
            sizes[0] -= self.lost
        batches = {
            "count": [float(size) for size in sizes],
            "loss": [self.loss(chunk.step + i) * size for i, size in enumerate(sizes)],
            "accuracy": [size / 2 for size in sizes],
        }
        return Report(rank, chunk, batches, sum(counts), {"total": 0.01, "data": 0.0, "communication": 0.0})

    def call(self, method: str, *args: Any) -> list[Any]:
        if method == "checksums":
            return [{"0/weight": "1", "0/bias": one, "1/0.grad_avg": one} for one in self.prints]
        assert method == "fingerprint"
        return self.prints

    def grow(self) -> None:
        pass


class FakeTracker:
    "Keeps what it is told."

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.faults: list[str] = []

    def fault(self, text: str) -> None:
        self.faults.append(text)

    def start(self, *batches: int) -> None:
        self.total = batches[0]

    def chunk(self, reports: list[Report]) -> None:
        pass

    def epoch(self, epoch: int, step: int, lr: float, learned: Any, measured: Any) -> dict[str, Any]:
        self.rows.append({"epoch": epoch, "lr": lr, "train": learned.count, "valid": measured.count})
        return self.rows[-1]


def numbers(chunk: Chunk) -> range:
    "The batches of the epoch that a chunk has."
    return range(chunk.first, chunk.first + len(chunk.hypers))


def chapter(step: int, steps: int, peak: float) -> float:
    "The rate of a step as the book's chapter writes it down."
    pct, pct_start, div_start = step / steps, 0.25, 10.0
    if pct < pct_start:
        pct /= pct_start
        return (1 - pct) * peak / div_start + pct * peak
    pct = (pct - pct_start) / (1 - pct_start)
    return (1 - pct) * peak


@given(st.integers(1, 500), st.integers(1, 60), st.integers(1, 9), st.floats(1e-6, 10), st.randoms())
def test_the_rate_is_a_pure_function_and_the_chapters(n_train, batch_size, epochs, lr, random) -> None:
    plan = dataclasses.replace(PLAN, n_train=n_train, batch_size=batch_size, epochs=epochs, lr=lr)
    steps = list(range(plan.steps))
    rates = [plan.hypers(step)["lr"] for step in steps]
    assert rates == pytest.approx([chapter(step, plan.steps, lr) for step in steps], rel=1e-9, abs=1e-15)
    random.shuffle(steps)
    assert [plan.hypers(step)["lr"] for step in steps] == [rates[step] for step in steps], "in whatever order asked"
    assert 0 < min(rates) <= max(rates) <= lr * (1 + 1e-9)


def test_other_schedules_and_momentum() -> None:
    constant = dataclasses.replace(PLAN, schedule="constant", momentum=0.9)
    assert [constant.hypers(step) for step in (0, 7, 13)] == [{"lr": 0.4, "momentum": 0.9}] * 3
    cosine = dataclasses.replace(PLAN, schedule="cosine")
    for step in range(cosine.steps):
        assert cosine.hypers(step)["lr"] == pytest.approx(0.2 * (1 + math.cos(math.pi * step / 14)))


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 70), st.lists(st.integers(1, 40), min_size=1))
def test_chunks_have_each_batch_once_at_any_pace(n_train, n_valid, batch_size, lengths) -> None:
    plan = dataclasses.replace(PLAN, n_train=n_train, n_valid=n_valid, batch_size=batch_size)
    pace = Pace()
    for epoch in range(plan.epochs):
        for train_set, n in ((True, plan.train_batches), (False, plan.valid_batches)):
            chunks = []
            for number, chunk in enumerate(plan.chunks(train_set, epoch, pace)):
                chunks.append(chunk)
                pace.length = lengths[number % len(lengths)]
            assert [batch for chunk in chunks for batch in numbers(chunk)] == list(range(n))
            assert all((chunk.train, chunk.epoch) == (train_set, epoch) for chunk in chunks)
            for chunk in chunks:
                first = epoch * plan.train_batches + (chunk.first if train_set else plan.train_batches)
                assert chunk.step == first
                wanted = (
                    [plan.hypers(first + i) for i in range(len(chunk.hypers))]
                    if train_set
                    else [{}] * len(chunk.hypers)
                )
                assert list(chunk.hypers) == wanted


@given(st.lists(st.floats(1e-7, 100), min_size=1, max_size=20))
def test_pace_is_bounded(times: list[float]) -> None:
    pace, chunk = Pace(), Chunk(True, 0, 0, 0, ({"lr": 1.0},))
    for seconds in times:
        before = pace.length
        pace.learn([Report(0, chunk, {}, 1, {"total": seconds})])
        assert 1 <= pace.length <= min(1000, max(1, 4 * before))
        assert pace.length == 1 or pace.length * seconds <= pace.seconds * 1.5, "or Ctrl-C takes too long"


def test_a_run_passes_over_everything() -> None:
    gang, tracker = FakeGang(PLAN), FakeTracker()
    train(PLAN, gang, tracker)  # type: ignore[arg-type]
    assert tracker.total == 2 * (7 + 4)
    assert [(row["epoch"], row["train"], row["valid"]) for row in tracker.rows] == [(0, 53, 29), (1, 53, 29)]
    assert tracker.rows[-1]["lr"] == PLAN.hypers(13)["lr"], "that of the epoch's last step"
    order = [(chunk.epoch, not chunk.train) for chunk in gang.done]
    assert order == sorted(order), "each epoch trains, then validates"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("step", [0, 9, 13])
def test_a_loss_that_is_no_number_ends_the_run(loss: float, step: int) -> None:
    gang = FakeGang(PLAN, loss=lambda s: loss if s == step else 1.0)
    with pytest.raises(Stopped) as caught:
        train(PLAN, gang, FakeTracker())  # type: ignore[arg-type]
    rate, cause = PLAN.hypers(step)["lr"], str(caught.value.cause)
    assert f"the loss became {loss} at step {step} (learning rate {rate:g})" in cause
    assert "--lr" in cause
    assert max(chunk.step for chunk in gang.done) <= step


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_validation_loss_that_is_no_number_is_told(loss: float) -> None:
    "The weights are finite, so training goes on; every sample has been counted."
    gang, tracker = FakeGang(PLAN), FakeTracker()
    gang.loss = lambda step: loss if step == 7 and not gang.done[-1].train else 2.0
    train(PLAN, gang, tracker)  # type: ignore[arg-type]
    assert [row["valid"] for row in tracker.rows] == [29, 29]
    assert tracker.faults == [f"the validation of epoch 0 came to a loss of {loss}, no finite number; training goes on"]


@pytest.mark.parametrize("train_set", [True, False])
def test_a_set_of_which_nothing_can_be_read_ends_the_run_where_it_stands(train_set: bool) -> None:
    tally, n = Tally(), PLAN.n_train if train_set else PLAN.n_valid
    tally.bad_images = [("file", "cut")] * n
    place = Place(1, n_batches(n, PLAN.batch_size), tally)
    with pytest.raises(Stopped) as caught:
        one_pass(PLAN, FakeGang(PLAN), FakeTracker(), train_set, place, Pace())  # type: ignore[arg-type]
    assert caught.value.place == place
    assert f"no image of the {'training' if train_set else 'validation'} set" in str(caught.value.cause)


@pytest.mark.parametrize("lost", [1, -1])
def test_a_lost_or_doubled_sample_is_noticed(lost: int) -> None:
    with pytest.raises(UserError, match=f"counted {29 - lost} samples instead of 29"):
        one_pass(PLAN, FakeGang(PLAN, lost=lost), FakeTracker(), False, Place(), Pace())  # type: ignore[arg-type]


def test_replicas_that_differ_end_the_run() -> None:
    gang = FakeGang(PLAN)
    gang.prints = ["aa", "bb", "aa", "cc"]
    with pytest.raises(Replicas, match=r"after epoch 0, first in bias: ranks \[1, 3\]"):
        train(PLAN, gang, FakeTracker())  # type: ignore[arg-type]
    gang.prints = ["bb", "aa"]
    with pytest.raises(Replicas, match=r"nobody can tell which ranks are wrong: \['bb', 'aa'\]"):
        fingerprint(gang, "now")  # type: ignore[arg-type]
    assert fingerprint(FakeGang(PLAN), "now") == "aa"  # type: ignore[arg-type]


def test_a_save_is_due_after_a_while_but_never_without_a_chunk_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator.driver, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(Pace, "seconds", 0.0)
    gang, tracker, places = FakeGang(PLAN), FakeTracker(), list[Place]()
    train(PLAN, gang, tracker, on_pause=places.append)  # type: ignore[arg-type]
    firsts = [(chunk.epoch, chunk.first) for chunk in gang.done if chunk.train and chunk.first]
    assert [(place.epoch, place.batch) for place in places] == firsts and len(places) > 4
    assert [(row["train"], row["valid"]) for row in tracker.rows] == [(53, 29)] * 2, "each sample counts once"
    monkeypatch.setattr(orchestrator.driver, "SAVE_EVERY", 3600.0)
    train(PLAN, FakeGang(PLAN), FakeTracker(), on_pause=places.append)  # type: ignore[arg-type]
    assert len(places) == len(firsts), "not yet"


def test_saves_that_take_long_come_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(orchestrator.driver, "time", SimpleNamespace(monotonic=lambda: now[0]))
    due = Due()

    def wait() -> float:
        began = now[0]
        while not due():
            now[0] += 1
        return now[0] - began

    assert wait() == SAVE_EVERY
    for pause, seconds in ((CHEAP / 2, SAVE_EVERY), (10 * CHEAP, 10 * SAVE_EVERY)):
        due.saved(pause)
        assert wait() == seconds and pause <= 0.01 * seconds


def test_workers_that_fail_in_a_pause_leave_the_run_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(place: Place) -> None:
        raise WorkersFailed([Failure(1, "host", 7, "died", "gone")])

    monkeypatch.setattr(orchestrator.driver, "SAVE_EVERY", 0.0)
    with pytest.raises(Stopped) as caught:
        train(PLAN, FakeGang(PLAN), FakeTracker(), on_pause=fail)  # type: ignore[arg-type]
    assert (caught.value.place.epoch, caught.value.place.batch) == (0, 1)
    assert caught.value.place.tally is not None and caught.value.place.tally.count == 8
    assert isinstance(caught.value.cause, WorkersFailed)


def test_one_worker_has_none_to_differ_from() -> None:
    gang, tracker = FakeGang(PLAN, prints=()), FakeTracker()
    gang.world_size = 1
    train(PLAN, gang, tracker)  # type: ignore[arg-type]
    assert len(tracker.rows) == PLAN.epochs


def test_workers_that_fail_for_good_between_passes_leave_the_run_where_it_stands() -> None:
    def fail(*_: object) -> bool:
        raise WorkersFailed([Failure(1, "host", 7, "died", "gone")])

    growing, gang = FakeGang(PLAN), FakeGang(PLAN)
    growing.grow = fail  # type: ignore[method-assign, assignment]
    for stopping, on_epoch, place in ((growing, lambda row: True, Place(0)), (gang, fail, Place(1))):
        with pytest.raises(Stopped) as caught:
            train(PLAN, stopping, FakeTracker(), on_epoch)  # type: ignore[arg-type]
        assert caught.value.place == place and isinstance(caught.value.cause, WorkersFailed)


def test_fine_tuning_has_fastais_rates() -> None:
    "fine_tune(4, base_lr, freeze_epochs=1): the head up to base_lr, then all up to half of it, the body a hundredth."
    plan = Plan(n_train=40, n_valid=8, batch_size=8, epochs=5, schedule="one_cycle", lr=0.02, frozen_epochs=1)
    frozen, thawed = [plan.hypers(s) for s in range(5)], [plan.hypers(s) for s in range(5, 25)]
    assert all(hypers["frozen"] for hypers in frozen) and not any("frozen" in hypers for hypers in thawed)
    assert all(hypers["body_lr"] == pytest.approx(hypers["lr"] / 10) for hypers in frozen), "its BatchNorm"
    assert frozen[0]["lr"] == pytest.approx(0.02 / 25) and frozen[-1]["lr"] < 0.02
    assert [hypers["lr"] for hypers in frozen] == sorted(hypers["lr"] for hypers in frozen)
    assert max(hypers["lr"] for hypers in thawed) == pytest.approx(0.01)
    assert thawed[0]["lr"] == pytest.approx(0.01 / 5) and thawed.index(max(thawed, key=lambda h: h["lr"])) == 6
    assert all(hypers["body_lr"] == pytest.approx(hypers["lr"] / 100) for hypers in thawed)


def test_fine_tuning_has_a_cycle_of_momentum_for_each_of_its_parts() -> None:
    plan = Plan(n_train=40, n_valid=8, batch_size=8, epochs=5, schedule="one_cycle", lr=0.02, frozen_epochs=1,
                momentums=(0.95, 0.85, 0.9))  # fmt: skip
    momentums = [plan.hypers(step)["momentum"] for step in range(25)]
    assert momentums[0] == momentums[5] == 0.95
    assert momentums[:5] == sorted(momentums[:5], reverse=True)
    assert momentums[5 + 6] == pytest.approx(0.85) and momentums[-1] == pytest.approx(0.9, abs=0.01)


def test_the_body_has_a_share_of_every_rate_also_in_the_range_test() -> None:
    plan = dataclasses.replace(PLAN, body_share=0.01)
    for step in range(plan.steps):
        hypers = plan.hypers(step)
        assert hypers["body_lr"] == pytest.approx(hypers["lr"] / 100)
        assert hypers["lr"] == PLAN.hypers(step)["lr"]
    assert plan.rates(0.5) == {"lr": 0.5, "body_lr": 0.005} and PLAN.rates(0.5) == {"lr": 0.5}


def test_two_workers_that_pause_for_saves_do_what_they_do_without(ray_gang: Any, job: Any, monkeypatch: Any) -> None:
    job = dataclasses.replace(job, arch="simple_cnn_bn", momentum=0.9, ema=0.9)
    plan, found = dataclasses.replace(PLAN, momentum=0.9, lr=0.05), list[Any]()
    monkeypatch.setattr(Pace, "seconds", 0.0)
    for every in (3600.0, 0.0):
        monkeypatch.setattr(orchestrator.driver, "SAVE_EVERY", every)
        tallies, places = list[Tally](), list[Place]()
        tracker: Any = FakeTracker()
        tracker.epoch = lambda *args: tallies.extend(args[3:])  # noqa: B023
        ray_gang.start(job, 2)

        def save(place: Place) -> None:
            places.append(place)  # noqa: B023
            ray_gang.call_first("snapshot")

        train(plan, ray_gang, tracker, on_pause=save)
        assert len(places) == (0 if every else 12)
        found.append((ray_gang.call("fingerprint"), [tally.means() for tally in tallies]))
    assert found[0] == found[1]
