"""Dropout whose masks are a function of (seed, step, layer, row, element), never taken from a stream.

Each sample has a key, an int64 that is made once a step from the seed, the step and the row at which the sample stands
in the global batch; each layer mixes the keys with the numbers of its elements. So a sample's mask is the same
whichever device has it and in whatever company, and a step that is repeated repeats its masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from learner.errors import UsageError
from learner.module import Module

LOW_32 = (1 << 32) - 1


def mix64(x: Tensor) -> Tensor:
    "Scatter int64 numbers over all 64 bits, one to one: the last steps of SplitMix64 (Steele et al., OOPSLA 2014)."
    x = (x ^ _shift(x, 30, 64)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shift(x, 27, 64)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shift(x, 31, 64)


def mix32_(x: Tensor) -> Tensor:
    "Scatter int32 numbers in place over all 32 bits, one to one: lowbias32 (https://nullprogram.com/blog/2018/07/31/)."
    x.bitwise_xor_(_shift(x, 16, 32)).mul_(0x7FEB352D)
    x.bitwise_xor_(_shift(x, 15, 32)).mul_(0x846CA68B - (1 << 32))
    return x.bitwise_xor_(_shift(x, 16, 32))


def _shift(x: Tensor, by: int, bits: int) -> Tensor:
    "Shift integers of `bits` bits right as if they were unsigned, which torch's have no shift for."
    return (x >> by).bitwise_and_((1 << bits - by) - 1)


def sample_keys(seed: int, step: int, rows: Tensor) -> Tensor:
    "A key for each of `rows` (n,) int64, the samples' places in the global batch: int64 (n,), on the device of `rows`."
    key = torch.tensor(seed & LOW_32, device=rows.device)
    for number in (seed >> 32 & LOW_32, step, rows):
        key = mix64(key) + number
    return mix64(key)


class Dropout(Module):
    """In training, zero each element with probability `p` and divide the rest by 1 - p: any shape (n, ...), float.

    Srivastava et al., 2014 (https://jmlr.org/papers/v15/srivastava14a.html). `keys` int64 (n,) decide the masks of the
    batch's n samples; a Learner's SetupLearner sets them for each batch (see `set_keys`). While they are None, each
    call draws its own from torch's global stream. Called twice with the same keys, it draws another mask.
    """

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p < 1:
            raise UsageError(f"dropout p={p} is not a probability below 1; choose at least 0 and less than 1")
        self.p = p
        self.keys: Tensor | None = None
        self.layer = self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        "Same shape and dtype as `x`; in evaluation `x` itself."
        if not self.training or not self.p:
            return x
        keys = self._fresh(x) if self.keys is None else self.keys
        if len(keys) != len(x):
            raise UsageError(
                f"dropout has keys for a batch of {len(keys)} and was called with {len(x)} samples: keep samples in"
                " the first dimension, or evaluate with model.eval()"
            )
        kept = self._kept(keys, x[0].numel() if len(x) else 0).view(x.shape)
        self.calls += 1
        return x * kept * (1 / (1 - self.p))  # the factor apart from the mask: in bf16 it would be rounded by 0.2%

    def _fresh(self, x: Tensor) -> Tensor:
        return torch.randint(1 << 62, (len(x),), device=x.device)

    def _kept(self, keys: Tensor, n: int) -> Tensor:
        "True where an element stays: bool (samples, n)."
        first = (self.layer << 8 | self.calls & 255) << 40
        # compilers count in 32 bits, and add what is to be added to a count in 32 bits too: so this is no addition
        elements = mix64(torch.arange(n, device=keys.device) ^ first).int()
        threshold = int(self.p * (1 << 32)) - (1 << 31)
        return mix32_(keys.int()[:, None] ^ elements) >= threshold


def dropouts(model: Module) -> list[Dropout]:
    "The Dropouts of `model`, in the order in which `set_keys` numbers them."
    return [module for module in model.modules() if isinstance(module, Dropout)]


def set_keys(layers: Sequence[Dropout], keys: Tensor | None) -> None:
    "Decide the next batch's masks by `keys` int64 (n,), each layer's by its place in `layers` too; None: at random."
    for number, layer in enumerate(layers):
        layer.keys, layer.layer, layer.calls = keys, number, 0
