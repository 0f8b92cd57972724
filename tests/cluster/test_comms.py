"Solo is the identity; Group is checked with three real processes over gloo, one of which is killed in the end."

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from threading import Thread
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from cluster import meeting
from cluster.comms import TIMEOUT, Group, NcclGroup, PeerLost, Solo
from cluster.meeting import KeyStore, cut_off, interface_to

WORLD_SIZE = 3
MEMBER = """
import json, os, sys, time
import torch
from cluster.comms import Group, PeerLost
from cluster.meeting import Meeting

rank, port = map(int, sys.argv[1:])
group = Group(rank, 3, Meeting("127.0.0.1", port, "test"), "gloo")
told = {"rank": group.rank, "world_size": group.world_size}
told["interfaces"] = [os.environ.get(f"{library}_SOCKET_IFNAME") for library in ("GLOO", "NCCL")]
for dtype in ("float32", "float64", "int64"):
    tensor = torch.arange(6, dtype=getattr(torch, dtype)).view(2, 3) + rank
    group.sum_(tensor)
    told[dtype] = tensor.tolist()
tensor = torch.full((2,), float(rank))
group.broadcast_(tensor)
told["broadcast"] = tensor.tolist()
if rank == 0:
    time.sleep(0.3)
arrived, waited = time.time(), group.seconds
group.sum_(torch.zeros(1))
told |= {"arrived": arrived, "left": time.time(), "waited": group.seconds - waited}
print(json.dumps(told), flush=True)
sys.stdin.readline()
try:
    while True:
        group.sum_(torch.ones(1000))
except PeerLost as error:
    group.close()
    print(json.dumps({"lost": str(error), "at": time.time()}), flush=True)
"""

NEWCOMER = """
import sys
from cluster.comms import Group
from cluster.meeting import Meeting

Group(1, 2, Meeting("127.0.0.1", int(sys.argv[1]), "next"), "gloo").close()
"""

LATE = """
import sys, time
from datetime import timedelta
import torch
from cluster.comms import TIMEOUT, Group
from cluster.meeting import Meeting

if Group.connecting != TIMEOUT:
    Group.connecting = timedelta(seconds=2)
rank, port = map(int, sys.argv[1:])
group = Group(rank, 2, Meeting("127.0.0.1", port, "late"), "gloo")
if rank == 0:
    time.sleep(3)
group.sum_(torch.zeros(1))
group.close()
"""


@pytest.mark.parametrize("tensor", [torch.arange(3.0), torch.zeros(0), torch.tensor(2), torch.tensor([float("nan")])])
def test_solo_is_the_identity(tensor: torch.Tensor) -> None:
    solo, before = Solo(), tensor.clone()
    solo.sum_(tensor)
    solo.broadcast_(tensor)
    solo.close()
    assert torch.equal(tensor.nan_to_num(), before.nan_to_num())
    assert (solo.rank, solo.world_size, solo.seconds) == (0, 1, 0.0)


def test_nobody_waits_for_a_rank_that_will_never_come() -> None:
    store = KeyStore("127.0.0.1")
    store.call_off(store.meeting.group)
    with pytest.raises(PeerLost, match="the meeting is called off"):
        Group(0, 2, store.meeting, "gloo")


def test_nobody_waits_for_a_rank_that_dies_as_it_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    "It was there a moment ago. Who waits can meet others then, who never waited like that."
    store = KeyStore("127.0.0.1")
    for met in ("here", "lost"):
        store.write(f"{store.meeting.group}/{met}/1", "")
    monkeypatch.setattr(Group, "connecting", timedelta(seconds=0.5))
    with pytest.raises(PeerLost, match="rank 0 lost touch with the others: wait timeout"):
        Group(0, 2, store.meeting, "gloo")
    monkeypatch.undo()
    with subprocess.Popen([sys.executable, "-c", NEWCOMER, f"{store.meeting.port}"]) as newcomer:
        group = Group(0, 2, replace(store.meeting, group="next"), "gloo")
        timeout = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
        assert timeout == TIMEOUT, "of sums: the driver decides"
        group.close()
    assert newcomer.returncode == 0


