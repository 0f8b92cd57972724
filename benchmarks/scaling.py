"""A model of the step's time for many workers: measured compute and messages, stated networks.

A step takes the compute of a worker's share, then what of the exchange backward could not hide, then the update. An
all-reduce of S bytes over N ranks in a ring moves 2 (N - 1) / N * S bytes through each link in 2 (N - 1) hops:
    exchange(N) = 2 (N - 1) / N * S / bandwidth + 2 (N - 1) * latency
    step(N) = compute + max(0, exchange(N) - overlap * backward) + update
`overlap` is the share of backward that is still to come when the first bucket is complete.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F

from benchmarks.ranks import barrier, run_ranks
from benchmarks.timing import interleaved
from cluster.comms import Group, Solo
from cluster.reducer import BUCKET, GradientSum
from learner.models import build
from learner.optim import SGD

ARCH, SIZE, LOCAL, ROUNDS = "resnet18", 32, 8, 21


@dataclass(frozen=True)
class Network:
    "A ring's links: bytes a second, and seconds a hop."

    bandwidth: float
    latency: float

    def exchange(self, size: float, n: int) -> float:
        "Seconds of an all-reduce of `size` bytes over `n` ranks."
        return 2 * (n - 1) / n * size / self.bandwidth + 2 * (n - 1) * self.latency if n > 1 else 0.0


NETWORKS = {  # stated, not measured: bandwidth per GPU in each direction, latency of a hop with its software
    "NVLink within a node, 400 Gb/s InfiniBand a GPU between": Network(45e9, 5e-6),
    "100 Gb/s Ethernet a GPU": Network(11e9, 15e-6),
    "25 Gb/s Ethernet a node of 8 GPUs": Network(0.35e9, 30e-6),
}
GPU_CASES = {  # parameters, images a GPU, seconds of compute a step assumed for it: forward and backward, then backward
    "simple_cnn at 128 px, 128 images a GPU": (0.1e6, 128, 2.0e-3, 1.3e-3),
    "xresnet50 at 128 px, 64 images a GPU": (23.5e6, 64, 35e-3, 23e-3),
}


def step_time(compute: float, backward: float, update: float, exchange: float, overlap: float) -> float:
    "Seconds of a step; see the module."
    return compute + max(0.0, exchange - overlap * backward) + update


@dataclass(frozen=True)
class Parts:
    "What a rank measured, in seconds: a whole step, and alone: forward and backward, backward, update, all-reduce."

    step: float
    compute: float
    backward: float
    update: float
    exchange: float


def measured(group: Group) -> Parts:
    "All parts in turns, each while the other ranks do the same, so that they share the machine as they do in a step."
    torch.manual_seed(0)
    net, x, y = build(ARCH, 3, 10), torch.randn(LOCAL, SIZE, SIZE, 3).permute(0, 3, 1, 2), torch.arange(LOCAL)
    reducer, alone = GradientSum(net.parameters(), Solo()), Solo()
    optimizer = SGD(net.parameters(), 1e-3, 0.9, reduce=reducer)
    message = torch.zeros_like(reducer.flat)

    def backward_too() -> None:
        reducer.comm = alone
        F.cross_entropy(net(x), y, reduction="sum").backward()

    def step() -> None:
        reducer.comm = group
        reducer.weight.fill_(LOCAL)
        F.cross_entropy(net(x), y, reduction="sum").backward()
        optimizer.step()

    def update() -> None:
        reducer.comm = alone
        optimizer.step()

    def forward() -> None:
        with torch.no_grad():
            net(x)

    actions = {"step": step, "compute": backward_too, "forward": forward, "update": update,
               "exchange": lambda: group.sum_(message)}  # fmt: skip
    seconds = {name: median(times) for name, times in interleaved(actions, ROUNDS, partial(barrier, group)).items()}
    forward_seconds = seconds.pop("forward")
    return Parts(backward=seconds["compute"] - forward_seconds, **seconds)


def overlap() -> float:
    "The share of backward after the first bucket: by parameters, as the last layers have most and cost least."
    params = build(ARCH, 3, 10).parameters()
    reducer = GradientSum(params, Solo(), BUCKET)
    return 1 - len(reducer.buckets[0].params) / len(params)


def checked() -> str:
    "The model against 1, 2 and 4 workers on this machine."
    lines = ["| workers | compute | all-reduce | update | step, predicted | step, measured | measured / predicted |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for n in (1, 2, 4):
        parts: Parts = run_ranks(n, measured)
        wanted = step_time(parts.compute, parts.backward, parts.update, parts.exchange, 0.0)
        cells = [parts.compute, parts.exchange, parts.update, wanted, parts.step]
        shown = " | ".join(f"{1e3 * value:.1f} ms" for value in cells)
        lines.append(f"| {n} | {shown} | {parts.step / wanted:.2f} |")
    return "\n".join(lines)


def limit(compute: float, network: Network, size: float, n: int, hidden: float) -> str:
    "What costs most beside compute."
    moving = 2 * (n - 1) / n * size / network.bandwidth
    if network.exchange(size, n) <= hidden:
        return "compute"
    return "bandwidth" if moving > 2 * (n - 1) * network.latency else "latency of the ring"


def shown_for_gpus() -> str:
    "Efficiency at 8 to 1,024 GPUs, and what limits it."
    counts = (8, 32, 128, 512, 1024)
    lines = ["| model | network | " + " | ".join(f"{n} GPUs" for n in counts) + " |", "| --- " * 7 + "|"]
    for case, (parameters, _, compute, backward) in GPU_CASES.items():
        for name, network in NETWORKS.items():
            cells, hidden = [], (0.0 if 4 * parameters < 2 * BUCKET else 0.8) * backward
            for n in counts:
                step = compute + max(0.0, network.exchange(4 * parameters, n) - hidden)
                cells.append(f"{compute / step:.0%} ({limit(compute, network, 4 * parameters, n, hidden)})")
            lines.append(f"| {case} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run() -> str:
    "The check, then the outlook."
    networks = "; ".join(f"{k}: {v.bandwidth / 1e9:g} GB/s, {1e6 * v.latency:g} µs a hop" for k, v in NETWORKS.items())
    assumed = "; ".join(f"{k}: {1e3 * v[2]:g} ms" for k, v in GPU_CASES.items())
    return f"""\
{(__doc__ or "").strip()}

Checked here with {ARCH}, {LOCAL} images of {SIZE} px a worker, one thread each, gloo, medians of {ROUNDS} rounds in
turn. All workers of this machine share its cores and memory, so each number of workers has its own measured compute,
update and all-reduce; compute and messages use the same cores, so `overlap` is 0 in the prediction (on a GPU
{overlap():.2f} of backward could hide messages: the first bucket has the last layers).

{checked()}

Shown for GPUs, efficiency (compute over step) and what limits it. Nothing in this table was measured: it is the formula
with stated networks ({networks})
and assumed compute ({assumed}).
float32 gradients; a small model is one bucket and hides nothing. A tree, which NCCL chooses for many ranks, would trade
the ring's latency for less bandwidth.

{shown_for_gpus()}
"""
