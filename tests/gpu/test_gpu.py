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

from cluster.gang import LocalGang
from cluster.messages import Job
from learner.batchnorm import BatchNorm
from learner.callbacks import Compile
from learner.data.feed import Feed
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


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    "A factory of LocalGangs that compute in full precision."
    gangs, threads, tf32 = list[LocalGang](), torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False

    def make(job: Job, device: str) -> LocalGang:
        gangs.append(LocalGang(job, device, tmp_path))
        return gangs[-1]

    with patch.dict(os.environ):
        yield make
    for gang in gangs:
        gang.close()
    torch.backends.cudnn.allow_tf32 = tf32
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
    more: dict[str, Any] = {"accumulate": {"accumulate": 2}, "bf16": {"precision": "bf16"}}.get(recipe, {})
    if recipe in ("grey", "fp16") and device == "cpu":
        pytest.skip("for a GPU")
    more |= {"precision": "fp16"} if recipe == "fp16" else {}
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


@pytest.fixture(scope="module")
def launch(pictures: Path, user_environment: dict[str, str]) -> Iterator[Callable[..., Launch]]:
    "Start the command; what a test leaves of it is killed."
    launches: list[Launch] = []

    def begin(folder: Path, *more: str) -> Launch:
        launches.append(Launch(pictures, folder, user_environment, "--arch", "simple_cnn", *more))
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


def test_the_compiler_has_a_folder_of_its_own(start: Start, full: Job) -> None:
    "torch's default is below /tmp, by a name that anybody may take first, and what is in there gets executed."
    with patch.dict(os.environ):
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
        assert start(replace(full, compile="on"), "cpu").worker.compile is not None
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(Path.home()))
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
