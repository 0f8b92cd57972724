"""What only a GPU can show: `make gpu`. What can, is also tried on the CPU (slow), so that the tests are tested too.

Figures may differ in their last digits between devices, and between code that was compiled and code that was not, and
on a GPU from one run to the next: its sums come in any order.
"""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cluster.comms import GROUPS, Group, NcclGroup, PeerLost, Solo
from cluster.gang import LocalGang
from cluster.meeting import CALLED_OFF, KeyStore
from cluster.messages import Job, Report
from cluster.worker import Worker
from learner.batchnorm import BatchNorm
from learner.callbacks import Compile
from learner.data.feed import Feed
from learner.data.mix import MixConfig
from learner.data.normalize import Normalize
from learner.dropout import Dropout, sample_keys, set_keys
from tests.chaos.test_launch_faults import Launch, processes
from tests.cluster.conftest import chunks, drive  # noqa: F401
from tests.learner.test_feed import Numbers
from tests.learner.test_pieces import model, run

GPUS = torch.cuda.device_count()
no_gpu = pytest.mark.skipif(not GPUS, reason="no GPU")
gpu = [pytest.mark.gpu, no_gpu]
DEVICES = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=gpu)]
RTOL, ATOL = 2e-3, 2e-4  # 14 steps in float32

Start = Callable[[Job, str], LocalGang]


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    "Convolutions of float32 too: a GPU's are rounded to 10 bits, unless that is forbidden."
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = tf32


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    "A factory of LocalGangs."
    gangs, threads = list[LocalGang](), torch.get_num_threads()

    def make(job: Job, device: str) -> LocalGang:
        gangs.append(LocalGang(job, device, tmp_path))
        return gangs[-1]

    with patch.dict(os.environ):
        yield make
    for gang in gangs:
        gang.close()
    torch.set_num_threads(threads)


@pytest.fixture
def full(job: Job) -> Job:
    "With all that a step may change, and that prepares its batch."
    return replace(job, arch="simple_cnn_bn", momentum=0.9, ema=0.9, augment="crop", presize=27, batch_size=16)


def assert_alike(one: Any, other: Any, rtol: float = RTOL, atol: float = ATOL) -> None:
    "Losses of each step, counts, and weights at the end."
    np.testing.assert_allclose(one.losses, other.losses, rtol=rtol, atol=atol)
    assert one.counts == other.counts
    assert one.valid["loss"][1] == other.valid["loss"][1]
    for name, array in one.states[0].items():
        np.testing.assert_allclose(other.states[0][name], array, rtol=10 * rtol, atol=10 * atol, err_msg=name)


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("augment", ["crop", "full"])
def test_a_gpu_computes_what_a_cpu_does(start: Start, drive: Any, full: Job, augment: str) -> None:  # noqa: F811
    job = replace(full, augment=augment, presize=30)
    assert_alike(*(drive(start(job, device), job) for device in ("cpu", "cuda")))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["plain", "accumulate", "bf16", "grey", "fp16"])
def test_compiled_is_eager(start: Start, drive: Any, full: Job, device: str, recipe: str) -> None:  # noqa: F811
    "Each step has another rate: one that had been made part of a graph would show."
    more: dict[str, Any] = {
        "accumulate": {"accumulate": 2},
        "bf16": {"precision": "bf16"},
        "fp16": {"precision": "fp16"},
        "grey": {"channels": 1, "normalize": Normalize((0.5,), (0.25,))},
    }.get(recipe, {})
    if recipe in ("grey", "fp16") and device == "cpu":
        pytest.skip("for a GPU")
    coarse = 20 if recipe in ("bf16", "fp16") else 1
    eager, compiled = (
        drive(start(job, device), job)
        for job in (replace(full, **more), replace(full, **more, compile="on", on_device=True))
    )
    assert_alike(eager, compiled, coarse * RTOL, coarse * ATOL)


