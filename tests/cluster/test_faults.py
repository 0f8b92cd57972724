"Failures as text, and what is to be done about them."

import os
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.comms import PeerLost
from cluster.faults import (
    Failure,
    Tolerance,
    WorkersFailed,
    agree,
    deadlocked,
    hang_limit,
    holders,
    hung,
    unfit,
    verdict,
)
from cluster.messages import Chunk, Report
from cluster.pulse import PERIOD, Life, Sign
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
        (torch.OutOfMemoryError("9 GiB"), "memory", "OutOfMemoryError: 9 GiB"),
        (MemoryError("9 GiB"), "memory", "MemoryError: 9 GiB"),
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


def chunk(first: int, n: int, train: bool = True) -> Chunk:
    "Batches `first` to `first + n` of the first epoch."
    return Chunk(train, 0, first, first if train else 7, ({"lr": 0.1},) * n)


def report(rank: int, whole: Chunk, done: int) -> Report:
    "What a rank says that has done so many batches of a chunk."
    part = replace(whole, hypers=whole.hypers[:done])
    return Report(rank, part, {"count": [8.0] * done, "loss": [1.0] * done}, 4, {})


def result(rank: int, whole: Chunk, done: int | None) -> Report | Failure:
    "All of a chunk; or some of it, and then a peer was lost; or None: the rank died."
    if done is None:
        return failure(rank, "died")
    made = report(rank, whole, done)
    return made if done == len(whole.hypers) else replace(failure(rank, "peer"), report=made)


@st.composite
def accidents(draw: st.DrawFn) -> list[tuple[Chunk, list[Report | Failure]]]:
    "Two training chunks under way, and survivors that got equally far, or one step further."
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
    common = draw(st.integers(0, sum(lengths)))
    ranks = [draw(st.sampled_from(["dead", "same", "ahead"])) for _ in range(draw(st.integers(2, 5)))]
    sent, first = [], 0
    for length in lengths:
        whole, results = chunk(first, length), list[Report | Failure]()
        for rank, kind in enumerate(ranks):
            steps = min(sum(lengths), common + (kind == "ahead"))
            results.append(result(rank, whole, None if kind == "dead" else min(length, max(0, steps - first))))
        sent.append((whole, results))
        first += length
    return sent


@given(accidents())
def test_survivors_agree_on_the_last_step_that_one_completed(sent: list[tuple[Chunk, list[Report | Failure]]]) -> None:
    found = agree(sent)
    ranks, total = len(sent[0][1]), sum(len(whole.hypers) for whole, _ in sent)
    alive = [rank for rank in range(ranks) if not _died(sent[0][1][rank])]
    steps = {rank: sum(_done(results[rank]) for _, results in sent) for rank in alive}
    assert found.lead == [rank for rank in alive if steps[rank] == max(steps.values())]
    done = sum(len(reports[0].chunk.hypers) for reports, _ in found.done)
    todo = sum(len(one.hypers) for one in found.rest)
    if not found.lead:
        assert done == 0
    assert done + todo == total, "each step is done, or still to do"
    numbers = [reports[0].chunk.first + i for reports, _ in found.done for i in range(len(reports[0].chunk.hypers))]
    numbers += [one.first + i for one in found.rest for i in range(len(one.hypers))]
    assert numbers == list(range(total)), "in order, and none twice"
    assert all(one.step == one.first for one in found.rest)
    for reports, lost in found.done:
        assert sorted([*(one.rank for one in reports), *lost]) == list(range(ranks))


def _died(one: Report | Failure) -> bool:
    return isinstance(one, Failure) and one.kind == "died"


def _done(one: Report | Failure) -> int:
    made = one if isinstance(one, Report) else one.report
    return len(made.chunk.hypers) if made else 0


ANSWERS = st.lists(st.tuples(st.sampled_from(["fine", "peer", "error", "died"]), st.booleans()), min_size=3, max_size=3)


