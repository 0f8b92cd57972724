"What layers keep of the batches they have seen, such as BatchNorm's running statistics, as a few flat tensors."

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from learner.flat import together
from learner.module import Buffer, Module


class Statistics:
    """The buffers of a model, moved side by side: one tensor of each type, however many layers there are.

    A forward pass changes them before anything can fail, so a step keeps a copy. A copy of each of a ResNet-18's 40
    takes 30 times as long on a CPU (0.13 ms), and 40 kernels instead of one on a GPU.
    """

    def __init__(self, model: Module) -> None:
        alike: dict[torch.dtype, list[Buffer]] = {}
        for buffer in model.buffers():
            alike.setdefault(buffer.dtype, []).append(buffer)
        self.flats = [_side_by_side(buffers) for buffers in alike.values()]
        self.kept = [flat.clone() for flat in self.flats]

    @torch.no_grad()
    def keep(self) -> None:
        "Remember them as they are."
        for kept, flat in zip(self.kept, self.flats):
            kept.copy_(flat)

    @torch.no_grad()
    def put_back(self) -> None:
        "Let them be as they were at the last `keep`."
        for kept, flat in zip(self.kept, self.flats):
            flat.copy_(kept)

    @torch.no_grad()
    def apply(self, change: Callable[[Tensor], object]) -> None:
        "Call `change`, which works in place and element by element, on each of the flat tensors (n,)."
        for flat in self.flats:
            change(flat)


def _side_by_side(buffers: list[Buffer]) -> Tensor:
    flat, views = together([buffer.data for buffer in buffers], buffers)
    for buffer, view in zip(buffers, views, strict=True):
        buffer.data = view
    return flat
