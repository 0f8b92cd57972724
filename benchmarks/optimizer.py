"The update alone, ours on flat buffers against torch.optim's foreach and fused: one process, one thread."

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import interleaved, quotients, shown
from learner.models import build
from learner.optim import LAMB, SGD, Adam, AdamW, Muon

ROUNDS = 21
OURS: dict[str, Callable[..., Any]] = {
    "SGD with momentum": lambda p: SGD(p, 1e-3, 0.9, 5e-4),
    "Adam": lambda p: Adam(p, 1e-3),
    "AdamW": lambda p: AdamW(p, 1e-3),
    "LAMB": lambda p: LAMB(p, 1e-3, weight_decay=0.01),
    "Muon": lambda p: Muon(p, 1e-3),
}


def both(make: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    "The two ways in which torch updates many parameters."
    return {"foreach": partial(make, foreach=True), "fused": partial(make, fused=True)}


def matrices_by_muon(params: Sequence[Tensor]) -> torch.optim.Optimizer:
    "torch's takes matrices alone: biases and BatchNorm are left out, and it has the less to do."
    matrices = [torch.nn.Parameter(p.detach().flatten(1)) for p in params if p.dim() > 1]
    for p in matrices:
        p.grad = torch.randn_like(p)
    return torch.optim.Muon(matrices, 1e-3)


THEIRS: dict[str, dict[str, Callable[..., Any]]] = {
    "SGD with momentum": both(lambda p, **how: torch.optim.SGD(p, 1e-3, 0.9, weight_decay=5e-4, **how)),
    "Adam": both(lambda p, **how: torch.optim.Adam(p, 1e-3, **how)),
    "AdamW": both(lambda p, **how: torch.optim.AdamW(p, 1e-3, **how)),
    "LAMB": {},
    "Muon": {"torch's, matrices alone": matrices_by_muon},
}


def repeated(make: Callable[..., Any], params: Sequence[Tensor], times: int) -> Callable[[], None]:
    "So many updates of such parameters, with gradients that stay."
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = make(params)

    def steps() -> None:
        for _ in range(times):
            optimizer.step()

    return steps


def run() -> str:
    "A table of the times over those of torch's first way."
    torch.set_num_threads(1)
    lines = ["| model | optimizer | way | ms | time over torch's first way |", "| --- | --- | --- | --- | --- |"]
    for arch, times in (("simple_cnn", 50), ("resnet18", 1)):
        for name, make in OURS.items():
            ways = {"ours": repeated(make, list(build(arch, 3, 10).parameters()), times)}
            for way, theirs in THEIRS[name].items():
                params = [torch.nn.Parameter(p.detach()) for p in build(arch, 3, 10).parameters()]
                ways[way] = repeated(theirs, params, times)
            seconds, peer = interleaved(ways, ROUNDS), next(iter(THEIRS[name]), None)
            for way in ways:
                each = sorted(seconds[way])[ROUNDS // 2] / times * 1e3
                ratio = shown(quotients(seconds, way, peer)) if peer else "torch has none"
                lines.append(f"| {arch} | {name} | {way} | {each:.3f} | {ratio} |")
    note = f"`step()` on gradients that lie ready, one thread; medians (quartiles) of {ROUNDS} interleaved rounds."
    return note + "\n\n" + "\n".join(lines)