@given(st.lists(ANSWERS, min_size=1, max_size=2))
def test_who_lives_on_holds_the_state_and_else_who_failed_outside_of_an_update(asked) -> None:
    answers = [
        [
            None if kind == "fine" else replace(failure(rank, kind), whole=whole)
            for rank, (kind, whole) in enumerate(one)
        ]
        for one in asked
    ]
    living = [rank for rank in range(3) if all(one[rank][0] in ("fine", "peer") for one in asked)]
    whole = [rank for rank in range(3) if all(one[rank][0] in ("fine", "peer") or one[rank][1] for one in asked)]
    assert holders(answers) == (living or whole)


def test_an_error_of_all_ranks_leaves_them_where_they_are() -> None:
    "Rank 0 in its update, 1 before the second step, and 2 before the third; 3 died. The next chunk came to nothing."
    first, second = chunk(0, 3), chunk(3, 2)
    told = [replace(failure(rank, "error"), report=report(rank, first, rank), whole=rank > 0) for rank in range(3)]
    off = [failure(rank, "peer") for rank in range(3)]
    found = agree([(first, [*told, failure(3, "died")]), (second, [*off, failure(3, "died")])])
    assert found.lead == [2]
    assert [(one.first, len(one.hypers)) for one in found.rest] == [(2, 1), (3, 2)]
    assert [(len(reports), lost) for reports, lost in found.done] == [(1, [0, 1, 3])]


def test_a_validation_that_one_rank_did_not_report_is_done_again() -> None:
    first, second = chunk(0, 2, train=False), chunk(2, 2, train=False)
    found = agree(
        [(first, [report(0, first, 2), report(1, first, 2)]), (second, [report(0, second, 2), failure(1, "died")])]
    )
    assert [(one.first, len(one.hypers), one.step) for one in found.rest] == [(2, 2, 7)]
    assert [[one.rank for one in reports] for reports, _ in found.done] == [[0, 1]]
    assert found.lead == [0]


def life(doing: str, silent: float = 0.1, still: float = 0.1, step: int = 5) -> Life:
    return Life(Sign(9, step, doing), silent, still)


@pytest.mark.parametrize(
    ("lives", "ended"),
    [
        ({0: life("computing"), 1: life("communication", still=9)}, []),
        ({0: life("computing", still=31), 1: life("communication", still=31)}, [0]),
        ({0: life("data", still=31), 1: life("computing", still=31), 2: life("communication", still=31)}, [0, 1]),
        ({0: life("computing", silent=11), 1: life("communication", still=60)}, [0]),
        ({0: life("computing", silent=9), 1: life("communication", still=20)}, []),
        ({0: life("communication", still=31), 1: life("communication", still=31)}, []),
        ({0: life("communication", still=31), 1: life("computing", still=12)}, []),
        ({0: life("starting", still=31)}, []),
        ({0: life("starting", still=91)}, [0]),
        ({0: life("compiling", still=600), 1: life("communication", still=600)}, []),
        ({0: life("compiling", still=631), 1: life("communication", still=631)}, [0]),
    ],
)
def test_who_is_to_blame_for_a_standstill(lives: dict[int, Life], ended: list[int]) -> None:
    assert list(hung(lives, limit=30)) == ended


@pytest.mark.parametrize(
    ("at", "words"), [("data", "reading data"), ("computing", "computing"), ("validating", "validating")]
)
def test_a_standstill_is_told_with_what_and_when(at: str, words: str) -> None:
    lives = {0: life("communication", still=31), 1: life(at, still=31.2, step=7)}
    assert hung(lives, limit=30) == {1: f"stands still for 31.2 s, {words} at step 7"}


@pytest.mark.parametrize(
    ("lives", "all_wait"),
    [
        ({0: life("communication", still=31), 1: life("communication", still=31)}, True),
        ({0: life("communication", still=31, step=4), 1: life("communication", still=31)}, True),
        ({0: life("communication", still=31), 1: life("communication", still=29)}, False),
        ({0: life("communication", still=31), 1: life("computing", still=31)}, False),
        ({0: life("communication", still=31), 1: life("communication", still=31, silent=0.7)}, False),
    ],
)
def test_where_all_wait_for_each_other_nobody_is_to_blame(lives: dict[int, Life], all_wait: bool) -> None:
    assert deadlocked(lives, limit=30) == all_wait
    assert not (all_wait and hung(lives, limit=30))


