"""A 3 or a 7? Chapter 4 of the fastbook ("Under the Hood: Training a Digit Classifier").

Three classifiers of the same pictures, each a little less by hand than the one before:
1. pixel similarity: is a picture nearer to the mean 3 or to the mean 7? Nothing is trained: the baseline to beat.
2. a linear model, trained by a loop that is written out here: predict, loss, gradient, step.
3. simple_net, two linear layers with a ReLU between them, trained by the Learner, which is that same loop.

The chapter prints 0.95, 0.97 and 0.98 on MNIST. `python examples/digits.py mnist_sample` downloads that (3 MB); any
folder with train/3, train/7, valid/3 and valid/7 will do. Without a name THE DIGITS ARE NOT MNIST, nobody wrote them:
they are printed, in fonts that matplotlib brings, then turned, stretched, shifted, thickened, blurred and drowned in
noise so that the task isn't trivial; those that validate are in fonts that never trained.
"""

import sys
import tempfile
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from learner.callbacks.track import TrackResults
from learner.data.files import Labelled, open_split
from learner.data.loader import DataLoaders, Dataset, collate
from learner.data.sources import resolve
from learner.learner import Learner
from learner.losses import digit_loss
from learner.models import linear, simple_net
from learner.optim import SGD

TRAIN = """DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSerif DejaVuSerif-Bold cmr10 cmss10
DejaVuSerif-Italic STIXGeneral STIXGeneralItalic STIXGeneralBolIta DejaVuSans-BoldOblique"""
VALID = "DejaVuSansMono-Oblique DejaVuSerif-BoldItalic STIXGeneralBol cmtt10 cmb10"
FONTS = {"train": TRAIN.split(), "valid": VALID.split()}


def draw(rng: np.random.Generator, digit: str, font: str) -> Image.Image:
    "One digit, white on black, 28 x 28; 20 pixels high and about in the middle, as in MNIST."
    face = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{font}.ttf", 48)
    ink = Image.new("L", (64, 64))
    ImageDraw.Draw(ink).text((32, 32), digit, fill=255, font=face, anchor="mm")
    ink = ink.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
    ink = ink.crop(ink.getbbox()).filter(ImageFilter.MaxFilter(int(rng.choice([1, 3]))))
    ink = ink.resize((round(ink.width * 20 / ink.height * rng.uniform(0.8, 1.2)), 20))
    picture = Image.new("L", (28, 28))
    across, down = rng.choice([-1, 0, 0, 1], 2).tolist()
    picture.paste(ink, ((28 - ink.width) // 2 + across, 4 + down))
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1))))
    noisy = blurred * rng.uniform(0.7, 1) + rng.normal(0, rng.uniform(40, 140), (28, 28))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def generate(folder: Path, n_train: int, n_valid: int, seed: int = 42) -> None:
    "Write folder/{train,valid}/{3,7}/NUMBER.png."
    rng = np.random.default_rng(seed)
    for (part, n), digit in product({"train": n_train, "valid": n_valid}.items(), "37"):
        (folder / part / digit).mkdir(parents=True)
        for number in range(n // 2):
            draw(rng, digit, rng.choice(FONTS[part])).save(folder / part / digit / f"{number}.png")


def accuracy(preds: Tensor, targets: Tensor) -> Tensor:
    "How many are right; a model's one number (n, 1) is above 0 for a 7 (class 1) and below for a 3 (class 0)."
    return ((preds.squeeze(1) > 0) == (targets == 1)).sum()


def loss(preds: Tensor, targets: Tensor) -> Tensor:
    "The chapter's loss: how far sigmoid(preds) is from the right end of 0 to 1."
    return digit_loss(preds.squeeze(1), targets)


def load(part: Labelled) -> tuple[Tensor, Tensor]:
    "All pictures, float32 (n, 1, 28, 28) from 0 to 1, and class numbers: 0 for a 3, 1 for a 7."
    x, y = collate(Dataset(part, size=28, channels=1), range(len(part)))
    return x.permute(0, 3, 1, 2) / 255, y


def main(data: str | None = None, n_train: int = 3000, n_valid: int = 1000, epochs: int = 20) -> dict[str, float]:
    "The three accuracies on a folder or a dataset that has a name, or on digits that are drawn."
    if data is None:
        with tempfile.TemporaryDirectory() as folder:
            print(f"no data was named: {n_train} + {n_valid} digits are drawn from fonts. This is NOT MNIST.")
            generate(Path(folder), n_train, n_valid)
            return main(folder, epochs=epochs)
    torch.manual_seed(42)
    split = open_split(resolve(data, Path("~/.cache/orchestrator")), seed=42)
    (x, y), (valid_x, valid_y) = load(split.train), load(split.valid)
    # 1. Pixel similarity: the mean absolute distance to the mean 3, and to the mean 7; the smaller one wins.
    to_3, to_7 = ((valid_x - x[y == digit].mean(0)).abs().mean((1, 2, 3)) for digit in (0, 1))
    reached = {"pixel similarity": accuracy((to_3 - to_7)[:, None], valid_y).item() / len(valid_y)}

    # 2. A linear model. A loader is whatever gives batches: here a list of them.
    shuffled = torch.randperm(len(x))
    batches = list(zip(x[shuffled].split(256), y[shuffled].split(256)))
    model = linear(n_in=1, n_out=1)
    opt = SGD(model.parameters(), lr=1.0)
    for _ in range(epochs):
        for xb, yb in batches:
            loss(model(xb), yb).backward()
            opt.step()
            opt.zero_grad()
    reached["linear model"] = accuracy(model(valid_x), valid_y).item() / len(valid_y)

    # 3. A network. The Learner runs the loop above, and tells its callbacks; TrackResults prints.
    dls = DataLoaders(batches, [(valid_x, valid_y)])
    track = TrackResults({"accuracy": accuracy})
    Learner(simple_net(n_in=1, n_out=1), dls, loss, lr=0.5, cbs=[track]).fit(epochs)
    reached["simple_net"] = track.history[-1]["accuracy"]

    for name, value in reached.items():
        print(f"{name:<18}{value:.4f}")
    return reached


if __name__ == "__main__":
    main(*sys.argv[1:2])
