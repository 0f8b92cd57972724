"The decision which devices a run uses: a table of every kind of request, against every kind of machine."

import os
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.errors import UsageError
from orchestrator.build import seen_at_first, visible_devices
from orchestrator.config import Config
from orchestrator.devices import Devices, choose, share

HERE = {"address": "head:6379"}
TABLE = [
    # asked for, GPUs visible, what it comes to
    ({}, 0, Devices(1, 0.0, "gloo", None, True)),
    ({}, 1, Devices(1, 1.0, "nccl", None, True)),
    ({}, 4, Devices(4, 1.0, "nccl")),
    ({"gpus": "all"}, 1, Devices(1, 1.0, "nccl", None, True)),
    ({"gpus": "all"}, 4, Devices(4, 1.0, "nccl")),
    ({"gpus": "1"}, 4, Devices(1, 1.0, "nccl", None, True)),
    ({"gpus": "4"}, 4, Devices(4, 1.0, "nccl")),
    ({"gpus": "0,2"}, 4, Devices(2, 1.0, "nccl", (0, 2))),
    ({"gpus": "3,1,0"}, 4, Devices(3, 1.0, "nccl", (3, 1, 0))),
    ({"gpus": "2,"}, 4, Devices(1, 1.0, "nccl", (2,), True)),
    ({"gpus": "4", "backend": "nccl"}, 4, Devices(4, 1.0, "nccl")),
    ({"gpus": "4", "backend": "gloo"}, 4, Devices(4, 1.0, "gloo")),
    ({"gpus": "4", "backend": "gloo"}, 1, Devices(4, 0.25, "gloo")),
    ({"gpus": "3", "backend": "gloo"}, 2, Devices(3, 0.5, "gloo")),
    ({"gpus": "3", "backend": "gloo"}, 1, Devices(3, 0.3333, "gloo")),
    ({"cpus": 1}, 0, Devices(1, 0.0, "gloo", None, True)),
    ({"cpus": 1}, 4, Devices(1, 0.0, "gloo", None, True)),
    ({"cpus": 3}, 4, Devices(3, 0.0, "gloo")),
    ({"cpus": 3, "backend": "gloo"}, 0, Devices(3, 0.0, "gloo")),
    ({"local": True}, 0, Devices(1, 0.0, "gloo", None, True)),
    ({"local": True}, 4, Devices(1, 1.0, "nccl", None, True)),
    ({"local": True, "gpus": "all"}, 4, Devices(1, 1.0, "nccl", None, True)),
    ({"local": True, "gpus": "2,"}, 4, Devices(1, 1.0, "nccl", (2,), True)),
    ({"local": True, "gpus": "1"}, 4, Devices(1, 1.0, "nccl", None, True)),
    ({"local": True, "cpus": 1}, 4, Devices(1, 0.0, "gloo", None, True)),
    (HERE | {"gpus": "16"}, 0, Devices(16, 1.0, "nccl")),
    (HERE | {"gpus": "1"}, 4, Devices(1, 1.0, "nccl")),
    (HERE | {"gpus": "16", "backend": "gloo"}, 0, Devices(16, 1.0, "gloo")),
    (HERE | {"cpus": 1}, 4, Devices(1, 0.0, "gloo")),
    (HERE | {"cpus": 8}, 0, Devices(8, 0.0, "gloo")),
    ({"gpus": "2:8"}, 8, Devices(8, 1.0, "nccl", at_least=2)),
    ({"gpus": "2:8"}, 3, Devices(3, 1.0, "nccl", at_least=2)),
    ({"cpus": "2:4"}, 0, Devices(4, 0.0, "gloo", at_least=2)),
    ({"cpus": "2:4", "min_workers": 4}, 0, Devices(4, 0.0, "gloo", at_least=4)),
    ({"cpus": "2:4", "min_workers": 1}, 0, Devices(4, 0.0, "gloo", at_least=2)),
    ({"cpus": 1, "spares": 1}, 0, Devices(1, 0.0, "gloo")),
    ({"gpus": "1", "spares": 1}, 2, Devices(1, 1.0, "nccl")),
    ({"cpus": "1:1"}, 0, Devices(1, 0.0, "gloo", None, True, 1)),
    (HERE | {"gpus": "2:8"}, 0, Devices(8, 1.0, "nccl", at_least=2)),
    (HERE | {"cpus": "2:8"}, 0, Devices(8, 0.0, "gloo", at_least=2)),
]  # fmt: skip
REFUSED = [
    ({"gpus": "0,2", "spares": 1}, 4, "--spares 1: --gpus 0,2 is a worker on each, .*a count, --gpus N"),
    ({"gpus": "4"}, 0, "--gpus 4: 0 GPUs are visible; train on CPUs with --cpus 4"),
    ({"gpus": "4"}, 2, "--gpus 4: 2 GPUs are visible; train on CPUs with --cpus 4, or share .* --backend gloo"),
    ({"gpus": "4", "backend": "gloo"}, 0, "0 GPUs are visible; train on CPUs with --cpus 4"),
    ({"gpus": "all"}, 0, "--gpus all: no GPU is visible; train on CPUs with --cpus 1"),
    ({"gpus": "0"}, 4, "--gpus 0: ask for 1 or more, or train on CPUs with --cpus N"),
    ({"gpus": "0,4"}, 4, "--gpus 0,4: ids must differ and be below 4"),
    ({"gpus": "1,1"}, 4, "--gpus 1,1: ids must differ"),
    ({"gpus": "0,"}, 0, "no GPU is visible; train on CPUs with --cpus"),
    ({"gpus": "-1"}, 4, "--gpus -1 is neither a count"),
    ({"gpus": "two"}, 4, "--gpus two is neither a count .4., nor ids .0,2., nor all"),
    ({"gpus": ""}, 4, "neither a count"),
    ({"gpus": ","}, 4, "neither a count"),
    ({"gpus": "1", "cpus": 1}, 4, "--gpus 1 and --cpus 1 exclude each other"),
    ({"cpus": 2, "backend": "nccl"}, 4, "--backend nccl needs GPUs"),
    ({"backend": "nccl"}, 0, "--backend nccl needs GPUs"),
    (HERE | {"cpus": 2, "backend": "nccl"}, 4, "--backend nccl needs GPUs"),
    ({"local": True, "gpus": "2"}, 4, "--local is one worker in this process, but 2 were asked for"),
    ({"local": True, "gpus": "0,1"}, 4, "--local is one worker in this process, but 2 were asked for"),
    ({"local": True, "gpus": "1"}, 0, "--gpus 1: 0 GPUs are visible"),
    ({"local": True, "cpus": 2}, 0, "--local is one worker in this process, but 2 were asked for"),
    (HERE | {"local": True}, 0, "--local is one worker in this process; it can't join the cluster"),
    (HERE, 4, "--address head:6379 needs a count of workers: --gpus N or --cpus N"),
    (HERE | {"gpus": "all"}, 4, "needs a count"),
    (HERE | {"gpus": "0,1"}, 4, "needs a count"),
    (HERE | {"gpus": "0"}, 4, "needs a count"),
    (HERE | {"gpus": "1", "cpus": 1}, 4, "exclude each other"),
    ({"gpus": "2:8"}, 1, "--gpus 2:8: 1 GPUs are visible, fewer than 2"),
    ({"gpus": "8:2"}, 8, "--gpus 8:2: a range is MIN:MAX, such as 2:8"),
    ({"gpus": "0:2"}, 8, "--gpus 0:2: a range is MIN:MAX"),
    ({"gpus": "2:"}, 8, "--gpus 2:: a range is MIN:MAX"),
    ({"cpus": "4:2"}, 0, "--cpus 4:2: a range is MIN:MAX, such as 2:8"),
    ({"cpus": "2:4", "local": True}, 0, "--local is one worker in this process, but 4 were asked for"),
    ({"local": True, "spares": 1}, 2, "--spares 1: --local is one worker in this process"),
    ({"cpus": 2, "min_workers": 5}, 0, "--min-workers 5 is more than there are to be: 2"),
    ({"gpus": "2:8", "min_workers": 5}, 4, "--min-workers 5 is more than there are to be: 4"),
    (HERE | {"cpus": 2, "min_workers": 3}, 0, "--min-workers 3 is more than there are to be: 2"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "visible", "devices"), TABLE)
