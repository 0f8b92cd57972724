"The parts of a gang that need no Ray: seats, and the gang in this process."

import os
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cluster.crew
import cluster.gang
from cluster.crew import Crew, Workers
from cluster.faults import Failure, WorkersFailed
from cluster.gang import LocalGang, Seat, enough_memory
from cluster.meeting import Meeting
from cluster.messages import Chunk, Job, Report
from cluster.worker_process import Location
from learner.cores import usable_cores
from learner.data.files import Labelled
from learner.errors import UsageError, UserError
from learner.learner import Callback


@given(st.integers(1, 200))
def test_threads_share_the_processors(workers: int) -> None:
    threads = Seat(0, workers, 0, workers).threads
    assert threads >= 1
    assert threads == 1 or threads * workers <= usable_cores()


def test_a_seat_in_words() -> None:
    seat = Seat(5, 8, 1, 4)
    assert seat.environment() == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert str(seat).startswith("rank 5 of 8 (pid ")


def test_no_process_of_a_crew_waits_for_another_to_start(monkeypatch) -> None:
    ray = MagicMock()
    ray.cluster_resources.return_value = {"CPU": 4.0}
    monkeypatch.setattr(cluster.crew, "in_bundle", Mock())
    crew = Crew(ray, Workers(3, 0.0, "gloo"), 1, Meeting("127.0.0.1", 1, ""), "logs")
    assert len(crew.bench) == 4
    ray.get.assert_not_called()
    ray.wait.assert_not_called()


def test_a_run_that_begins_again_waits_for_a_machine_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    "One that begins does not: whoever asked for too many is to know."
    ray, workers = MagicMock(), Workers(1, 0.0, "gloo", "head:6379")
    monkeypatch.setattr(cluster.crew, "in_bundle", Mock())
    monkeypatch.setattr(cluster.crew, "GLANCE", 0.01)
    ray.cluster_resources.side_effect = [{}, {}, {"CPU": 1.0}]
    assert len(Crew(ray, replace(workers, patience=60.0), 0, Meeting("127.0.0.1", 1, ""), "logs").bench) == 1
    ray.cluster_resources = dict
    with pytest.raises(UsageError, match="1 CPUs are needed but the cluster at head:6379 has 0; ask for fewer"):
        Crew(ray, workers, 0, Meeting("127.0.0.1", 1, ""), "logs")
    with pytest.raises(UserError, match="or wait longer with --wait-for-workers") as caught:
        Crew(ray, replace(workers, patience=0.1), 0, Meeting("127.0.0.1", 1, ""), "logs")
    assert not isinstance(caught.value, UsageError), "the command was good"


def test_a_run_that_begins_again_waits_for_all_that_come_up(monkeypatch: pytest.MonkeyPatch) -> None:
    "However short it waits for replacements."
    ray, here = MagicMock(), Location("here", 0, "127.0.0.1")
    ray.exceptions.RayError = RuntimeError
    ray.cluster_resources.return_value = {"CPU": 2.0}
    ray.get.return_value = here
    ray.remote().return_value.options.return_value.remote = lambda *_: MagicMock()
    monkeypatch.setattr(cluster.crew, "in_bundle", Mock())
    for patience, seated in ((0.0, 1), (60.0, 2)):
        looks = iter([[], [], []])
        ray.wait = lambda answers, looks=looks, **_: (next(looks, answers[:1]), [])
        workers = Workers(2, 0.0, "gloo", at_least=1, patience=patience)
        crew = Crew(ray, workers, 0, Meeting("127.0.0.1", 1, ""), "logs")
        crew.seat(2, 0.0)
        assert [member.location for member in crew.seated] == [here] * seated


def test_however_many_spares_a_long_run_loses_others_come(monkeypatch: pytest.MonkeyPatch) -> None:
    "A machine with many of them too; but for one that can never start: of its kind there are only so many in a row."
    ray, lost = MagicMock(), RuntimeError("the machine was taken back")
    ray.cluster_resources.return_value = {"CPU": 20.0}
    ray.exceptions.RayError = RuntimeError
    ray.exceptions.OutOfMemoryError = MemoryError
    ray.wait = lambda answers, **_: (answers[:1], [])
    ray.remote().return_value.options.return_value.remote = lambda *_: MagicMock()
    monkeypatch.setattr(cluster.crew, "in_bundle", Mock())
    crew = Crew(ray, Workers(1, 0.0, "gloo"), 19, Meeting("127.0.0.1", 1, ""), "logs")
    there = Location("here", 0, "127.0.0.1")
    for _ in range(3 * cluster.crew.MAX_LOST):
        ray.get.side_effect = [*[lost] * 20, *[there] * 40]
        up = [member for _ in range(20) if (member := crew.take(60.0))]
        assert len(up) == len(crew.members) == 20
        crew.bench += up
    hired, ray.get.side_effect = crew.hired, RuntimeError("too old")
    assert crew.take(60.0) is None and crew.members == [], "none is waited for in vain"
    assert crew.hired - hired == 20 * cluster.crew.MAX_LOST


def test_a_local_gang_keeps_the_memory_that_it_frees(local_gang, job: Job, monkeypatch) -> None:
    monkeypatch.setattr(cluster.gang, "keep_memory", kept := Mock())
    local_gang(job)
    kept.assert_called_once_with()


