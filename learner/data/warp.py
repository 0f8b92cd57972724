"Warp: flip, crop, zoom, tilt, turn and light a batch on the device, all its geometry as one interpolation."

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from learner.data.augment import Augment, draws
from learner.errors import UsageError
from learner.memory import send

AUGMENTS = ("none", "crop", "full")
FLIP, AREA, RATIO, LEFT, TOP, ZOOM, TILT_X, TILT_Y, TURN, BRIGHTNESS, CONTRAST = range(11)
COLUMNS = 11  # each change has its column even where it is off, so that one more leaves the others as they were


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How much pictures are changed in training; names and defaults are those of fastai's aug_transforms.

    `scale` and `ratio` are the bounds of the random resized crop: its share of the picture's area, uniform, and its
    width over its height, uniform in logarithms (Szegedy et al., https://arxiv.org/abs/1409.4842, take 0.08 to 1 and
    3/4 to 4/3; fastai starts at 0.35 for small nets). A crop that would not fit is never drawn. `max_rotate` is in
    degrees; `max_warp` is the share by which one side shrinks and its opposite grows; `max_lighting` of 0.2 changes
    contrast by up to 1/0.8 and moves mid-grey to 0.4 or 0.6. `p_affine` and `p_lighting` are the shares of pictures
    that each zoom, warp, turn or lighting change befalls. `valid_crop` is the side of validation's centre crop, which
    is resampled, as a share of the picture's (ImageNet's 224 of 256); 0 cuts out `size` pixels as they are stored.
    UsageError on construction if a value breaks its rule.
    """

    p_flip: float = 0.5
    scale: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    min_zoom: float = 1.0
    max_zoom: float = 1.1
    max_rotate: float = 10.0
    max_warp: float = 0.2
    p_affine: float = 0.75
    max_lighting: float = 0.2
    p_lighting: float = 0.75
    valid_crop: float = 7 / 8

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> AugmentConfig:
        "From a table of a configuration file, whose pairs are lists; UsageError for a name that there is not."
        known = [one.name for one in fields(cls)]
        if unknown := [name for name in values if name not in known]:
            raise UsageError(f"augmentation has no {', '.join(unknown)}; it has {', '.join(known)}")
        pairs: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**pairs)

    @classmethod
    def window(cls, side: float, p_flip: float = 0.5) -> AugmentConfig:
        "No more than a square crop whose side is this share of the picture's, anywhere in it, and a flip."
        off: dict[str, Any] = {"max_zoom": 1.0, "max_rotate": 0.0, "max_warp": 0.0, "max_lighting": 0.0}
        return cls(p_flip=p_flip, scale=(side**2, side**2), ratio=(1.0, 1.0), valid_crop=0.0, **off)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            count = 2 if name in ("scale", "ratio") else 1
            numbers = value if isinstance(value, tuple) else (value,)
            fits = len(numbers) == count and all(isinstance(one, int | float) for one in numbers)
            self._require(name, fits, "a number" if count == 1 else "two numbers")
        (small, large), (narrow, wide), warp = self.scale, self.ratio, 0.5 * min(1.0, self.min_zoom)
        self._require("scale", 0 < small <= large <= 1, "two rising numbers above 0, up to 1")
        self._require("ratio", 0 < narrow <= 1 <= wide < math.inf, "one number up to 1 and one from 1 on")
        self._require("max_zoom", 0 < self.min_zoom <= self.max_zoom < math.inf, f"min_zoom={self.min_zoom} or more")
        self._require("max_rotate", 0 <= self.max_rotate <= 180, "0 to 180 degrees")
        self._require("max_warp", 0 <= self.max_warp < warp, f"at least 0 and below {warp:g}, or the picture folds")
        self._require("max_lighting", 0 <= self.max_lighting < 1, "at least 0 and below 1")
        for name in ("p_flip", "p_affine", "p_lighting", "valid_crop"):
            self._require(name, 0 <= getattr(self, name) <= 1, "0 to 1")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UsageError(f"{name}={getattr(self, name)} is not possible in augmentation: it must be {rule}")


class Warp:
    """Change pictures at random in training as `config` says; in validation cut out the centre.

    Called as Augment is: uint8 (n, h, w, channels), whether it is training, the step, and where the n samples stand
    in the global batch. Gives (n, side, side, channels): in training float32 from 0 to 255, where side is `train_size`
    (it may be set between batches), in validation `size` (bytes where `valid_crop` is 0). All that is drawn is
    worked out on the CPU, so that every device gets the same numbers; `render` does the rest and can be captured or
    compiled.
    """

    def __init__(self, size: int, seed: int, config: AugmentConfig) -> None:
        self.size, self.train_size, self.seed, self.config = size, size, seed, config
        self._cut = Augment(size, seed)

    def __call__(self, x: Tensor, training: bool, step: int, rows: Tensor | None = None) -> Tensor:
        if not training:
            return self._centre(x)
        n, height, width, _ = x.shape
        if rows is None:
            rows = torch.arange(n)
        random = draws(self.seed, step, int(rows.max()) + 1 if n else 0, COLUMNS)[rows].double()
        maps = send(homographies(random, self.config, width / height), x.device)
        tables = send(light_tables(random, self.config), x.device) if self.config.max_lighting else None
        widest = self.config.scale[1] ** 0.5 / self.config.min_zoom
        finer = _fineness(widest * min(height, width), self.train_size)
        return render(x, maps, tables, self.train_size, finer, affine=not self.config.max_warp)

    def _centre(self, x: Tensor) -> Tensor:
        if not self.config.valid_crop:
            return self._cut(x, False, 0)
        side = self.config.valid_crop
        maps = torch.eye(3, device=x.device)  # made there: a copy would be waited for
        maps[:2] *= side
        finer = _fineness(side * min(x.shape[1:3]), self.size)
        return render(x, maps.expand(len(x), 3, 3), None, self.size, finer, affine=True)


def _fineness(pixels: float, size: int) -> int:
    "Into how many samples a side to split each pixel of `size`, so that `pixels` stored ones are all seen."
    return max(1, round(pixels / size))


def make_augment(
    mode: str, size: int, presize: int, seed: int, config: AugmentConfig | None = None, progressive: bool = False
) -> Augment | Warp | None:
    """What changes pictures kept at `presize` for a model that ends at `size`, in the way that `mode` in AUGMENTS says.

    Pictures that are larger than the model's are cropped in any mode. `config` is for full; the sizes of a
    `progressive` run must be resampled, so that crop and none become Warps too.
    """
    if mode not in AUGMENTS:
        raise UsageError(f"augmentation {mode!r} is unknown; known are {', '.join(AUGMENTS)}")
    if mode == "full":
        return Warp(size, seed, config or AugmentConfig())
    if progressive:
        return Warp(size, seed, AugmentConfig.window(size / presize, 0.5 if mode == "crop" else 0.0))
    return Augment(size, seed) if mode == "crop" or presize != size else None


# What is drawn: `random` is (n, COLUMNS) float64 in [0, 1), one row a picture. In maps, the picture's sides are at -1
# and 1, x runs right and y down.


def homographies(random: Tensor, config: AugmentConfig, aspect: float = 1.0) -> Tensor:
    """Maps from the places of the result to those of the picture they are read from, (n, 3, 3) float32.

    They act on columns (x, y, 1): first into the crop's window, then the tilt, then the turn, so that only a crop near
    the border can see beyond it. `aspect` is the picture's width over its height.
    """
    return (_turn(random, config, aspect) @ _tilt(random, config) @ _window(random, config)).float()


def _window(random: Tensor, config: AugmentConfig) -> Tensor:
    low, high = config.scale
    area = low + (high - low) * random[:, AREA]
    fits = -area.log()  # a window of this area is inside the picture if |log ratio| is no more
    narrow, wide = -fits.clamp(max=-math.log(config.ratio[0])), fits.clamp(max=math.log(config.ratio[1]))
    stretch = ((narrow + (wide - narrow) * random[:, RATIO]) / 2).exp()
    zoom = _some(random[:, ZOOM], config.p_affine, config.min_zoom, config.max_zoom, otherwise=1.0)
    side = area.sqrt() / zoom
    width, height = side * stretch, side / stretch
    x, y = (1 - width) * (2 * random[:, LEFT] - 1), (1 - height) * (2 * random[:, TOP] - 1)
    return _matrices([[torch.where(random[:, FLIP] < config.p_flip, -width, width), 0, x], [0, height, y], [0, 0, 1]])


def _tilt(random: Tensor, config: AugmentConfig) -> Tensor:
    "Two keystones: the side at x = -1 stays there and grows by 1 + a, the one at x = 1 by 1 - a; so along y, by b."
    a, b = (_some(random[:, column], config.p_affine, -config.max_warp, config.max_warp) for column in (TILT_X, TILT_Y))
    across = _matrices([[1, 0, a], [0, 1 - a * a, 0], [a, 0, 1]])
    down = _matrices([[1 - b * b, 0, 0], [0, 1, b], [0, b, 1]])
    return across @ down


def _turn(random: Tensor, config: AugmentConfig, aspect: float) -> Tensor:
    most = math.radians(config.max_rotate)
    angle = _some(random[:, TURN], config.p_affine, -most, most)
    cos, sin = angle.cos(), angle.sin()
    return _matrices([[cos, -sin / aspect, 0], [sin * aspect, cos, 0], [0, 0, 1]])


def _some(random: Tensor, p: float, low: float, high: float, otherwise: float = 0.0) -> Tensor:
    "Uniform from `low` to `high` for a share `p`, else `otherwise`: below p, a uniform number is one in [0, p)."
    return torch.where(random < p, low + (high - low) * random / max(p, 1e-9), otherwise)


def _matrices(rows: list[list[Any]]) -> Tensor:
    given = next(one for row in rows for one in row if isinstance(one, Tensor))
    return torch.stack([torch.stack([given.new_ones(len(given)) * one for one in row], -1) for row in rows], -2)


def light_tables(random: Tensor, config: AugmentConfig) -> Tensor:
    """What each byte becomes in each picture, (n, 256) float32 from 0 to 255.

    Contrast multiplies the logit and brightness is added to it, as in fastai, so that nothing is cut off at black or
    white. A byte has 256 values: a table costs nothing, and reading it replaces the conversion to float.
    """
    most = config.max_lighting
    brightness = _some(random[:, BRIGHTNESS], config.p_lighting, -most, most)
    contrast = _some(random[:, CONTRAST], config.p_lighting, math.log(1 - most), -math.log(1 - most)).exp()
    logits = torch.linspace(0, 1, 256, dtype=torch.float64).logit(1e-7)
    lit = contrast[:, None] * logits + ((1 + brightness) / 2).logit()[:, None]
    return (255 * lit.sigmoid()).float()


# What is done on the device: fixed shapes, no waiting.


def render(x: Tensor, maps: Tensor, tables: Tensor | None, size: int, finer: int = 1, affine: bool = False) -> Tensor:
    """The pictures uint8 (n, h, w, c), lit by `tables` (n, 256), seen through `maps` (n, 3, 3).

    Gives float32 (n, size, size, c). Bilinear, and beyond the border the picture is reflected. Each pixel is the mean
    of `finer` x `finer` samples: without them, stored pixels would be skipped (aliasing) where the crop has many more
    than `size`. `affine` saves the division where no map has a perspective.
    """
    planes = _planes(x, tables)
    if not len(x):
        return x.new_empty((0, size, size, x.shape[3]), dtype=torch.float32)
    y = F.grid_sample(planes, grid(maps, size * finer, affine), padding_mode="reflection", align_corners=False)
    return _mean(y, finer).permute(0, 2, 3, 1)


def _mean(x: Tensor, k: int) -> Tensor:
    "The means of squares of k x k; on a CPU four times as fast as F.avg_pool2d."
    if k == 1:
        return x
    rows = reduce(torch.add, [x[:, :, i::k] for i in range(k)])
    return reduce(torch.add, [rows[..., i::k] for i in range(k)]) / k**2


def _planes(x: Tensor, tables: Tensor | None) -> Tensor:
    if tables is None:
        return x.permute(0, 3, 1, 2).contiguous().float()
    n, height, width, channels = x.shape
    lit = [tables.gather(1, x[..., c].reshape(n, height * width).long()) for c in range(channels)]
    return torch.stack(lit, 1).view(n, channels, height, width)


def grid(maps: Tensor, size: int, affine: bool) -> Tensor:
    "Where each pixel of a square of `size` is read, (n, size, size, 2) float32: `maps` at the pixels' centres."
    centres = (2 * torch.arange(size, device=maps.device) + 1) / size - 1
    across = maps[:, :, :1] * centres + maps[:, :, 2:]
    down = maps[:, :, 1:2] * centres
    x, y, w = (across[:, None, row] + down[:, row, :, None] for row in range(3))
    return torch.stack((x, y) if affine else (x / w, y / w), -1)
