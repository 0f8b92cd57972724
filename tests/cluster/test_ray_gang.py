"Ray workers as such: what they are told, how they fail, and that they can be used again."

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cluster.calls
import cluster.crew
from cluster.faults import WorkersFailed
from cluster.messages import Chunk, Job
from cluster.ray_gang import RayGang
from cluster.worker_process import WorkerProcess
from learner.cores import usable_cores
from learner.data.files import Labelled
from learner.data.loader import epoch_order
from learner.errors import UserError

FOREVER = Chunk(True, 0, 0, 0, ({"lr": 0.1},) * 7)


def in_workers(gang: RayGang, function: Callable[[Any], Any]) -> list[Any]:
    "Call a function with each WorkerProcess; the results by rank."
    actors = [member.actor for member in gang.seated]
    return gang.ray.get([actor.__ray_call__.remote(function) for actor in actors])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_environment_is_as_torchrun_sets_it(ray_gang: RayGang, job: Job, world_size: int) -> None:
    ray_gang.start(job, world_size)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    seen = in_workers(ray_gang, lambda _: {name: os.environ[name] for name in names})
    port = f"{ray_gang.store.meeting.port}"
    for rank, environment in enumerate(seen):
        assert list(environment.values()) == [f"{rank}", f"{rank}", *[f"{world_size}"] * 2, "127.0.0.1", port]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_threads_do_not_oversubscribe(ray_gang: RayGang, job: Job, world_size: int) -> None:
    ray_gang.start(job, world_size)

    def threads(_: Any) -> int:
        import torch

        return torch.get_num_threads()

    assert in_workers(ray_gang, threads) == [max(1, usable_cores() // world_size)] * world_size


def test_workers_keep_the_memory_that_they_free(ray_gang: RayGang, job: Job) -> None:
    "Or a step would take thousands of pages anew: see learner/memory.py."
    ray_gang.start(job, 2)

    def taken_anew(_: Any) -> int:
        import resource

        def use() -> int:
            for size in (2**22, 2**26):
                del [b"x" * size][0]
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

        before = use()
        return use() - before

    assert max(in_workers(ray_gang, taken_anew)) < 1000


def test_the_next_chunk_is_under_way_while_the_driver_reads_of_one(ray_gang: RayGang, job: Job) -> None:
    ray_gang.start(job, 2)
    asked = list[Chunk]()

    def chunks() -> Iterator[Chunk]:
        for number in range(4):
            asked.append(Chunk(True, 0, number, number, ({"lr": 0.1},)))
            yield asked[-1]

    assert [len(asked) for _ in ray_gang.stream(chunks())] == [2, 3, 4, 4]


def test_what_workers_print_goes_to_their_logs(ray_gang: RayGang, job: Job) -> None:
    ray_gang.start(job, 2)
    in_workers(ray_gang, lambda process: os.write(1, f"hello from {process.rank}\n".encode()))
    for rank in range(2):
        assert f"hello from {rank}" in Path(ray_gang.log_folder, f"rank_{rank}.log").read_text()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_snapshot_brings_the_fingerprint_back(
    ray_gang: RayGang, drive: Callable[..., Any], job: Job, world_size: int
) -> None:
    mine = replace(job, arch="simple_cnn_bn", momentum=0.9)
    ray_gang.start(mine, world_size)
    drive(ray_gang, mine, epochs=1)  # so that there is a momentum to restore
    before, kept = ray_gang.call("fingerprint"), ray_gang.call_first("snapshot")
    assert drive(ray_gang, mine, epochs=1).prints != before
    ray_gang.call("load", kept)
    assert ray_gang.call("fingerprint") == before


def test_a_stream_that_is_left_early_leaves_nothing_behind(
    ray_gang: RayGang, drive: Callable[..., Any], job: Job
) -> None:
    ray_gang.start(job, 2)
    fresh = drive(ray_gang, job, epochs=1)
    ray_gang.start(job, 2)
    kept = ray_gang.call_first("snapshot")
    stream = ray_gang.stream([FOREVER] * 5)
    next(stream)
    stream.close()
    ray_gang.call("load", kept)
    assert drive(ray_gang, job, epochs=1).prints == fresh.prints


def test_one_rank_with_an_unreadable_image(ray_gang: RayGang, drive: Callable[..., Any], job: Job, tmp_path) -> None:
    bad, files = tmp_path / "bad.JPEG", list(job.train.files)
    bad.write_bytes(b"")
    files[epoch_order(len(files), job.seed, 0)[23]] = str(bad)  # the last of the third batch is the last rank's
    mine = replace(job, train=Labelled(tuple(files), job.train.targets))
    ray_gang.start(mine, 3)
    started = time.monotonic()
    with pytest.raises(WorkersFailed) as caught:
        drive(ray_gang, mine, epochs=1)
    assert time.monotonic() - started < 10
    (cause, *others), text = caught.value.failures, str(caught.value)
    assert {location.node for location in ray_gang.locations} == {ray_gang.cluster.host}, "none is on another machine"
    host, pid = ray_gang.locations[2].host, ray_gang.locations[2].pid
    assert (cause.kind, cause.rank, cause.host, cause.pid) == ("user", 2, host, pid)
    assert text.startswith(f"a worker failed: rank 2 (host {socket.gethostname()}, pid {pid}): {bad} is no readable")
    assert "the file is empty" in text
    assert "--bad-images skip" in text
    assert "Traceback" not in text, "what a user can act on needs none"
    assert [other.kind for other in others] == ["peer", "peer"], "nobody goes on waiting for the one that failed"
    ray_gang.start(job, 3)
    assert drive(ray_gang, job, epochs=1).valid["loss"][1] == len(job.valid), "no process died: all is well again"


def test_a_bug_is_shown_with_its_traceback(ray_gang: RayGang, drive: Callable[..., Any], job: Job) -> None:
    ray_gang.start(job, 2)
    with pytest.raises(WorkersFailed) as caught:
        ray_gang.call("no_such_method")
    text = str(caught.value)
    assert text.startswith("a worker failed: rank 0 (host")
    assert "Traceback (most recent call last)" in text
    assert "Error: " in text.splitlines()[0]
    assert "Traceback" in Path(ray_gang.log_folder, "rank_0.log").read_text()
    ray_gang.start(job, 2)
    drive(ray_gang, job, epochs=1)


def test_what_was_lost_on_its_way_is_no_error_of_the_rank(ray_gang: RayGang, job: Job) -> None:
    "Such as a snapshot whose machine goes while another rank loads it, of which Ray raises the like of this there."

    def load(_: Any) -> None:
        from ray.exceptions import OwnerDiedError

        raise OwnerDiedError("00" * 28, b"", "")

    ray_gang.start(job, 2)
    failure = ray_gang.calls.result(1, ray_gang.seated[1].actor.__ray_call__.remote(load))
    assert (failure.rank, failure.kind) == (1, "peer"), "its own process is well"
    assert failure.message.startswith("OwnerDiedError")


def test_nobody_waits_for_the_answer_of_a_rank_that_was_ended(
    ray_gang: RayGang, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    "Ray does, for a minute, where the answer is on a machine that is cut off."
    ray_gang.start(job, 2)
    looks = list[object]()

    def wait(refs: list[object], **_: Any) -> tuple[list[object], list[object]]:
        assert len(looks) < 2
        looks.append(refs)
        return [], refs

    monkeypatch.setattr(ray_gang.seated[1], "ended", "gave no sign of life")
    monkeypatch.setattr(ray_gang.calls, "ray", SimpleNamespace(wait=wait, exceptions=ray_gang.ray.exceptions))
    failure = ray_gang.calls.answers({1: "on another machine"}, 60.0)[1]
    assert (failure.rank, failure.kind, failure.message) == (1, "hung", "gave no sign of life")


@pytest.mark.parametrize("away", [False, True])
def test_a_state_from_another_machine_is_handed_over_by_the_driver(
    ray_gang: RayGang, job: Job, monkeypatch: pytest.MonkeyPatch, away: bool
) -> None:
    "Those who wait for it from a machine that is cut off meanwhile would pass for stuck."
    ray_gang.start(job, 3)
    asked, ask = dict[str, tuple[Any, ...]](), ray_gang.calls.ask

    def spy(method: str, *args: Any, **of: Any) -> Any:
        asked[method] = args
        return ask(method, *args, **of)

    monkeypatch.setattr(ray_gang.calls, "ask", spy)
    if away:
        monkeypatch.setattr(ray_gang.seated[0], "location", replace(ray_gang.locations[0], node="10.0.0.9"))
    ray_gang.newest = {ray_gang.seated[0]}
    assert ray_gang._hand_over() == []
    (state,) = asked["load"]
    of_driver = state.task_id() == ray_gang.ray.put(0).task_id()
    assert of_driver == away


def test_why_a_process_could_not_begin_is_known(ray_gang: RayGang, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:

    class Broken(WorkerProcess):
        def __init__(self, *args: Any) -> None:
            raise RuntimeError("the driver is too old")

    ray_gang.start(job, 3)
    crew = ray_gang.crew
    spare = crew.take(60.0)
    assert spare is not None
    monkeypatch.setattr(cluster.crew, "WorkerProcess", Broken)
    monkeypatch.setattr(cluster.crew, "MAX_LOST", 0)
    crew.dismiss(spare, replace=True)
    assert crew.take(60.0) is None, "nor is another one begun, beyond so many"
    assert crew.why == ": RuntimeError: the driver is too old"
    monkeypatch.undo()
    crew.hire(spare.bundle)


def test_a_range_begins_with_those_that_are_there(
    ray_gang: RayGang, drive: Callable[..., Any], job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    "And grows by the fourth, once that is up: the same samples in the same batches."
    ray_gang.start(job, 3)
    alone = drive(ray_gang, job, epochs=1)
    late = ray_gang.crew.take(60.0)  # out of reach
    assert late is not None
    monkeypatch.setattr(ray_gang.crew, "workers", replace(ray_gang.crew.workers, at_least=3))
    ray_gang.start(job, 4)
    ray_gang.grow()
    assert ray_gang.world_size == 3
    assert drive(ray_gang, job, epochs=1).prints == alone.prints
    ray_gang.crew.bench.append(late)
    ray_gang.grow()
    assert ray_gang.world_size == 4
    assert len(set(ray_gang.call("fingerprint"))) == 1
    monkeypatch.setattr(ray_gang.crew, "workers", replace(ray_gang.crew.workers, at_least=5))
    with pytest.raises(UserError, match="only 4 of 5 workers started"):
        ray_gang.start(job, 6)


def test_how_long_a_step_may_last_is_learnt_from_those_of_late(
    ray_gang: RayGang, drive: Callable[..., Any], job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    "A stall is forgotten, and fewer workers, who have more to do, begin to learn anew; a stop is not kept waiting."
    limits, calls = list[float](), ray_gang.calls

    def limit() -> float:
        calls.watch.expect(member.name for member in ray_gang.seated)
        calls._end_hung(range(ray_gang.world_size), True, ray_gang.tolerance.hang_after)
        return limits.pop()

    ray_gang.start(job, 3)
    monkeypatch.setattr(cluster.calls, "hung", lambda lives, limit, *_: limits.append(limit) or {})
    first, least = 5 * ray_gang.tolerance.hang_after, ray_gang.tolerance.hang_after
    assert limit() == first
    (done,) = ray_gang.stream([FOREVER])
    assert limit() == least
    slow = [replace(report, seconds={**report.seconds, "total": 100.0 * 7}) for report in done]
    calls.learn(slow)
    assert limit() == 1000
    member = ray_gang.seated.pop()
    assert limit() == first
    ray_gang.seated.append(member)
    for _ in range(cluster.calls.RECENT):
        calls.learn(done)
    assert limit() == least > cluster.calls.STOPPING
    monkeypatch.setattr(ray_gang.crew, "stop", lambda: True)
    assert limit() == cluster.calls.STOPPING


@pytest.mark.parametrize(("taken_back", "kind"), [(True, "preempted"), (False, "died")])
def test_a_machine_that_is_taken_back_is_a_fault_of_its_own_kind(
    ray_gang: RayGang, job: Job, monkeypatch: pytest.MonkeyPatch, taken_back: bool, kind: str
) -> None:
    "As Ray says of one that a cloud gives notice of: no such is to be had here."
    ray_gang.start(job, 2)
    errors = ray_gang.ray.exceptions

    def gone(ref: object) -> None:
        raise errors.RayActorError(error_msg="The node was drained.", preempted=taken_back)

    monkeypatch.setattr(ray_gang.calls, "ray", SimpleNamespace(exceptions=errors, get=gone))
    failure = ray_gang.calls.result(1, None)
    assert (failure.rank, failure.kind) == (1, kind)


def test_whoever_is_on_another_machine_is_given_up_sooner(
    ray_gang: RayGang, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray_gang.start(job, 3)
    known, told = ray_gang.calls, list[Sequence[int]]()
    monkeypatch.setattr(cluster.calls, "hung", lambda lives, limit, deserted, away: told.append(away) or {})
    monkeypatch.setattr(ray_gang.seated[1], "location", replace(ray_gang.locations[1], node="10.0.0.9"))
    known.watch.expect(member.name for member in ray_gang.seated)
    known._end_hung(range(3), True, ray_gang.tolerance.hang_after)
    assert told == [[1]]


def test_a_job_that_no_worker_can_begin(ray_gang: RayGang, drive: Callable[..., Any], job: Job) -> None:
    with pytest.raises(WorkersFailed, match="model 'simple_cn' is unknown"):
        ray_gang.start(replace(job, arch="simple_cn"), 3)
    ray_gang.start(job, 3)
    drive(ray_gang, job, epochs=1)