@pytest.mark.parametrize("device", DEVICES)
def test_the_rate_is_no_part_of_the_code(start: Start, full: Job, device: str) -> None:
    job = replace(full, compile="on", ema=0.0)
    gang = start(job, device)
    (warm,) = chunks(job, True, 0, 4)
    gang.call_first("run", warm)
    before = gang.worker.state()
    assert gang.worker.compile is not None
    assert gang.worker.compile.ready
    gang.call_first("run", replace(warm, hypers=({"lr": 0.0, "momentum": 0.0},) * 3))
    parameters = [name for name, _ in gang.worker.learner.model.named_parameters()]
    assert all(np.array_equal(gang.worker.state()[name], before[name]) for name in parameters)
    gang.call_first("run", replace(warm, hypers=({"lr": 0.1, "momentum": 0.0},)))
    assert not any(np.array_equal(gang.worker.state()[name], before[name]) for name in parameters)


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_in_pieces_asks_and_computes_as_without(device: str) -> None:
    x = torch.randn(6, 3, 12, 12, device=device)
    (asked, found), (plain_asked, plain) = (run(model().to(device), x, *how) for how in ((True, "inductor"), (False,)))
    torch.testing.assert_close(asked, plain_asked, rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(found, plain, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_left_out_of_the_graphs(start: Start, full: Job, device: str) -> None:
    "torch says where it would not use CUDA graphs."
    from torch._dynamo.utils import counters

    counters.clear()
    job = replace(full, compile="on", arch="xresnet18", batch_size=8)
    (chunk,) = chunks(job, True, 0, 7)
    (report,) = start(job, device).call("run", chunk)
    assert report.notes == []
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.gpu
@no_gpu
def test_no_batch_is_written_over_while_it_is_used() -> None:
    "The computing stream is slow, the feeding one is ahead, and their memory goes round."
    feed, dataset, sums = Feed("cuda"), Numbers(200), []
    wanted = [[(17 * i + j) % 200 for j in range(64)] for i in range(300)]
    for indices in wanted:
        batch = feed.collate(dataset, indices)()
        torch.cuda._sleep(100_000)
        sums.append(batch.inputs.long().sum())
    assert torch.stack(sums).tolist() == [sum(indices) * 48 for indices in wanted]


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("recipe", ["uncompiled", "compiled", "fed", "bf16", "full", "mixed", "muon", "lamb"])
def test_no_step_waits_for_the_gpu_or_records_a_graph(start: Start, full: Job, recipe: str) -> None:
    "But its chunk's report does. torch raises an error where it would wait, and knows of most cases."
    from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

    more: dict[str, Any] = {
        "muon": {"compile": "off", "optimizer": "muon"},
        "lamb": {"compile": "off", "optimizer": "lamb"},
        "uncompiled": {"compile": "off"},
        "fed": {"on_device": False},
        "bf16": {"precision": "bf16", "accumulate": 2},
        "full": {"augment": "full", "optimizer": "adamw", "clip": 1.0},
        "mixed": {"mix": MixConfig(mixup=0.4, cutmix=1.0), "label_smoothing": 0.1},
    }.get(recipe, {})
    job = replace(full, **{"compile": "on", "on_device": True, "batch_size": 8, **more})
    gang = start(job, "cuda")
    first, second, _ = chunks(job, True, 0, 3)
    gang.call_first("run", first)
    report = gang.worker.report

    def wait() -> Report:
        torch.cuda.set_sync_debug_mode("default")
        return report()

    recorded = AssertionError("a graph was recorded anew")
    with (
        patch.object(gang.worker, "report", wait),
        patch.object(CUDAGraphTreeManager, "record_function", side_effect=recorded),
    ):
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert gang.call_first("run", second).notes == []
        finally:
            torch.cuda.set_sync_debug_mode("default")


COMMS = [
    pytest.param("cpu", "gloo", marks=pytest.mark.slow),
    pytest.param("cuda", "gloo", marks=gpu),
    pytest.param("cuda", "nccl", marks=gpu),
]


@pytest.fixture
def group() -> Iterator[Callable[[str], Group]]:
    "A factory of groups of one rank, which is all that NCCL lets one GPU have."
    store, groups = KeyStore("127.0.0.1"), list[Group]()

    def make(backend: str) -> Group:
        groups.append(GROUPS[backend](0, 1, replace(store.meeting, group=f"{len(groups)}")))
        return groups[-1]

    with patch.dict(os.environ):
        yield make
        for one in groups:
            one.close()


@pytest.mark.parametrize(("device", "backend"), COMMS)
def test_a_group_sums_is_called_off_and_formed_anew(group: Callable[[str], Group], device: str, backend: str) -> None:
    numbers, weights = torch.arange(6.0, device=device), torch.randn(4, 3, 3, 3).to(device)
    for _ in range(2):
        one = group(backend)
        one.broadcast_(weights.contiguous(memory_format=torch.channels_last))
        one.sum_(numbers)
        one.start_sum_(numbers.double())
        one.finish()
        assert numbers.tolist() == [0, 1, 2, 3, 4, 5]
        if isinstance(one, NcclGroup):
            assert dist.group.WORLD.bound_device_id == torch.device("cuda", 0), "it has connected at once"
            one._store.set(CALLED_OFF, "1")
            one.let_go()
            one._aborting.join(30)  # type: ignore[union-attr]
            with pytest.raises(PeerLost):
                one.sum_(numbers)
                one.finish()
        one.close()
        assert not dist.is_initialized()


@pytest.mark.parametrize(("device", "backend"), COMMS)
def test_a_worker_in_a_group_of_one_is_one_alone(
    group: Callable[[str], Group], full: Job, device: str, backend: str
) -> None:
    "Whose buckets are sent while backward runs."
    job = replace(full, arch="xresnet18", batch_size=8, augment="none", presize=24)
    (chunk,), losses = chunks(job, True, 0, 7), []
    for comm in (Solo(), group(backend)):
        worker = Worker(job, comm, torch.device(device), 1)
        assert len(worker.reducer.buckets) > 1
        losses.append(worker.run(chunk).losses)
        worker.close()
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)


@pytest.fixture(scope="module")
def launch(pictures: Path, user_environment: dict[str, str]) -> Iterator[Callable[..., Launch]]:
    "Start the command; what a test leaves of it is killed."
    launches: list[Launch] = []

    def begin(folder: Path, *more: str) -> Launch:
        environment = user_environment | {"NVIDIA_TF32_OVERRIDE": "0"}  # see full_precision
        launches.append(Launch(pictures, folder, environment, "--arch", "simple_cnn", *more))
        return launches[-1]

    yield begin
    for one in launches:
        for pid in processes(one.process.pid):
            os.kill(pid, signal.SIGKILL)
        one.process.communicate()


def rows(launch: Launch) -> np.ndarray:
    "Losses and accuracy of each epoch."
    lines = (launch.path / "history.csv").read_text().splitlines()
    return np.array([[float(number) for number in line.split(",")[1:4]] for line in lines[1:]])


WORKERS = [
    pytest.param(["--cpus", "2", "--compile", "on"], marks=pytest.mark.slow, id="cpus"),
    pytest.param(["--gpus", "2", "--backend", "gloo", "--compile", "auto"], marks=gpu, id="one GPU shared"),
    pytest.param(
        ["--gpus", "2", "--compile", "auto"],
        marks=[pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="no 2 GPUs")],
        id="nccl",
    ),
]


