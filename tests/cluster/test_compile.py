"Workers that train through torch.compile: what holds of a run without it holds of one with it."

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from cluster.comms import Solo
from cluster.messages import Chunk, Job
from cluster.ray_gang import RayGang
from cluster.reducer import GradientSum
from cluster.worker import Worker
from learner.batchnorm import BatchNorm
from learner.callbacks import Compile
from learner.layers import AdaptivePool, Linear
from learner.module import Sequential
from learner.pieces import in_pieces
from learner.xresnet import ResBlock
from tests.chaos.injector import Fault, Plan

CHUNK = Chunk(True, 0, 0, 0, tuple({"lr": 0.1 / (1 + i), "momentum": 0.5 + i / 20} for i in range(7)))


class Compiler:
    "Runs graphs as they are, and fails in the run of that number."

    def __init__(self, fails: int = -1) -> None:
        self.fails, self.graphs, self.runs = fails, 0, 0
        self.made: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            made = graph.forward(*args)
            self.made += map(weakref.ref, made)
            if self.runs == self.fails:
                raise RuntimeError("CUDA error: no such luck")
            return made

        return run


@pytest.fixture
def worker() -> Iterator[Callable[..., Worker]]:
    "A factory of Workers with a compiler."
    made: list[Worker] = []

    def make(job: Job, compiler: Compiler) -> Worker:
        with patch.object(Compile, "backend", compiler):
            made.append(Worker(job, Solo(), torch.device("cpu"), 1))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def full(job: Job) -> Job:
    "With all that a step may change."
    return replace(job, arch="simple_cnn_bn", momentum=0.9, ema=0.9, accumulate=2, augment="crop", presize=27)


def test_a_full_batch_is_compiled_for_once(worker: Callable[..., Worker], full: Job) -> None:
    compiler = Compiler()
    compiled, plain = worker(replace(full, compile="on"), compiler), worker(full, Compiler())
    assert compiled.run(CHUNK).batches == plain.run(CHUNK).batches
    assert compiled.fingerprint() == plain.fingerprint()
    assert compiler.graphs == 2, "the model and the loss, not those of the epoch's last and smaller batch"


def test_the_report_says_how_long_compiling_took(worker: Callable[..., Worker], full: Job) -> None:
    compiled, plain = worker(replace(full, compile="on"), Compiler()), worker(full, Compiler())
    reports = [compiled.run(replace(CHUNK, epoch=epoch, step=7 * epoch)) for epoch in range(2)]
    first, second = (report.seconds for report in reports)
    assert 0 < first["compiling"] < first["total"]
    assert second["compiling"] == 0
    assert "compiling" not in plain.run(CHUNK).seconds
    assert 7 * reports[0].step_seconds == pytest.approx(first["total"] - first["compiling"]), "what is no hang"


@pytest.mark.slow
def test_the_rate_is_no_part_of_the_code(worker: Callable[..., Worker], full: Job) -> None:
    compiler = Compiler()
    one = worker(replace(full, compile="on"), compiler)
    one.run(CHUNK)
    before = compiler.graphs
    one.run(replace(CHUNK, epoch=1, step=7, hypers=({"lr": 0.003, "momentum": 0.7},) * 7))
    assert compiler.graphs == before


@pytest.mark.slow
def test_resume_is_exact(worker: Callable[..., Worker], full: Job) -> None:
    through, resumed = (worker(replace(full, compile="on"), Compiler()) for _ in range(2))
    through.run(replace(CHUNK, hypers=CHUNK.hypers[:3]))
    resumed.load(through.snapshot())
    rest = replace(CHUNK, first=3, step=3, hypers=CHUNK.hypers[3:])
    assert through.run(rest).batches == resumed.run(rest).batches
    assert through.fingerprint() == resumed.fingerprint()


@pytest.mark.slow
def test_a_checkpoint_fits_a_run_without(worker: Callable[..., Worker], full: Job) -> None:
    compiled, plain = worker(replace(full, compile="on"), Compiler()), worker(full, Compiler())
    compiled.run(CHUNK)
    plain.load(compiled.snapshot())
    assert plain.fingerprint() == compiled.fingerprint()