@pytest.mark.parametrize("error", [torch.AcceleratorError("an illegal memory access"), torch.OutOfMemoryError("full")])
def test_what_is_wrong_with_the_own_gpu_is_no_loss_of_a_peer(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    "It comes to light at whatever is asked of the GPU next, such as a sum."

    def fail(*args: Any, **options: Any) -> None:
        raise error

    store = KeyStore("127.0.0.1")
    alone = Group(0, 1, store.meeting, "gloo")
    monkeypatch.setattr(dist, "all_reduce", fail)
    for ask in (alone.sum_, alone.start_sum_):
        with pytest.raises(type(error)):
            ask(torch.zeros(1))
    assert not alone.waiting
    alone.close()


def test_nccl_connects_before_anything_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    "As it does only if it knows the GPU: a rank that waited for it in a sum could not be freed, and had to be ended."
    store, asked = KeyStore("127.0.0.1"), dict[str, Any]()

    def connect(backend: str, store: dist.Store, **options: Any) -> None:
        asked.update(options, backend=backend, seconds=store.timeout.total_seconds())

    monkeypatch.setattr(dist, "init_process_group", connect)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with patch.dict(os.environ):
        group = NcclGroup(0, 1, store.meeting)
    assert (asked["backend"], asked["device_id"]) == ("nccl", torch.device("cuda", 0))
    assert asked["seconds"] < 60, "for rank 0 to say where it is, if it has not died"
    assert group._store.timeout == TIMEOUT


def test_the_interface_to_a_machine() -> None:
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("no address") is None
    assert interface_to("::1") is None


def test_who_can_not_connect_to_whom_is_known_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    "No way leads to rank 2; rank 1, which has no address, tries none."
    reaches, host, found = meeting._reaches, KeyStore("127.0.0.1"), dict[int, set[tuple[int, int]]]()
    monkeypatch.setattr(meeting, "_reaches", lambda place: not place.startswith("127.0.0.3") and reaches(place))

    def meet(rank: int, address: str | None) -> None:
        store = dist.TCPStore(host.meeting.host, host.meeting.port, is_master=False)
        found[rank] = meeting.meet(store, rank, 3, address)

    ranks = [Thread(target=meet, args=it) for it in ((0, "127.0.0.1"), (1, None), (2, "127.0.0.3"))]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(30)
    assert found == {key: {(0, 2)} for key in range(3)}


def test_a_port_at_which_nobody_listens_is_not_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = f"127.0.0.1 {listener.getsockname()[1]}"
        assert meeting._reaches(place)
    assert not meeting._reaches(place)
    assert meeting._reaches("")


@given(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda pair: pair[0] != pair[1])))
def test_without_those_that_are_cut_off_all_can_reach_each_other(pairs: set[tuple[int, int]]) -> None:
    gone = cut_off(pairs)
    assert all(gone & {*pair} for pair in pairs)
    assert cut_off({(other, one) for one, other in pairs}) == gone, "it does not matter which of two has tried"
    for rank in gone:
        assert any(rank in pair for pair in pairs), "who reaches all stays"


@pytest.mark.parametrize(
    ("here", "there", "gone"), [([1, 2], [3], {3}), ([0], [1, 2], {0}), ([0, 1], [2, 3], {2, 3}), ([0], [5], {5})]
)
def test_of_two_machines_the_one_with_fewer_ranks_goes(here: list[int], there: list[int], gone: set[int]) -> None:
    assert cut_off({(one, other) for one in here for other in there}) == gone


@pytest.fixture(scope="module")
def store() -> KeyStore:
    "A store as the driver hosts it."
    return KeyStore("127.0.0.1")


@pytest.fixture(scope="module")
def members(store: KeyStore) -> Iterator[list[subprocess.Popen[str]]]:
    "Three processes that form a group."
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GLOO", "NCCL"))}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(rank), str(store.meeting.port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean,
        )
        for rank in range(WORLD_SIZE)
    ]  # fmt: skip
    yield started
    for member in started:
        member.kill()
        member.communicate()


def hear(member: subprocess.Popen[str]) -> dict[str, Any]:
    "The next thing that a member says; the gloo of torch 2.9 says things too."
    assert member.stdout is not None
    return json.loads(next(line for line in member.stdout if line.startswith("{")))


@pytest.fixture(scope="module")
def told(members: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    "What each rank got from the collectives."
    return [hear(member) for member in members]


def test_a_group_sums_and_broadcasts(told: list[dict[str, Any]]) -> None:
    assert [one["rank"] for one in told] == [0, 1, 2]
    for one in told:
        assert one["world_size"] == WORLD_SIZE
        for dtype in ("float32", "float64", "int64"):
            assert one[dtype] == [[3, 6, 9], [12, 15, 18]], dtype
        assert one["broadcast"] == [0, 0]


def test_a_sum_waits_for_the_last_and_counts_the_time(told: list[dict[str, Any]]) -> None:
    assert min(one["left"] for one in told) >= max(one["arrived"] for one in told)
    assert told[1]["waited"] >= 0.9 * (told[0]["arrived"] - told[1]["arrived"])


def test_nothing_listens_beyond_the_loopback(
    store: KeyStore,
    told: list[dict[str, Any]],
    members: list[subprocess.Popen[str]],
    listening: Callable[[Iterable[int]], set[str]],
) -> None:
    assert listening([os.getpid()]) >= {"127.0.0.1"}
    for member in members:
        assert listening([member.pid]) == {"127.0.0.1"}, "gloo's own connections"
    assert listening([os.getpid()]) == {"127.0.0.1"}, "the store"
    for one in told:
        assert one["interfaces"] == ["lo", "lo"], "whatever the machine's own name stands for"


def test_a_lost_peer_is_told_to_all(told: list[dict[str, Any]], members: list[subprocess.Popen[str]]) -> None:
    for member in members:
        assert member.stdin is not None
        member.stdin.write("\n")
        member.stdin.flush()
    time.sleep(0.2)
    killed = time.time()
    members[1].send_signal(signal.SIGKILL)
    for rank in (0, 2):
        lost = hear(members[rank])
        assert lost["lost"].startswith(f"rank {rank} lost touch with the others: ")
        assert lost["at"] - killed < 5, "at once, not when some timeout ends"


@pytest.mark.slow
def test_a_sum_may_take_longer_than_ranks_have_to_connect(store: KeyStore) -> None:
    "Gloo of torch 2.8 goes by the time that it was given at first: a rank that compiled for 20 seconds was given up."
    line = [sys.executable, "-c", LATE]
    ranks = [subprocess.Popen([*line, str(rank), str(store.meeting.port)]) for rank in range(2)]
    assert [rank.wait(60) for rank in ranks] == [0, 0]