def test_a_local_gang_raises_what_was_raised(local_gang: Callable[[Job], LocalGang], job: Job) -> None:
    gang = local_gang(replace(job, train=Labelled(("/no/such.jpg",), (0,))))
    with pytest.raises(UserError, match=r"/no/such.jpg is no readable image: No such file or directory.*--bad-images"):
        list(gang.stream([Chunk(True, 0, 0, 0, ({"lr": 0.1},))]))
    with pytest.raises(AttributeError):
        gang.call("no_such_method")


class Failing(Callback):
    "Raises `error` at an event of the batch behind the first two, in training or not."

    order = 1000

    def __init__(self, event: str, train: bool, error: BaseException) -> None:
        setattr(self, event, lambda: self.fail(train, error))

    def fail(self, train: bool, error: BaseException) -> None:
        if self.model.training == train and self.learner.num == 2:
            raise error


CHUNKS = {train: Chunk(train, 0, 0, 0, ({"lr": 0.1} if train else {},) * 4) for train in (True, False)}
FAILING = [("before_batch", True), ("after_loss", True), ("after_backward", True), ("after_predict", False)]


@pytest.mark.parametrize(("event", "train"), FAILING)
def test_what_fails_in_a_local_gang_leaves_all_completed_steps(
    local_gang: Callable[[Job], LocalGang], job: Job, event: str, train: bool
) -> None:
    mine, error = replace(job, arch="simple_cnn_bn", momentum=0.9, ema=0.9), RuntimeError("injected")
    gang, healthy = local_gang(mine), local_gang(mine)
    gang.worker.learner.add_cb(Failing(event, train, error))
    done: list[list[Report]] = []
    with pytest.raises(WorkersFailed, match=r"(?s)rank 0 .*RuntimeError: injected.*Traceback.* raise error") as caught:
        done += gang.stream([CHUNKS[train]])
    assert caught.value.__cause__ is error, "a debugger finds where it was"
    assert [len(reports[0].losses) for reports in done] == [2] * train
    list(healthy.stream([replace(CHUNKS[True], hypers=CHUNKS[True].hypers[:2])] * train))
    assert_same(gang.salvage(), healthy.salvage())


def assert_same(found: dict[str, np.ndarray] | None, wanted: dict[str, np.ndarray] | None) -> None:
    assert found is not None and wanted is not None and found.keys() == wanted.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, wanted[name], err_msg=name)


def test_a_state_in_the_midst_of_an_update_is_nothing_to_go_on_with(
    local_gang: Callable[[Job], LocalGang], job: Job
) -> None:
    gang = local_gang(job)
    gang.worker.learner.add_cb(Failing("after_step", True, RuntimeError("injected")))
    with pytest.raises(WorkersFailed):
        list(gang.stream([CHUNKS[True]]))
    assert gang.salvage() is None


def test_torch_says_of_a_processors_memory_too_that_it_is_not_enough() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert Failure.of(0, caught.value).kind == "memory"
    assert Failure.of(0, RuntimeError("another")).kind == "error"
    with pytest.raises(UserError, match=r"^there is not enough memory"), enough_memory():
        raise caught.value


@pytest.mark.parametrize("error", [MemoryError("9 GiB"), torch.OutOfMemoryError("9 GiB")])
def test_too_little_memory_is_a_sentence(local_gang: Callable[[Job], LocalGang], job: Job, error: Exception) -> None:
    gang = local_gang(job)
    gang.worker.learner.add_cb(Failing("after_loss", True, error))
    with pytest.raises(
        UserError, match=r"^there is not enough memory: 9 GiB; free some, or begin anew with a lower --size"
    ) as caught:
        list(gang.stream([CHUNKS[True]]))
    assert caught.value.__cause__ is error
    assert gang.salvage() is not None


def test_a_model_too_large_for_memory_is_a_sentence(
    local_gang: Callable[[Job], LocalGang], job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("9 GiB")

    monkeypatch.setattr(cluster.gang, "Worker", too_large)
    with pytest.raises(UserError, match=r"^there is not enough memory: 9 GiB"):
        local_gang(job)


def test_an_interruption_passes_through(local_gang: Callable[[Job], LocalGang], job: Job) -> None:
    gang = local_gang(job)
    gang.worker.learner.add_cb(Failing("after_loss", True, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        list(gang.stream([CHUNKS[True]]))


def test_a_local_gang_sits_like_rank_0(
    local_gang: Callable[[Job], LocalGang], job: Job, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    gang = local_gang(job)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    assert [os.environ[name] for name in names] == ["0", "1", "0", "1"]
    assert torch.get_num_threads() == usable_cores()
    assert gang.world_size == 1
    assert "rank 0 of 1" in (tmp_path / "rank_0.log").read_text()
    assert gang.call("fingerprint") == [gang.call_first("fingerprint")]


def test_a_local_gang_has_as_many_threads_as_the_environment_says(
    local_gang: Callable[[Job], LocalGang], job: Job, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = torch.get_num_threads()
    torch.set_num_threads(3)  # as torch does when it is imported there
    try:
        local_gang(job)
        assert torch.get_num_threads() == 3
        assert ", 3 threads)" in (tmp_path / "rank_0.log").read_text()
    finally:
        torch.set_num_threads(before)