@pytest.mark.parametrize("run", [8, *(pytest.param(run, marks=pytest.mark.slow) for run in (1, 3, 7, 14))])
def test_a_step_whose_code_fails_is_done_again_without(worker: Callable[..., Worker], full: Job, run: int) -> None:
    "Run 1 is in the trial, 3 in the first step, 8 in the second part of a batch."
    broken, plain = worker(replace(full, compile="on"), Compiler(fails=run)), worker(full, Compiler())
    report, expected = broken.run(CHUNK), plain.run(CHUNK)
    assert report.notes == ["the model trains uncompiled: RuntimeError: CUDA error: no such luck"]
    assert (report.batches, report.own) == (expected.batches, expected.own)
    assert broken.fingerprint() == plain.fingerprint()
    assert broken.run(replace(CHUNK, epoch=1, step=7)).notes == []


@pytest.mark.parametrize("run", [2, 4, 8])
def test_the_second_try_has_the_memory_of_the_first(
    worker: Callable[..., Worker], full: Job, monkeypatch: pytest.MonkeyPatch, run: int
) -> None:
    "Of what failed no frame is left, nor what was computed before: it may be memory that was lacking."
    compiler, left = Compiler(fails=run), list[int]()
    broken = worker(replace(full, compile="on"), compiler)
    predict = broken.learner.predict

    def spy() -> None:
        left.append(sum(made() is not None for made in compiler.made) if compiler.runs == run else -1)
        predict()

    monkeypatch.setattr(broken.learner, "predict", spy)
    broken.run(CHUNK)
    assert next(found for found in left if found >= 0) == 0


def test_auto_leaves_a_cpu_alone(worker: Callable[..., Worker], full: Job) -> None:
    compiler = Compiler()
    worker(replace(full, compile="auto"), compiler).run(CHUNK)
    assert compiler.graphs == 0


@pytest.mark.slow
def test_two_workers_are_one(ray_gang: RayGang, local_gang: Any, drive: Any, full: Job) -> None:
    job = replace(full, arch="simple_cnn", compile="on")
    alone = drive(local_gang(replace(job, compile="off")), job)
    ray_gang.start(job, 2)
    together = drive(ray_gang, job)
    assert len(set(together.prints)) == 1
    for name, array in alone.states[0].items():
        np.testing.assert_allclose(together.states[0][name], array, rtol=5e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["simple_cnn", "simple_cnn_bn"])
def test_a_killed_worker_compiles_anew_while_the_other_waits(
    ray_gang: RayGang, fault_plan: Plan, drive: Any, full: Job, arch: str
) -> None:
    job = replace(full, arch=arch, compile="on")
    before = ray_gang.tolerance
    try:
        prints = []
        for faults in ([], [Fault(1, 3, "backward", "SIGKILL")]):
            fault_plan.write(faults)
            ray_gang.tolerance = replace(before, hang_after=2.0)
            ray_gang.start(job, 2)
            prints.append(set(drive(ray_gang, job).prints))
            assert [[one.kind for one in incident] for incident in ray_gang.incidents] == [["died"]] * len(faults)
        assert prints[0] == prints[1]
        assert len(prints[0]) == 1
    finally:
        fault_plan.write([])
        ray_gang.tolerance = before


class Recorder(Solo):
    "Writes down what is sent."

    def __init__(self) -> None:
        self.sent: list[tuple[str, int, int]] = []

    def start_sum_(self, tensor: torch.Tensor) -> None:
        self.sent.append(("gradients", tensor.storage_offset(), len(tensor)))

    def sum_(self, tensor: torch.Tensor) -> None:
        self.sent.append((f"BatchNorm, {tensor.dtype}", 0, len(tensor)))


@pytest.mark.parametrize("bucket", [1, pytest.param(2000, marks=pytest.mark.slow)])
def test_gradients_and_what_batchnorm_asks_take_turns_as_without(bucket: int) -> None:
    "Compiled code hands over gradients later: not so late that another message would be before them."
    sent = []
    for compiled in (False, True):
        net, comm = Sequential(ResBlock(3, 8, 2), AdaptivePool(), Linear(8, 4)), Recorder()
        norms = [module for module in net.modules() if isinstance(module, BatchNorm)]
        for number, norm in enumerate(norms):
            norm.sum_, norm.number = comm.sum_, number
        reducer = GradientSum(net.parameters(), comm, bucket)
        backend = in_pieces(torch._dynamo.lookup_backend("aot_eager"), norms)
        forward: Any = torch.compile(lambda x, net=net: net(x), backend=backend) if compiled else net
        forward(torch.randn(6, 3, 12, 12)).sum().backward()
        reducer(net.parameters())
        sent.append(comm.sent)
    assert sent[0] == sent[1]
    assert len({what for what, *_ in sent[0]}) == 3, "forward, backward, and gradients"