@pytest.mark.parametrize(
    ("steps", "seconds"),
    [([], 300), ([0.01, 0.02], 60), ([5.9, 6.0, 0.1], 60), ([5.0, 7.0, 5.0], 70), ([80.0], 800)],
)
def test_a_step_may_last_ten_of_the_slowest_and_the_first_ones_longer(steps: list[float], seconds: float) -> None:
    assert hang_limit(steps, hang_after=60) == seconds


def test_a_machine_that_is_lost_is_noticed_sooner_than_a_process_that_is_held_up() -> None:
    "Within two seconds, though a pulse may have come just before, and the driver looks but as often."
    lives = {rank: life("communication", silent=2 - PERIOD) for rank in range(3)}
    assert list(hung(lives, 30)) == []
    assert list(hung(lives, 30, away=[1])) == [1]


def test_who_waits_for_a_dead_rank_is_freed_by_that_or_ended() -> None:
    lives = {0: life("communication", still=1), 1: life("communication", still=3), 2: life("computing", still=20)}
    assert list(hung(lives, 30, deserted=2)) == [1]
    assert list(hung({2: lives[2]}, 30, deserted=2)) == [], "it has not yet come to the collective"


@given(st.sampled_from(["died", "hung", "preempted", "error"]), st.integers(0, 5), st.integers(0, 5))
def test_each_kind_of_fault_has_its_own_budget(kind: str, allowed: int, before: int) -> None:
    tolerance = Tolerance(max_restarts=allowed)
    old = [[replace(failure(0, kind), step=step, message=f"{step}")] for step in range(before)]
    others = [[failure(1, other)] for other in ("died", "hung", "preempted") if other != kind] * (allowed + 1)
    reason = verdict([replace(failure(2, kind), message="new")], [*old, *others], tolerance)
    assert (reason is None) == (before + 1 <= allowed)
    assert reason is None or f"--max-restarts {allowed}" in reason


KINDS = ("error", "died", "preempted", "hung", "unreachable", "peer")