@pytest.mark.parametrize("workers", WORKERS)
def test_a_killed_worker_is_replaced(launch: Callable[..., Launch], tmp_path: Path, workers: list[str]) -> None:
    "And two workers, one of them killed, come to what one does alone."
    alone = launch(tmp_path / "alone", "--local", "--compile", "off")
    assert alone.end()[0] == 0
    hit = launch(tmp_path / "hit", *workers, "--cache", "device")
    hit.until_row(1)
    log = (hit.path / "logs" / "rank_1.log").read_text()
    os.kill(int(log.rpartition("(pid ")[2].split(",")[0]), signal.SIGKILL)
    code, err = hit.end()
    assert code == 0, err
    assert "fault 1: " in hit.out
    assert "Traceback" not in hit.out + err
    np.testing.assert_allclose(rows(hit), rows(alone), rtol=0.02, atol=0.05)
    hit.assert_nothing_is_left()


@pytest.mark.parametrize(
    "device", [["--cpus", "1", "--compile", "on"], pytest.param(["--gpus", "1", "--compile", "auto"], marks=gpu)]
)
@pytest.mark.slow
def test_one_worker_is_local(launch: Callable[..., Launch], tmp_path: Path, device: list[str]) -> None:
    runs = [launch(tmp_path / "given", *device), launch(tmp_path / "local", "--local", *device[2:])]
    assert [run.end()[0] for run in runs] == [0, 0]
    np.testing.assert_allclose(rows(runs[0]), rows(runs[1]), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_dropout_drops_what_it_does_without(device: str) -> None:
    "The second too, whose elements are told from the first one's."
    layers, x = [Dropout(0.3), Dropout(0.3)], torch.ones(8, 3, 5, 5, device=device)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return layers[1](layers[0](x))

    found = []
    for function in (forward, torch.compile(forward, dynamic=False, fullgraph=True)):
        set_keys(layers, sample_keys(1, 2, torch.arange(8)).to(device))
        found.append(function(x) > 0)
    assert torch.equal(*found)


def test_the_compiler_has_a_folder_of_its_own(start: Start, full: Job) -> None:
    "torch's default is below /tmp, by a name that anybody may take first, and what is in there gets executed."
    with patch.dict(os.environ):
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        assert start(replace(full, compile="on"), "cpu").worker.compile is not None
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(Path.home()))
        assert not torch._inductor.config.cpp_cache_precompile_headers, "which go below /tmp"
        assert Compile.backend == "inductor"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_batchnorm_that_is_shared(device: str, dtype: torch.dtype, last: bool) -> None:
    "By two devices with the same batch: each has what one has alone, by torch's own BatchNorm."
    memory = torch.channels_last if last else torch.contiguous_format
    x, grad = (torch.randn(6, 5, 9, 9).to(device, dtype, memory_format=memory) for _ in range(2))
    ours, theirs = BatchNorm(5).to(torch.device(device)), torch.nn.BatchNorm2d(5).to(device)
    ours.sum_ = lambda total: total.mul_(2)
    results = []
    for norm in (ours, theirs):
        own = x.clone().requires_grad_()
        out = norm(own)
        out.backward(grad)
        results.append([out, own.grad, norm.weight.grad, norm.bias.grad, norm.running_mean])
    for one, other in zip(*results):
        tolerance = 1e-4 if one.dtype == torch.float32 == dtype else 2e-2
        torch.testing.assert_close(one.detach(), other.detach(), rtol=tolerance, atol=tolerance)