def test_what_a_request_comes_to(asked: dict[str, Any], visible: int, devices: Devices) -> None:
    assert choose(Config(**asked), visible) == devices


@pytest.mark.parametrize(("asked", "visible", "message"), REFUSED)
def test_what_is_refused(asked: dict[str, Any], visible: int, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose(Config(**asked), visible)
    assert re.search(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


@given(
    st.none() | st.sampled_from(["all", "0", "1", "3", "0,1", "1,", "x"]),
    st.none() | st.integers(1, 4) | st.sampled_from(["1:2", "2:3", "3:2"]),
    st.booleans(),
    st.none() | st.just("h:1"),
    st.none() | st.sampled_from(["nccl", "gloo"]),
    st.integers(0, 4),
)
def test_any_request_is_met_or_refused(gpus, cpus, local, address, backend, visible) -> None:
    try:
        devices = choose(Config(gpus=gpus, cpus=cpus, local=local, address=address, backend=backend), visible)
    except UsageError:
        return
    assert devices.count >= 1
    assert devices.backend == "gloo" or devices.gpus_each == 1.0, "nccl can't share a GPU, nor do without"
    assert address or devices.count * devices.gpus_each <= visible
    assert not local or devices.in_process
    assert devices.count == 1 or not devices.in_process
    assert address is None or not devices.in_process
    assert backend in (None, devices.backend) or devices.in_process
    assert cpus is None or (f"{devices.count}", devices.gpus_each) == (str(cpus).rpartition(":")[2], 0)
    assert devices.ids is None or len(devices.ids) == devices.count


@given(st.integers(1, 64), st.integers(1, 16))
def test_shares_fit(workers: int, gpus: int) -> None:
    each = share(workers, gpus)
    assert 0 < each <= 1
    assert each == round(each, 4), "finer than Ray counts"
    assert int(1 / each + 1e-9) * gpus >= workers, "so many whole shares there are on the cards"


def test_devices_in_words() -> None:
    assert str(Devices(1, 0.0, "gloo", None, True)) == "1 CPU worker, in this process"
    assert str(Devices(2, 0.0, "gloo")) == "2 CPU workers, over gloo"
    assert str(Devices(4, 1.0, "nccl")) == "4 GPU workers, over nccl"
    assert str(Devices(4, 0.25, "gloo")) == "4 0.25 GPU workers, over gloo"
    assert str(Devices(8, 1.0, "nccl", at_least=2)) == "2 to 8 GPU workers, over nccl"
    assert str(Devices(2, 0.0, "gloo", at_least=2)) == "2 CPU workers, over gloo"


@pytest.mark.parametrize(("named", "hidden"), [(None, "2,3"), ("4,5,6,7", "6,7"), ("a,b,c,d", "c,d")])
def test_ids_mean_the_same_gpus_when_a_run_begins_again(named, hidden, monkeypatch: pytest.MonkeyPatch) -> None:
    "In the same process, from which all others are hidden by then."
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    seen = lambda: os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3").split(",")  # noqa: E731
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(seen()))
    seen_at_first.cache_clear()
    try:
        for _ in range(3):
            assert visible_devices(Config(gpus="2,3")).count == 2
            assert os.environ["CUDA_VISIBLE_DEVICES"] == hidden
    finally:
        seen_at_first.cache_clear()
