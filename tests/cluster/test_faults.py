"Failures as text, and what is to be done about them."

import os
import random

import pytest

from cluster.comms import PeerLost
from cluster.faults import Failure, WorkersFailed
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
