"Reports of several ranks, merged: sums over sums, never averages of averages."

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.messages import Chunk, Report
from cluster.shards import part
from learner.errors import UserError
from orchestrator.tally import Tally, step_losses

CHUNK = Chunk(True, 0, 0, 0, ({"lr": 0.1}, {"lr": 0.2}))
SECONDS = {"total": 2.0, "data": 0.5, "communication": 1.0}


def report(rank: int, losses: list[float], counts: list[int], right: float = 0, **more) -> Report:
    "What a rank says of two batches."
    sums = {"loss": (sum(losses), float(sum(counts))), "accuracy": (right, float(sum(counts)))}
    return Report(rank, CHUNK, losses, counts, sums, more.pop("seconds", SECONDS), more.pop("bad", []))


def test_a_step_has_one_loss_whatever_the_ranks_had() -> None:
    reports = [report(0, [6.0, 2.0], [3, 1]), report(1, [2.0, 0.0], [1, 0])]
    assert step_losses(reports) == [2.0, 2.0]


def test_a_batch_without_samples_has_no_loss() -> None:
    first, second = step_losses([report(0, [1.0, 0.0], [1, 0]), report(1, [1.0, 0.0], [1, 0])])
    assert first == 1
    assert math.isnan(second)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 10))
def test_means_are_those_of_all_samples(losses: list[float], world_size: int, batch_size: int) -> None:
    tally = Tally()
    for first in range(0, len(losses), batch_size):
        batch = losses[first : first + batch_size]
        reports = []
        for rank in range(world_size):
            mine = batch[part(len(batch), rank, world_size).start : part(len(batch), rank, world_size).stop]
            reports.append(report(rank, [sum(mine), 0.0], [len(mine), 0], right=sum(loss > 50 for loss in mine)))
        tally.add(reports)
    assert tally.count == len(losses)
    means = tally.means()
    assert means["loss"] == pytest.approx(sum(losses) / len(losses))
    assert means["accuracy"] == pytest.approx(sum(loss > 50 for loss in losses) / len(losses))


def test_a_key_that_a_rank_lacks_is_an_error() -> None:
    lacking = report(1, [1.0, 1.0], [1, 1])
    del lacking.sums["accuracy"]
    with pytest.raises(UserError, match="differ in their keys"):
        Tally().add([report(0, [1.0, 1.0], [1, 1]), lacking])


def test_bad_images_are_collected() -> None:
    tally = Tally()
    tally.add([report(0, [1.0, 1.0], [1, 1], bad=[("a", "cut")]), report(1, [1.0, 1.0], [1, 1], bad=[("b", "empty")])])
    tally.add([report(0, [1.0, 1.0], [1, 1]), report(1, [1.0, 1.0], [1, 1], bad=[("c", "text")])])
    assert sorted(tally.bad_images) == [("a", "cut"), ("b", "empty"), ("c", "text")]
    assert tally.count == 8, "what was left out is not counted"


def test_speed_and_waiting() -> None:
    tally = Tally()
    tally.started = time.perf_counter() - 2
    tally.add([report(0, [1.0, 1.0], [6, 4]), report(1, [1.0, 1.0], [5, 5])])
    assert tally.images_per_second() == pytest.approx(20 / 2, rel=0.05)
    assert tally.worker_speed() == {0: 10.0, 1: 10.0}, "while it did not wait for the others"
    assert tally.waiting("data") == 0.25
    assert tally.waiting("communication") == 0.5


def test_nothing_is_divided_by_nothing() -> None:
    tally = Tally()
    assert (tally.count, tally.images_per_second(), tally.waiting("data")) == (0, 0.0, 0.0)
    idle = {"total": 1.0, "data": 0.0, "communication": 1.0}
    tally.add([report(0, [0.0, 0.0], [0, 0], seconds=idle)])
    assert tally.worker_speed() == {0: 0.0}