def everywhere(gang: RayGang, function: Callable[[Any], object]) -> None:
    "Call a function of each of the gang's processes there, be it seated or not."
    gang.ray.get([member.actor.__ray_call__.remote(function) for member in gang.crew.members])


@pytest.fixture
def shared(ray_gang: RayGang) -> Iterator[RayGang]:
    "The gang, where rank 0 has a quick compiler, and the others have none that works."

    def choose(process: Any) -> None:
        import torch._dynamo

        from learner.callbacks import Compile

        def compiler(graph: Any, inputs: Any) -> Any:
            if process.rank:
                raise OSError("no compiler is here")
            return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        Compile.backend = staticmethod(compiler)

    def undo(process: Any) -> None:
        from learner.callbacks import Compile

        Compile.backend = "inductor"

    everywhere(ray_gang, choose)
    yield ray_gang
    everywhere(ray_gang, undo)


@pytest.mark.parametrize("arch", ["simple_cnn_bn", pytest.param("xresnet18", marks=pytest.mark.slow)])
def test_compiled_and_uncompiled_ranks_get_on(shared: RayGang, full: Job, arch: str) -> None:
    "With BatchNorm over all their batches, whose messages must meet: one has a compiler, one lacks it."
    found = []
    for compile in ("off", "on"):
        shared.start(replace(full, arch=arch, compile=compile, batch_size=16, accumulate=1), 2)
        (reports,) = shared.stream([replace(CHUNK, hypers=({"lr": 0.01},) * 3)])
        assert len(set(shared.call("fingerprint"))) == 1
        found.append((reports, shared.call_first("state")))
    (plain, expected), (mixed, state) = found
    assert [report.notes for report in mixed] == [[], ["the model trains uncompiled: OSError: no compiler is here"]]
    np.testing.assert_allclose(mixed[0].losses, plain[0].losses, rtol=1e-3)
    for name, array in expected.items():
        np.testing.assert_allclose(state[name], array, rtol=1e-2, atol=1e-3, err_msg=name)


@pytest.mark.slow
def test_a_step_whose_code_fails_in_the_midst_of_it_is_begun_again_by_all(shared: RayGang, full: Job) -> None:
    "The others wait for what the rank would have asked next: it can't begin alone."
    job = replace(full, accumulate=1)

    def break_down(process: Any) -> None:
        from learner.callbacks import Compile

        runs = []

        def compiler(graph: Any, inputs: Any) -> Any:
            def run(*args: Any) -> Any:
                runs.append(graph)
                if len(runs) == 25 and process.rank == 1:
                    raise RuntimeError("no such luck")
                return graph.forward(*args)

            return run

        Compile.backend = staticmethod(compiler)

    everywhere(shared, break_down)
    said: list[str] = []
    before, shared.notice = shared.notice, said.append
    try:
        shared.start(replace(job, compile="on"), 2)
        reports = [report for reports in shared.stream([CHUNK]) for report in reports]
        assert [note for report in reports for note in report.notes] == [
            "the model trains uncompiled: RuntimeError: no such luck"
        ]
        assert [report.counts for report in reports if report.rank == 0] == [[8] * 3, [8] * 3 + [5]]
        assert len(set(shared.call("fingerprint"))) == 1
        assert len(said) == 1
        assert [[one.kind for one in incident] for incident in shared.incidents] == [["peer"]]
    finally:
        shared.notice = before


@pytest.mark.slow
def test_two_workers_whose_batchnorm_is_shared_are_one(
    ray_gang: RayGang, local_gang: Any, drive: Any, full: Job
) -> None:
    "At a low rate: at a higher one a ReLU's input so near zero that rounding turns it takes the two runs apart."
    job = replace(full, compile="on")
    alone = drive(local_gang(replace(job, compile="off")), job, lr=0.003)
    prints = []
    for _ in range(2):
        ray_gang.start(job, 2)
        together = drive(ray_gang, job, lr=0.003)
        assert len(set(together.prints)) == 1
        prints += together.prints
        for name, array in alone.states[0].items():
            np.testing.assert_allclose(together.states[0][name], array, rtol=1e-3, atol=1e-4)
    assert len(set(prints)) == 1, "the same bits each time"
