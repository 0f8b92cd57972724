"A step of two workers: our buckets and flat update against torch's DistributedDataParallel and torch.optim."

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks import torch_models
from benchmarks.ranks import barrier, run_ranks
from benchmarks.timing import aim, interleaved, quotients, shown
from cluster.comms import Comm, Group, Solo
from cluster.reducer import GradientSum
from learner.models import build
from learner.optim import SGD

CASES = (("simple_cnn", 16, 4, 10, 320), ("resnet18", 64, 4, 2, 60))  # model, size, images a rank, steps, rounds
AIMS = {"simple_cnn": 0.9, "resnet18": 1.0}
Step = Callable[[], None]
DDP = "DistributedDataParallel"


def ours(arch: str, x: Tensor, y: Tensor, comm: Comm) -> Step:
    "Our Module, GradientSum and SGD with momentum."
    torch.manual_seed(0)
    net = build(arch, 3, 10)
    reducer = GradientSum(net.parameters(), comm)
    optimizer = SGD(net.parameters(), 1e-3, 0.9, reduce=reducer)

    def step() -> None:
        reducer.weight.fill_(len(x))
        F.cross_entropy(net(x), y, reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def theirs(arch: str, x: Tensor, y: Tensor, **options: Any) -> Step:
    "The same in torch.nn, channels_last as ours."
    torch.manual_seed(0)
    net: Any = getattr(torch_models, arch)().to(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the option's new name is unknown to older versions
        net = DistributedDataParallel(net, broadcast_buffers=False, **options)  # none of ours does that either
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, 0.9)

    def step() -> None:
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def repeated(step: Step, times: int) -> Step:
    "That many steps."

    def many() -> None:
        for _ in range(times):
            step()

    return many


def contest(group: Group, arch: str, size: int, n: int, steps: int, rounds: int) -> dict[str, list[float]]:
    "Seconds of `steps` steps, by alternative and round."
    stream = torch.Generator().manual_seed(group.rank)
    x = torch.randn(n, size, size, 3, generator=stream).permute(0, 3, 1, 2)
    y = torch.randint(10, (n,), generator=stream)
    alternatives = {
        "ours": ours(arch, x, y, group),
        DDP: theirs(arch, x, y),
        f"{DDP}, gradient_as_bucket_view": theirs(arch, x, y, gradient_as_bucket_view=True),
        "ours without exchange": ours(arch, x, y, Solo()),
    }
    return interleaved(
        {name: repeated(step, steps) for name, step in alternatives.items()}, rounds, partial(barrier, group)
    )


def run() -> str:
    "A table of the ratios to DistributedDataParallel."
    lines = ["| model | alternative | ms a step | time over DistributedDataParallel's | aim |", "| --- " * 5 + "|"]
    for arch, size, n, steps, rounds in CASES:
        seconds = run_ranks(2, contest, arch, size, n, steps, rounds)
        count = sum(p.numel() for p in build(arch, 3, 10).parameters())
        for name, times in seconds.items():
            each = sorted(times)[len(times) // 2] / steps * 1e3
            ratios = quotients(seconds, name, DDP)
            cells = shown(ratios, 3), aim(AIMS[arch], ratios) if name == "ours" else ""
            lines.append(f"| {arch}, {count / 1e6:.1f} M parameters | {name} | {each:.2f} | {' | '.join(cells)} |")
    cases = "; ".join(f"{a}: {s} px, {n} images a worker, {r} rounds of {k} steps" for a, s, n, k, r in CASES)
    return f"""\
Forward, backward, all-reduce, SGD with momentum and clearing of gradients, by two processes of one thread over gloo,
few images a step so that the exchange shows. Interleaved; {cases}; medians (quartiles) of the rounds.

""" + "\n".join(lines)
