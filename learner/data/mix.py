"""MixUp and CutMix over the global batch: who is mixed with whom, how much, and the mixing.

A sample's partner is the next one of the global batch, and the last one's is the first: the order of an epoch is
random already, so this is a random pairing, and a rank, whose samples are contiguous, loads one more instead of up to
twice as many. MixUp is https://arxiv.org/abs/1710.09412, CutMix https://arxiv.org/abs/1905.04899.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learner.errors import UsageError
from learner.memory import send

STREAM = 1  # sets these random numbers apart from the augmentation's, which have the same seed and step


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """How samples are mixed: `mixup` and `cutmix` are the alphas of Beta(alpha, alpha), 0 to go without.

    With both, each sample takes one of them at even odds. `p` is the share of samples that is mixed at all. The papers
    have 1 for CutMix and, on ImageNet, 0.1 to 0.4 for MixUp. UsageError if a value breaks its rule.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    p: float = 1.0

    def __post_init__(self) -> None:
        for name, most in (("mixup", 100.0), ("cutmix", 100.0), ("p", 1.0)):
            if not 0 <= getattr(self, name) <= most:
                raise UsageError(f"{name}={getattr(self, name)} is not possible in mixing: it must be 0 to {most:g}")

    def __bool__(self) -> bool:
        return self.p > 0 and (self.mixup > 0 or self.cutmix > 0)


def partners(n: int) -> Tensor:
    "With which row of a global batch of `n` each row is mixed: int64 (n,), the next one."
    return (torch.arange(n) + 1) % max(n, 1)


def needed(mine: range, n: int) -> list[int]:
    "The rows of a global batch of `n` that must be loaded to train on the rows `mine`: those, then missing partners."
    return [*mine, *(row for row in partners(n)[mine.start : mine.stop].tolist() if row not in mine)]


def pairs(loaded: Tensor, mine: range, n: int) -> tuple[Tensor, Tensor]:
    """Where among the rows that were `loaded` (int64, of a global batch of `n`) mine are, and where their partners.

    Both int64 (own,). A row whose partner could not be read is its own partner, on every rank: it stays as it is.
    """
    where = {row: place for place, row in enumerate(loaded.tolist())}
    following = partners(n).tolist()
    own = [(place, where.get(following[row], place)) for row, place in where.items() if row in mine]
    table = torch.tensor(own, dtype=torch.int64).view(-1, 2)
    return table[:, 0], table[:, 1]


@dataclass(frozen=True)
class Blend:
    """How much each row keeps of itself: `keep` (n,) float32, the lambda of both papers.

    Where `cut` (n,) bool holds, the partner fills a box of a share 1 - lambda of the picture around `centre` (n, 2), x
    and y in [0, 1), as far as it is inside; elsewhere it shines through everywhere.
    """

    keep: Tensor
    cut: Tensor
    centre: Tensor

    def __getitem__(self, rows: Tensor) -> Blend:
        return Blend(self.keep[rows], self.cut[rows], self.centre[rows])

    def boxes(self, size: int) -> Tensor:
        "The partner's boxes in pictures of `size` square, (n, 4) int64: left, top, right, bottom; empty without `cut`."
        side = (size * (1 - self.keep.double()).clamp(min=0).sqrt() * self.cut).long()[:, None]
        start = (self.centre.double() * size).long() - side // 2
        return torch.cat((start.clamp(min=0), (start + side).clamp(max=size)), 1)


def blend(seed: int, step: int, n: int, config: MixConfig) -> Blend:
    "What is drawn for a global batch of `n`: the same wherever it is asked for."
    stream = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step, STREAM])))
    chance, which, *centre = stream.random((4, n))
    by_mixup, by_cutmix = (
        stream.beta(alpha, alpha, n) if alpha else np.ones(n) for alpha in (config.mixup, config.cutmix)
    )
    cut = which < 0.5 if config.mixup and config.cutmix else np.full(n, bool(config.cutmix))
    keep = np.where(chance < config.p, np.where(cut, by_cutmix, by_mixup), 1.0)
    return Blend(torch.from_numpy(keep).float(), torch.from_numpy(cut), torch.from_numpy(np.stack(centre, 1)))


def mix_images(x: Tensor, other: Tensor, blend: Blend) -> Tensor:
    "Each picture (n, c, size, size) float mixed with the `other` of its row; `blend` may be on the CPU."
    size = x.shape[-1]
    left, top, right, bottom = send(blend.boxes(size), x.device).unbind(1)
    steps = torch.arange(size, device=x.device)
    across = (steps >= left[:, None]) & (steps < right[:, None])
    down = (steps >= top[:, None]) & (steps < bottom[:, None])
    boxed = (down[:, :, None] & across[:, None, :])[:, None]
    everywhere = send(torch.where(blend.cut, 1.0, blend.keep).to(x.dtype), x.device).view(-1, 1, 1, 1)
    return torch.lerp(other, x, torch.where(boxed, 0.0, everywhere))


def mix_targets(y: Tensor, other: Tensor, blend: Blend, size: int, n_classes: int) -> Tensor:
    "Class numbers (n,) int64 as soft targets (n, n_classes) float32: one's own and the partner's, by their shares."
    keep = send(kept(blend, size), y.device)[:, None]
    soft = torch.zeros(len(y), n_classes, device=y.device)
    return soft.scatter_add_(1, y[:, None], keep).scatter_add_(1, other[:, None], 1 - keep)


def kept(blend: Blend, size: int) -> Tensor:
    "The share of each picture that is its own, (n,) float32: lambda, or what the box leaves, by count of pixels."
    left, top, right, bottom = blend.boxes(size).unbind(1)
    return torch.where(blend.cut, 1 - (right - left) * (bottom - top) / size**2, blend.keep)
