"The update alone, ours on flat buffers against torch.optim's foreach and fused: one process, one thread."

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import interleaved, quotients, shown
from learner.models import build
from learner.optim import LAMB, SGD, Adam, AdamW

ROUNDS = 21
OURS: dict[str, Callable[..., Any]] = {
    "SGD with momentum": lambda p: SGD(p, 1e-3, 0.9, 5e-4),
    "Adam": lambda p: Adam(p, 1e-3),
    "AdamW": lambda p: AdamW(p, 1e-3),
    "LAMB": lambda p: LAMB(p, 1e-3, weight_decay=0.01),
}
THEIRS: dict[str, Callable[..., Any]] = {
    "SGD with momentum": lambda p, **how: torch.optim.SGD(p, 1e-3, 0.9, weight_decay=5e-4, **how),
    "Adam": lambda p, **how: torch.optim.Adam(p, 1e-3, **how),
    "AdamW": lambda p, **how: torch.optim.AdamW(p, 1e-3, **how),
}


def repeated(make: Callable[..., Any], tensors: Sequence[Tensor], times: int, **how: bool) -> Callable[[], None]:
    "So many updates of such parameters, with gradients that stay."
    params = [torch.nn.Parameter(t.detach().clone()) for t in tensors] if how else list(tensors)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = make(params, **how)

    def steps() -> None:
        for _ in range(times):
            optimizer.step()

    return steps


def run() -> str:
    "A table of the times over those of foreach."
    torch.set_num_threads(1)
    lines = ["| model | optimizer | way | ms | time over foreach's |", "| --- | --- | --- | --- | --- |"]
    for arch, times in (("simple_cnn", 50), ("resnet18", 2)):
        for name, make in OURS.items():
            ways = {"ours": repeated(make, build(arch, 3, 10).parameters(), times)}
            if name in THEIRS:
                tensors = build(arch, 3, 10).parameters()
                ways["foreach"] = repeated(THEIRS[name], tensors, times, foreach=True)
                ways["fused"] = repeated(THEIRS[name], tensors, times, fused=True)
            seconds = interleaved(ways, ROUNDS)
            for way in ways:
                each = sorted(seconds[way])[ROUNDS // 2] / times * 1e3
                ratio = shown(quotients(seconds, way, "foreach")) if "foreach" in ways else "torch has none"
                lines.append(f"| {arch} | {name} | {way} | {each:.3f} | {ratio} |")
    note = f"`step()` on gradients that lie ready, one thread; medians (quartiles) of {ROUNDS} interleaved rounds."
    return note + "\n\n" + "\n".join(lines)
