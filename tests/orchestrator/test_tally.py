"Reports of several ranks, merged: sums over sums, never averages of averages."

import math
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.messages import Chunk, Report
from cluster.shards import part
from orchestrator.tally import Tally

CHUNK = Chunk(True, 0, 0, 0, ({"lr": 0.1}, {"lr": 0.2}))
SECONDS = {"total": 2.0, "data": 0.5, "communication": 1.0}


def report(rank: int, losses: list[float], counts: list[int], right: float = 0, **more) -> Report:
    "What a rank says of two batches: what they came to for all, and what was its own."
    batches = {"count": [float(n) for n in counts], "loss": losses, "accuracy": [right, 0.0]}
    chunk = more.pop("chunk", CHUNK)
    return Report(rank, chunk, batches, more.pop("own", sum(counts)), more.pop("seconds", SECONDS), more.pop("bad", []))


def test_a_batch_without_samples_has_no_loss() -> None:
    first, second = report(0, [6.0, 0.0], [3, 0]).losses
    assert first == 2
    assert math.isnan(second)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 10))
def test_means_are_those_of_all_samples(losses: list[float], world_size: int, batch_size: int) -> None:
    tally = Tally()
    for first in range(0, len(losses), batch_size):
        batch = losses[first : first + batch_size]
        right = sum(loss > 50 for loss in batch)
        shares = [part(len(batch), rank, world_size) for rank in range(world_size)]
        tally.add(
            [report(rank, [sum(batch), 0.0], [len(batch), 0], right, own=len(own)) for rank, own in enumerate(shares)]
        )
    assert tally.count == len(losses)
    means = tally.means()
    assert means["loss"] == pytest.approx(sum(losses) / len(losses))
    assert means["accuracy"] == pytest.approx(sum(loss > 50 for loss in losses) / len(losses))
    assert sum(tally.samples.values()) == len(losses)


@pytest.mark.parametrize("train", [True, False])
def test_a_validation_hides_no_loss(train: bool) -> None:
    "A step without a finite loss was skipped, and counts for nothing; a batch of a validation was not."
    tally = Tally()
    tally.add([report(0, [6.0, math.nan], [3, 5], right=2, chunk=replace(CHUNK, train=train))])
    assert (tally.count, tally.spoiled) == ((3, 5) if train else (8, 0))
    means = tally.means()
    assert math.isnan(means["loss"]) != train
    assert means["accuracy"] == 2 / tally.count


def test_bad_images_are_collected() -> None:
    tally = Tally()
    tally.add([report(0, [1.0, 1.0], [1, 1], bad=[("a", "cut")]), report(1, [1.0, 1.0], [1, 1], bad=[("b", "empty")])])
    tally.add([report(0, [1.0, 1.0], [1, 1]), report(1, [1.0, 1.0], [1, 1], bad=[("c", "text")])])
    assert sorted(tally.bad_images) == [("a", "cut"), ("b", "empty"), ("c", "text")]
    assert tally.count == 4, "what was left out is not counted"


def test_speed_and_waiting() -> None:
    tally = Tally()
    tally.started = time.perf_counter() - 2
    tally.add([report(0, [1.0, 1.0], [10, 10], own=10), report(1, [1.0, 1.0], [10, 10], own=10)])
    assert tally.images_per_second() == pytest.approx(20 / 2, rel=0.05)
    assert tally.worker_speed() == {0: 10.0, 1: 10.0}, "while it did not wait for the others"
    assert tally.waiting("data") == 0.25
    assert tally.waiting("communication") == 0.5


def test_who_compiles_is_not_slow() -> None:
    tally = Tally()
    compiling = {"total": 32.0, "data": 0.5, "communication": 1.0, "compiling": 30.0}
    tally.add([report(rank, [1.0, 1.0], [10, 10], own=10, seconds=SECONDS if rank else compiling) for rank in range(2)])
    assert tally.worker_speed() == {0: 10.0, 1: 10.0}
    assert tally.longest("compiling") == 30.0
    assert tally.slow() == {}


def test_nothing_is_divided_by_nothing() -> None:
    tally = Tally()
    assert (tally.count, tally.images_per_second(), tally.waiting("data")) == (0, 0.0, 0.0)
    idle = {"total": 1.0, "data": 0.0, "communication": 1.0}
    tally.add([report(0, [0.0, 0.0], [0, 0], seconds=idle)])
    assert tally.worker_speed() == {0: 0.0}


def test_a_pause_is_not_counted() -> None:
    before = Tally()
    before.started -= 100
    before.add([report(0, [6.0, 2.0], [3, 5])])
    after = Tally.of_json(before.as_json())
    after.started -= 1000  # workers that start
    after.go_on().add([report(0, [6.0, 2.0], [3, 5])])
    assert 100 <= before.elapsed <= after.elapsed < 101 and after.count == 16


def test_a_slow_rank_is_known() -> None:
    tally = Tally()
    crawling = {"total": 12.0, "data": 0.5, "communication": 1.0}
    ranks = [
        report(rank, [1.0, 1.0], [15, 15], own=10, seconds=crawling if rank == 2 else SECONDS) for rank in range(3)
    ]
    tally.add(ranks)
    assert tally.slow() == {2: pytest.approx(11.0)}
    assert tally.slow(factor=12.0) == {}
    assert tally.slow(seconds=9.9).keys() == {2} and tally.slow(seconds=10.1) == {}
