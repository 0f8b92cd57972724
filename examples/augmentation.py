"""Augmentation of whole batches on the GPU. After the 2019 lesson of fastai's "Deep Learning from the Foundations".

What one learns: bytes stay bytes until they are on the device; there a whole batch is changed at once, which is much
faster than picture by picture; all geometry is one matrix for each picture and one interpolation, since each further
one blurs; what is drawn depends on the step and on the picture's place in the batch alone, so that many GPUs see what
one would; and one looks at what one trains on.

    python examples/augmentation.py          on images of the generated dataset `shapes`, on the GPU if there is one
"""

import math
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from learner.data import shapes
from learner.data.files import open_split
from learner.data.loader import Dataset, collate
from learner.data.mix import MixConfig, blend, mix_images, partners
from learner.data.warp import AugmentConfig, Warp, render
from learner.figures import image_grid

ROW = 8  # pictures


def turn(degrees: float, n: int) -> Tensor:
    "Matrices that say where each place of the result, (x, y, 1) from -1 to 1, is read in the picture: (n, 3, 3)."
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]]).expand(n, 3, 3)


def turned(x: Tensor, degrees: float) -> Tensor:
    "Pictures uint8 (n, side, side, 3), turned by one interpolation; bytes again."
    return as_bytes(render(x, turn(degrees, len(x)).to(x.device), None, x.shape[1], affine=True))


def as_bytes(x: Tensor) -> Tensor:
    "Numbers from 0 to 255, rounded."
    return x.round().clamp(0, 255).to(torch.uint8)


def sharpness(x: Tensor) -> float:
    "The mean difference of neighbours: what blurring takes away."
    return (x[:, :, 1:].float() - x[:, :, :-1].float()).abs().mean().item()


def mixed(x: Tensor, config: MixConfig) -> Tensor:
    "Each picture mixed with the next one of the batch."
    planes = x.permute(0, 3, 1, 2).float()
    drawn = blend(42, 0, len(x), config)
    return as_bytes(mix_images(planes, planes[partners(len(x))], drawn).permute(0, 2, 3, 1))


def main(picture: Path = Path("augmented.png"), n: int = 64, side: int = 160, size: int = 128) -> dict[str, float]:
    "What was measured, by name; `picture` is of the same pictures in several steps, and mixed."
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        shapes.generate(Path(folder), train=n, valid=10)
        split = open_split(folder, seed=42)
        x, _ = collate(Dataset(split.train, side), range(n))  # presized: once, on the CPU, to a larger square
    x = x.to(device)
    found: dict[str, float] = {}

    # One interpolation or three: the picture is turned as far by both.
    found["sharpness as it is"] = sharpness(x)
    found["turned by 30 degrees"] = sharpness(turned(x, 30))
    found["by 10 degrees, three times"] = sharpness(turned(turned(turned(x, 10), 10), 10))

    # Flip, crop, zoom, perspective, turn and light, all drawn for each picture by itself: by batch, and one by one.
    warp = Warp(size, seed=42, config=AugmentConfig())
    for name, parts in (("seconds, one by one", x.split(1)), ("seconds, as one batch", (x,))):
        warp(x, True, step=0)  # the first call of a kind is slow
        began = time.perf_counter()
        torch.cat([warp(part, True, step=0) for part in parts]).sum().item()  # .item() waits for a GPU
        found[name] = time.perf_counter() - began

    # The second half of the batch by itself, as another GPU would have it: told where it stands, it looks the same.
    whole, rows = warp(x, True, step=7), torch.arange(n // 2, n)
    found["difference of a half"] = (warp(x[n // 2 :], True, 7, rows) - whole[n // 2 :]).abs().max().item()

    # Look at it: in three steps, as validation crops it, then MixUp and CutMix of that.
    first = x[:ROW]
    shown = {f"step {step}": as_bytes(warp(first, True, step)) for step in range(3)}
    shown["validation"] = as_bytes(warp(first, False, 0))
    shown["MixUp"] = mixed(shown["validation"], MixConfig(mixup=0.4))
    shown["CutMix"] = mixed(shown["validation"], MixConfig(cutmix=1.0))
    titles = [name for name in shown for _ in range(len(first))]
    image_grid(torch.cat(list(shown.values())).cpu().numpy(), titles, columns=ROW).save(picture)

    print("\n".join(f"{name:<28}{value:.4g}" for name, value in found.items()))
    print(f"look at {picture}")
    return found


if __name__ == "__main__":
    main()
