"The parts of a gang that need no Ray: seats, and the gang in this process."

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.gang import LocalGang, Seat
from cluster.messages import Chunk, Job
from learner.data.files import Labelled
from learner.data.loader import usable_cores
from learner.errors import UserError


@given(st.integers(1, 200))
def test_threads_share_the_processors(workers: int) -> None:
    threads = Seat(0, workers, 0, workers).threads
    assert threads >= 1
    assert threads == 1 or threads * workers <= usable_cores()


def test_a_seat_in_words() -> None:
    seat = Seat(5, 8, 1, 4)
    assert seat.environment() == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert str(seat).startswith("rank 5 of 8 (pid ")


def test_a_local_gang_raises_what_was_raised(local_gang: Callable[[Job], LocalGang], job: Job) -> None:
    gang = local_gang(replace(job, train=Labelled(("/no/such.jpg",), (0,))))
    with pytest.raises(UserError, match=r"/no/such.jpg is no readable image: No such file or directory.*--bad-images"):
        list(gang.stream([Chunk(True, 0, 0, 0, ({"lr": 0.1},))]))
    with pytest.raises(AttributeError):
        gang.call("no_such_method")


def test_a_local_gang_sits_like_rank_0(local_gang: Callable[[Job], LocalGang], job: Job, tmp_path) -> None:
    gang = local_gang(job)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    assert [os.environ[name] for name in names] == ["0", "1", "0", "1"]
    assert torch.get_num_threads() == usable_cores()
    assert gang.world_size == 1
    assert "rank 0 of 1" in (tmp_path / "rank_0.log").read_text()
    assert gang.call("fingerprint") == [gang.call_first("fingerprint")]
