"""How a step's time grows with the number of workers: simulated (simulate.py) from what real steps send and compute.

A step is recorded by one rank that notes each message at the moment when GradientSum or BatchNorm sends it. From this,
and from the time of two messages between two workers, the steps of two and four workers are predicted, and measured.
Then the same for GPUs, of which nothing is measured: compute, networks and latencies are assumptions.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ranks import Ranks, barrier
from benchmarks.simulate import Network, Piece, Protocol, limit, step_time
from benchmarks.timing import interleaved
from cluster.comms import Comm, Group, Solo
from cluster.reducer import GradientSum
from learner.batchnorm import batchnorms
from learner.models import build
from learner.optim import SGD
from learner.statistics import Statistics

ARCH, SIZE, LOCAL = "resnet18", 32, 8  # what is checked here: model, pixels, images a worker
TURNS, ROUNDS = 2, 5
CORES = len(os.sched_getaffinity(0))
MODES = {"BatchNorm shared": True, "--no-sync-batchnorm": False}
ALONE, SMALL, LARGE = "no messages", "a sum of 4 bytes", "a sum of all gradients"

COUNTS, GPU_SIZE, SAMPLE = (8, 16, 64, 256, 1024), 128, 2  # GPUs; pixels; images of a step that is recorded here
NVLINK, TCP = 450e9, 25e-6
NCCL = (Protocol(6.8e-6, 0.6e-6, 5.0e-6, 0.25), Protocol(14e-6, 1.25e-6, 8.5e-6, 0.92))  # LL and LL128 of its table
NCCL_BY_TCP = tuple(replace(protocol, between=protocol.between + TCP) for protocol in NCCL)
NETWORKS = {
    "8 x 400 Gb/s InfiniBand": Network(NVLINK, 400e9, NCCL),
    "100 Gb/s Ethernet": Network(NVLINK, 12.5e9, NCCL_BY_TCP),
    "25 Gb/s Ethernet": Network(NVLINK, 3.125e9, NCCL_BY_TCP),
}
LINE = "\n"  # Python 3.11 has no backslash within an f-string's braces


@dataclass(frozen=True)
class Assumed:
    "Seconds of a GPU: forward and backward, and the update."

    compute: float
    update: float


GPUS = {"simple_cnn": Assumed(1e-3, 0.1e-3), "xresnet50": Assumed(12e-3, 0.5e-3)}


class Recorder(Solo):
    "One rank alone, which notes what it would send, and the compute before."

    def step(self, train: Callable[[], None]) -> list[Piece]:
        "The pieces of a step."
        self.pieces, self.last = list[Piece](), time.perf_counter()
        train()
        self._note(0, False)
        return self.pieces

    def sum_(self, tensor: Tensor) -> None:
        "A message that compute waits for."
        self._note(tensor.nbytes, True)

    def start_sum_(self, tensor: Tensor) -> None:
        "A message in the background."
        self._note(tensor.nbytes, False)

    def finish(self) -> None:
        "Wait for all messages."
        self._note(0, True)

    def _note(self, size: int, waits: bool) -> None:
        now = time.perf_counter()
        self.pieces.append(Piece(now - self.last, size, waits))
        self.last = now


def training(arch: str, size: int, images: int, comm: Comm, shared: bool) -> Callable[[], None]:
    "A step as a worker does it: `shared` BatchNorm, or statistics that are averaged after each step."
    torch.manual_seed(0)
    net = build(arch, 3, 10)
    x = torch.randn(images, size, size, 3).permute(0, 3, 1, 2)
    y = torch.arange(images) % 10
    reducer, statistics = GradientSum(net.parameters(), comm), Statistics(net)
    optimizer = SGD(net.parameters(), 1e-3, 0.9, reduce=reducer)

    def average(params: object) -> None:
        statistics.apply(comm.sum_)
        comm.finish()
        statistics.apply(lambda flat: flat.div_(comm.world_size))

    if not shared:
        optimizer.then(average)
    for norm in batchnorms(net) if shared else ():
        norm.sum_ = comm.sum_

    def step() -> None:
        reducer.weight.fill_(images)
        F.cross_entropy(net(x), y, reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def typical(steps: Sequence[Sequence[Piece]], of: Callable[[list[float]], float]) -> list[Piece]:
    "One step for several alike, piece by piece."
    return [replace(same[0], seconds=of([piece.seconds for piece in same])) for same in zip(*steps, strict=True)]


def recording(group: Group) -> Callable[[], dict[str, list[list[Piece]]]]:
    "To be called for some recorded steps of each mode."
    recorder = Recorder()
    steps = {name: training(ARCH, SIZE, LOCAL, recorder, shared) for name, shared in MODES.items()}
    return lambda: {name: [recorder.step(step) for _ in range(ROUNDS + 1)][1:] for name, step in steps.items()}


def measuring(group: Group) -> Callable[[], dict[str, list[float]]]:
    "To be called for the seconds of some steps of each mode, of steps of each for itself, and of two messages."
    gradients = sum(p.numel() for p in build(ARCH, 3, 10).parameters())
    messages = {SMALL: torch.zeros(1), LARGE: torch.zeros(gradients)}
    actions = {name: training(ARCH, SIZE, LOCAL, group, shared) for name, shared in MODES.items()}
    actions[ALONE] = training(ARCH, SIZE, LOCAL, Solo(), shared=False)
    actions |= {name: partial(group.sum_, message) for name, message in messages.items()}
    return lambda: interleaved(actions, ROUNDS, partial(barrier, group))


def fitted(small: float, large: float, size: float) -> Network:
    "The network on which two ranks' sums take so long: a ring of as many ranks as there are, on one machine."
    return Network(size / (large - small), inf, (Protocol(0, small / 2, 0),), per_node=2**20)


def predicted(pieces: Sequence[Piece], link: Network, n: int) -> float:
    "Seconds on this machine, whose cores compute and send in turn; where workers share one, both take longer."
    each = max(1, n / CORES)
    in_turn = [replace(piece, seconds=each * piece.seconds, waits=True) for piece in pieces]
    return step_time(in_turn, partial(replace(link, within=link.within / each).exchange, n=n))


def checked() -> tuple[Network, list[str]]:
    "The network of two workers, and rows of what is predicted for 1, 2 and 4 beside what was measured."
    alone, many = Ranks(1, recording), {n: Ranks(n, measuring) for n in (2, 4)}
    steps: dict[str, list[list[Piece]]] = defaultdict(list)
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in range(TURNS):
        for name, recorded in alone().items():
            steps[name] += recorded
            seconds[name, 1] += [sum(piece.seconds for piece in step) for step in recorded]
        for n, ranks in many.items():
            for name, times in ranks().items():
                seconds[name, n] += times
    for ranks in (alone, *many.values()):
        ranks.close()
    took = {key: median(times) for key, times in seconds.items()}
    cases = {name: typical(same, median) for name, same in steps.items()}
    size = sum(piece.size for piece in cases["BatchNorm shared"] if not piece.waits)
    cases[ALONE] = [replace(piece, size=0) for piece in cases["--no-sync-batchnorm"]]
    cases |= {SMALL: [Piece(0, 4)], LARGE: [Piece(0, size)]}
    link = fitted(took[SMALL, 2], took[LARGE, 2], size)
    order = [(name, n) for name in cases for n in (1, 2, 4) if (name, n) in took]
    return link, [compared(name, n, predicted(cases[name], link, n), took[name, n]) for name, n in order]


def compared(name: str, n: int, wanted: float, real: float) -> str:
    "A row of the check's table."
    return f"| {name} | {n} | {1e3 * wanted:.2f} ms | {1e3 * real:.2f} ms | {real / wanted:.2f} |"


def on_gpu(pieces: Sequence[Piece], assumed: Assumed) -> list[Piece]:
    "The same step in the time that a GPU is assumed to take, its parts as large, relative to each other, as here."
    end = next(number for number, piece in enumerate(pieces, 1) if piece.waits and not piece.size)
    parts = (pieces[:end], assumed.compute), (pieces[end:], assumed.update)
    return [
        replace(piece, seconds=piece.seconds * seconds / sum(each.seconds for each in part))
        for part, seconds in parts
        for piece in part
    ]


def recorded_here(arch: str, shared: bool) -> list[Piece]:
    "A step of a model that is too large for more than a few steps: of each piece the shortest, as noise only adds."
    recorder = Recorder()
    train = training(arch, GPU_SIZE, SAMPLE, recorder, shared)
    return typical([recorder.step(train) for _ in range(ROUNDS + 1)][1:], min)


def simulated() -> tuple[list[str], list[str]]:
    "For each model: what a step sends, and rows of step time, efficiency and limit."
    torch.set_num_threads(1)  # two get in each other's way on a busy machine, which moves the shares
    sent, rows = [], []
    for arch, assumed in GPUS.items():
        for mode, shared in MODES.items() if batchnorms(build(arch, 3, 10)) else [("no BatchNorm", False)]:
            pieces = on_gpu(recorded_here(arch, shared), assumed)
            sent.append(f"- {arch}, {mode}: {described(pieces)}")
            for name, network in NETWORKS.items():
                cells = " | ".join(cell(pieces, network, n) for n in COUNTS)
                rows.append(f"| {arch}, {mode} | {name} | {cells} |")
    return sent, rows


def described(pieces: Sequence[Piece]) -> str:
    "Buckets and sums of a step."
    total, at, buckets = sum(piece.seconds for piece in pieces), 0.0, []
    for piece in pieces:
        at += piece.seconds
        if piece.size and not piece.waits:
            buckets.append(f"{piece.size / 1e6:.1f} MB at {at / total:.2f}")
    sums = [piece.size for piece in pieces if piece.size and piece.waits]
    more = f"; waited for: {len(sums)}, the largest of {max(sums) / 1e3:.0f} kB" if sums else ""
    return ", ".join(buckets) + more


def cell(pieces: Sequence[Piece], network: Network, n: int) -> str:
    "Step time, efficiency, limit."
    alone, seconds = (step_time(pieces, partial(network.exchange, n=ranks)) for ranks in (1, n))
    return f"{1e3 * seconds:.1f} ms, {alone / seconds:.0%} ({limit(pieces, network, n)})"


def about_check(link: Network, rows: Sequence[str]) -> str:
    "The section on what was measured here."
    return f"""\
