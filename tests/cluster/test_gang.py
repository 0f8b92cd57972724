"The parts of a gang that need no Ray: failures as text, seats, the pipeline of chunks, the gang in this process."

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.comms import PeerLost
from cluster.gang import IN_FLIGHT, Failure, LocalGang, Seat, WorkersFailed, pipelined
from cluster.messages import Chunk, Job
from learner.data.files import Labelled
from learner.data.loader import usable_cores
from learner.errors import UserError


def failure(rank: int, kind: str) -> Failure:
    "As rank `rank` on one host would report it."
    return Failure(rank, "node7", 100 + rank, kind, f"{kind} of {rank}", "Traceback ...\nValueError: what")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (UserError("the file x is empty"), "user", "the file x is empty"),
        (PeerLost("rank 1 lost touch"), "peer", "PeerLost: rank 1 lost touch"),
        (KeyError("weights"), "error", "KeyError: 'weights'"),
    ],
)
def test_an_error_becomes_text(error: Exception, kind: str, message: str) -> None:
    try:
        raise error
    except Exception as caught:
        made = Failure.of(3, caught)
    assert (made.rank, made.pid, made.kind, made.message) == (3, os.getpid(), kind, message)
    assert made.trace.startswith("Traceback (most recent call last)")
    assert ("Traceback" in str(made)) == (kind == "error")


def test_the_root_cause_comes_first() -> None:
    failures = [failure(0, "peer"), failure(3, "error"), failure(1, "died"), failure(2, "user"), failure(4, "peer")]
    for _ in range(5):
        random.shuffle(failures)
        failed = WorkersFailed(failures)
        assert [one.rank for one in failed.failures] == [2, 3, 1, 0, 4]
        text = str(failed)
        assert text.startswith("a worker failed: rank 2 (host node7, pid 102): user of 2\n")
        assert text.index("rank 3") < text.index("ValueError: what") < text.index("rank 1")
        assert text.endswith("(2 more lost touch with a failed worker)")
        assert "rank 0" not in text


def test_peers_alone_are_not_hidden() -> None:
    text = str(WorkersFailed([failure(1, "peer"), failure(0, "peer")]))
    assert text.startswith("a worker failed: rank 0 (host node7, pid 100): peer of 0")
    assert "1 more" in text


@given(st.integers(1, 200))
def test_threads_share_the_processors(workers: int) -> None:
    threads = Seat(0, workers, 0, workers).threads
    assert threads >= 1
    assert threads == 1 or threads * workers <= usable_cores()


def test_a_seat_in_words() -> None:
    seat = Seat(5, 8, 1, 4)
    assert seat.environment() == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert str(seat).startswith("rank 5 of 8 (pid ")


def chunk_numbers(n: int, log: list[str]) -> Iterator[Any]:
    for number in range(n):
        log.append(f"made {number}")
        yield number


@given(st.integers(0, 12))
def test_chunks_stay_in_flight_and_in_order(n: int) -> None:
    log: list[str] = []
    out: list[int] = []
    most = 0

    def send(number: Any) -> int:
        nonlocal most
        out.append(number)
        most = max(most, len(out))
        return number

    def receive(number: int) -> Any:
        out.remove(number)
        return number

    assert list(pipelined(send, receive, chunk_numbers(n, log))) == list(range(n))
    assert most == min(n, IN_FLIGHT)


def test_a_pipeline_is_lazy_and_is_drained_when_left() -> None:
    log: list[str] = []
    stream = pipelined(
        lambda number: log.append(f"sent {number}") or number,  # type: ignore[func-returns-value]
        lambda number: log.append(f"received {number}") or number,  # type: ignore[func-returns-value]
        chunk_numbers(100, log),
    )
    assert next(stream) == 0
    stream.close()
    assert log == ["made 0", "sent 0", "made 1", "sent 1", "received 0", "received 1"], "no more than was needed"


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