@pytest.mark.parametrize("n", [1, 8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_fails_at_once_counts_once(kind: str, n: int) -> None:
    "A machine with 8 of 16 workers that is lost is one fault, and all at once are one, however many they are."
    lost = [[replace(failure(rank, kind), step=step) for rank in range(n)] for step in range(3)]
    assert verdict(lost[2], lost[:2], Tolerance(max_restarts=3)) is None
    assert "3 faults" in (verdict(lost[2], lost[:2], Tolerance(max_restarts=2)) or "")
    assert "1 faults" in (verdict(lost[0], [], Tolerance(max_restarts=0)) or "")


@given(st.lists(st.lists(st.sampled_from(KINDS), min_size=1, max_size=16), min_size=1, max_size=6), st.integers(0, 6))
def test_an_incident_counts_once_for_each_kind_in_it(incidents: list[list[str]], allowed: int) -> None:
    "And who only lost touch with others counts for nothing beside them."
    *before, last = [
        [replace(failure(rank, kind), step=step) for rank, kind in enumerate(kinds)]
        for step, kinds in enumerate(incidents)
    ]
    counted = [set(kinds) - {"peer"} or {"peer"} for kinds in incidents]
    worst = max(sum(kind in kinds for kinds in counted) for kind in counted[-1])
    assert (verdict(last, before, Tolerance(max_restarts=allowed)) is None) == (worst <= allowed)


def test_what_a_user_has_to_mend_is_not_tried_again() -> None:
    assert verdict([failure(0, "user"), failure(1, "peer")], [], Tolerance()) == ""


def test_an_error_may_come_once() -> None:
    bug = replace(failure(0, "error"), step=7)
    assert verdict([bug], [], Tolerance()) is None
    assert verdict([bug], [[replace(bug, step=6)]], Tolerance()) is None
    assert verdict([bug, replace(bug, rank=1)], [], Tolerance()) is None, "by all ranks at once"
    assert "at step 7 before" in (verdict([bug], [[failure(0, "died"), replace(bug, rank=2)]], Tolerance()) or "")


def test_memory_may_be_short_once_and_for_one_rank() -> None:
    "Something else may have had it; but what is too large for several, or once more, is too large for all."
    short = replace(failure(0, "memory"), step=7)
    assert verdict([short], [], Tolerance()) is None
    assert verdict([short], [[replace(short, step=6)]], Tolerance()) is None
    assert "lower --size" in (verdict([short, replace(short, rank=1)], [], Tolerance()) or "")
    assert "lower --size" in (verdict([short], [[replace(short, rank=2, message="8 GiB")]], Tolerance()) or "")


BEGIN = [replace(failure(rank, "error"), message="no such device", step=-1) for rank in range(3)]


@pytest.mark.parametrize(
    ("incident", "before", "joining", "surplus", "empty"),
    [
        (BEGIN[1:2], [], [1], 1, set()),  # another process may do better
        (BEGIN[1:2], [BEGIN[1:2]], [1], 1, {1}),
        (BEGIN[1:2], [BEGIN[1:2]], [1], 0, set()),  # too few would go on: the run ends
        (BEGIN[1:2], [BEGIN[1:2]], [], 2, set()),  # it had begun: the others may have the same bug
        (BEGIN[1:3], [BEGIN[1:2]], [1, 2], 2, {1, 2}),
        (BEGIN, [BEGIN], [0, 1, 2], 2, set()),  # nobody can begin
        ([*BEGIN[1:2], failure(0, "died")], [BEGIN[1:2]], [1], 1, {1}),
        ([*BEGIN[1:2], failure(0, "user")], [BEGIN[1:2]], [1], 1, set()),  # at which the run ends as it is
        ([failure(1, "user"), failure(0, "peer")], [], [1], 1, {1}),  # its machine has no such data
        ([failure(1, "memory"), failure(2, "memory")], [], [1, 2], 2, {1, 2}),
        ([failure(1, "died")], [[failure(1, "died")]] * 9, [1], 1, set()),
        ([failure(1, "died")], [[failure(1, "died")]] * 10, [1], 1, {1}),
        ([failure(1, "peer")], [[failure(1, "peer")]] * 10, [1], 1, set()),
        ([failure(1, "unreachable"), failure(0, "peer")], [], [1], 1, {1}),  # so would another be, on its machine
        ([failure(1, "unreachable"), failure(0, "peer")], [], [1], 0, set()),
        ([failure(1, "unreachable"), failure(0, "peer")], [], [], 1, set()),  # its replacement may come up elsewhere
    ],
)
def test_who_can_not_begin_is_done_without(incident, before, joining, surplus, empty) -> None:
    assert unfit(incident, before, Tolerance(), joining, surplus) == empty


def test_what_befell_those_who_only_joined_does_not_count_for_others() -> None:
    "Not even if a rank at work dies with one that joins."
    both, vain = [failure(0, "died"), failure(1, "died")], [[failure(1, "died")]] * 3
    tolerance = Tolerance(max_restarts=1)
    assert unfit(both, vain, tolerance, [1], 2) == set(), "where it does"
    assert unfit(both, vain, tolerance, [1], 2, []) == {1}


STARTS = st.lists(st.tuples(st.sampled_from([*KINDS, "user", "memory"]), st.integers(-1, 0)), min_size=1, max_size=4)


@given(STARTS, st.lists(STARTS, max_size=3), st.sets(st.integers(0, 3)), st.integers(0, 4), st.integers(0, 3))
def test_no_place_stays_empty_but_where_that_saves_the_run(last, older, joining, surplus, allowed) -> None:
    incident, *before = [
        [replace(failure(rank, kind), step=step, message=kind) for rank, (kind, step) in enumerate(one)]
        for one in (last, *older)
    ]
    tolerance = Tolerance(max_restarts=allowed)
    empty = unfit(incident, before, tolerance, joining, surplus)
    alone = [one for one in incident if one.rank not in empty]
    assert empty <= joining & {one.rank for one in incident if one.kind != "peer"} and len(empty) <= surplus
    if empty:
        hopeless = any(one.kind == "unreachable" and one.rank in empty for one in incident)
        assert hopeless or verdict(incident, before, tolerance) is not None
        assert verdict(alone, before, tolerance) is None
    elif verdict(incident, before, tolerance) is not None:
        could = {one.rank for one in incident if one.rank in joining and one.kind != "peer"}
        rest = [one for one in incident if one.rank not in could]
        assert len(could) > surplus or verdict(rest, before, tolerance) is not None