### Checked here

{ARCH}, {LOCAL} images of {SIZE} px a worker, one thread each, gloo, {CORES} cores; medians of {TURNS * ROUNDS} rounds,
1, 2 and 4 workers in turn. Compute and update are taken from one worker, and from two the time of {SMALL} and of
{LARGE}: a ring whose links have {link.within / 1e9:.2f} GB/s and {1e6 * link.protocols[0].within:.0f} µs a hop.
All else is predicted from these; nothing of 4 workers went into it. Here the cores that compute also send: nothing is
hidden behind backward, and of 4 workers on {CORES} cores each is taken to compute and send {max(1, 4 / CORES):g} times
as long. Not in the model: workers that are in each other's way in memory (to be seen where there are no messages), and
that whoever waits for a sum waits for the latest.

| step with | workers | predicted | measured | measured / predicted |
| --- | --- | --- | --- | --- |
{LINE.join(rows)}
"""


def about_gpus(sent: Sequence[str], rows: Sequence[str]) -> str:
    "The section on what is assumed and simulated."
    compute = "; ".join(f"{k} {1e3 * v.compute:g} + {1e3 * v.update:g} ms" for k, v in GPUS.items())
    nics = "; ".join(f"{name}: {network.between / 1e9:g} GB/s" for name, network in NETWORKS.items())
    latencies = "; or ".join(
        f"{1e6 * p.begin:g} µs to begin, {1e6 * p.within:g} a hop by NVLink, {1e6 * p.between:g} between nodes, "
        f"{p.share:g} of the bandwidth"
        for p in NCCL
    )
    return f"""\
