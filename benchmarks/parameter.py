"What a Parameter costs over a plain tensor and torch's own, and what a bare Tensor subclass would."

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.timing import interleaved, ratios
from learner.module import Parameter

ROUNDS, LOOPS = 41, 300


class Bare(Tensor):
    "The book's way: a subclass with the default `__torch_function__`."


def mlp_step(kind: str, batch: int, width: int):
    "A closure that runs forward and backward through two layers of such parameters."
    make = {
        "tensor": lambda t: t.requires_grad_(),
        "torch.nn.Parameter": torch.nn.Parameter,
        "our Parameter": Parameter,
        "bare subclass": lambda t: Tensor._make_subclass(Bare, t, True),
    }[kind]
    x = torch.randn(batch, width)
    first, second = (make(torch.randn(width, width) / width**0.5) for _ in range(2))

    def step() -> None:
        for _ in range(LOOPS if width < 100 else LOOPS // 10):
            ((x @ first).relu() @ second).sum().backward()

    return step


def run() -> str:
    "A table of ratios to plain tensors."
    torch.set_num_threads(1)
    kinds = ("tensor", "torch.nn.Parameter", "our Parameter", "bare subclass")
    lines = ["| parameters are | step of a tiny MLP (8x8) | step of a 256-wide MLP |", "| --- | --- | --- |"]
    tables = []
    for batch, width in ((8, 8), (64, 256)):
        seconds = interleaved({kind: mlp_step(kind, batch, width) for kind in kinds}, ROUNDS)
        tables.append(ratios(seconds, "tensor"))
    for kind in kinds:
        cells = [f"{table[kind][0]:.2f} ({table[kind][1]:.2f} to {table[kind][2]:.2f})" for table in tables]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    note = f"Time of a forward and backward pass over that with plain tensors: median (quartiles) of {ROUNDS} rounds."
    return note + "\n\n" + "\n".join(lines)
