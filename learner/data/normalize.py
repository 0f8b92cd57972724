"Normalize: bytes to numbers of mean 0 and variance 1 per channel."

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalize:
    "Per-channel `mean` and `std` of pictures scaled to [0, 1]."

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, batch: Tensor) -> Normalize:
        "The statistics of a batch, uint8 (n, h, w, channels); a channel that never varies is left unscaled."
        pixels = batch.reshape(-1, batch.shape[-1]).double() / 255
        std, mean = torch.std_mean(pixels, 0, correction=0)
        std = torch.where(std > 0, std, torch.ones_like(std))
        return cls(tuple(mean.tolist()), tuple(std.tolist()))

    def __call__(self, x: Tensor) -> Tensor:
        """uint8, or float32 from 0 to 255, (n, h, w, channels) to float32 (n, channels, h, w), stored channels last.

        Whole rows of width * channels are scaled at once: 4 to 8 times faster than broadcasting over a last dimension
        of 3.
        """
        n, height, width, channels = x.shape
        scale, shift = self._row(x.device, width)
        rows = x.reshape(n * height, width * channels).to(torch.float32, copy=True)
        torch.addcmul(shift, rows, scale, out=rows)
        return rows.view(n, height, width, channels).permute(0, 3, 1, 2)

    @lru_cache(maxsize=8)  # noqa: B019 - a few devices and widths in all
    def _row(self, device: torch.device, width: int) -> tuple[Tensor, Tensor]:
        "Scale and shift of each number of a row."
        std = torch.tensor(self.std, dtype=torch.float64)
        scale = 1 / (255 * std)
        shift = -torch.tensor(self.mean, dtype=torch.float64) / std
        return tuple(row.float().repeat(width).to(device) for row in (scale, shift))  # type: ignore[return-value]

    def invert(self, x: Tensor) -> Tensor:
        "float (n, channels, h, w) as the model sees it back to uint8 (n, h, w, channels) as people do."
        std, mean = (torch.tensor(stat, device=x.device).view(-1, 1, 1) for stat in (self.std, self.mean))
        return ((x * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)

    def as_json(self) -> dict[str, Sequence[float]]:
        "For files that people read."
        return {"mean": self.mean, "std": self.std}