### For 8 to 1,024 GPUs, simulated

**No figure of this table was measured on a GPU.** What was measured, on this CPU: the messages of a step at
{GPU_SIZE} px, in their order, and the share of the step's compute after which each is sent:

{LINE.join(sent)}

Assumed:

- Compute and update of a GPU, 128 images a step: {compute}. NVIDIA names 2,470
  images/s for ResNet-50 at 224 px on an A100 (DeepLearningExamples, mixed precision): 17 ms for as many pixels as 128
  images of 128 px have; an H100 is taken to be 1.4 times as fast. simple_cnn's is a guess: about a hundred kernels.
- Nodes of 8 GPUs, {NVLINK / 1e9:g} GB/s in each direction by NVLink. All NICs of a node, in each direction:
  {nics}.
  8 GPUs are one node: no network.
- Latencies and protocols of NCCL's own table (src/graph/tuning.cc): {latencies};
  over Ethernet {1e6 * TCP:g} µs a hop more, for TCP. Whichever of ring and tree is faster is taken, as NCCL does by
  this model: of short messages the tree, whose hops grow with log2 of the nodes. A ring of 1,024 GPUs has 2,046 hops.
- One communicator sends one message after the other, so that a sum of BatchNorm waits for the buckets before it.
- BatchNorm computes as fast shared as not. No rank is late (whoever waits for a sum waits for the latest), nor are the
  processors that launch kernels and messages, nor the driver, nor the data.

Time of a step, efficiency (time of one GPU over it), and in brackets what would save most if it cost nothing: compute,
where less than a twentieth is to be saved. Each GPU has 128 images however many there are: the batch grows with them.

| model | between nodes | {" | ".join(f"{n:,} GPUs" for n in COUNTS)} |
|{" --- |" * (2 + len(COUNTS))}
{LINE.join(rows)}
"""


def run() -> str:
    "The check, then the outlook."
    check, outlook = about_check(*checked()), about_gpus(*simulated())
    return f"{(__doc__ or '').strip()}\n\n{check}\n{outlook}"
