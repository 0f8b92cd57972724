"""A 3 or a 7? Chapter 4 of the fastbook ("Under the Hood: Training a Digit Classifier").

Three classifiers of the same pictures, each a little less by hand than the one before:

1. pixel similarity: is it nearer to the mean 3 or to the mean 7? Nothing is trained; it is the baseline to beat.
2. a linear model, trained by a loop written out here: predict, loss, gradient, step.
3. simple_net, two linear layers with a ReLU between them, trained by the Learner, which is that same loop.

The chapter prints accuracies of about 0.95, 0.97 and 0.98 on MNIST. For MNIST itself, name `mnist_sample` (3 MB are
downloaded) or a folder that has train/3, train/7, valid/3 and valid/7:

    python examples/digits.py mnist_sample

Without a name THE DIGITS ARE NOT MNIST: nobody wrote them by hand. They are printed, in the fonts that matplotlib
brings, and turned, slanted, stretched, thickened, blurred and drowned in noise until they are about as hard.
"""

import argparse
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import torch
from functools import cache
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from learner.callbacks import SetupLearner, TrackResults
from learner.data.files import Labelled, open_split
from learner.data.loader import DataLoader, DataLoaders, Dataset, collate
from learner.data.normalize import Normalize
from learner.data.sources import resolve
from learner.learner import Learner
from learner.losses import digit_loss
from learner.models import linear, simple_net
from learner.optim import SGD

FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
TRAIN_FONTS = """DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic
    STIXGeneral STIXGeneralItalic STIXGeneralBolIta cmr10 cmss10 cmti10""".split()
VALID_FONTS = "DejaVuSansMono-Oblique DejaVuSerif-BoldItalic STIXGeneralBol cmtt10 cmb10".split()


JIT, NOISE = 1, 40
@cache
def face(font: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONTS / f"{font}.ttf", 48)


def draw(rng: np.random.Generator, digit: str, font: str) -> Image.Image:
    "One digit, light on dark, 28 x 28 in grey, of 20 pixels in height and in the middle, as in MNIST."
    ink = Image.new("L", (64, 64))
    ImageDraw.Draw(ink).text((32, 32), digit, fill=255, font=face(font), anchor="mm")
    turn, slant = rng.uniform(-0.25, 0.25), rng.uniform(-0.3, 0.3)
    matrix = np.array([[np.cos(turn), slant - np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    shift = 32 - matrix @ (32, 32)
    ink = ink.transform((64, 64), Image.Transform.AFFINE, np.c_[matrix, shift].ravel(), Image.Resampling.BILINEAR)
    ink = ink.crop(ink.getbbox()).filter(ImageFilter.MaxFilter(rng.choice([1, 3, 5])))
    ink = ink.resize((round(ink.width * 20 / ink.height * rng.uniform(0.8, 1.2)), 20))
    picture = Image.new("L", (28, 28))
    picture.paste(ink, ((28 - ink.width) // 2 + int(rng.integers(-JIT, JIT+1)), 4+ int(rng.integers(-JIT, JIT+1))))
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1))), float)
    noisy = blurred * rng.uniform(0.6, 1) + rng.normal(0, NOISE, (28, 28))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def generate(folder: Path, n_train: int, n_valid: int, seed: int = 42) -> Path:
    "Write folder/{train,valid}/{3,7}/N.png; validation's fonts are others than training's, as MNIST's writers are."
    rng = np.random.default_rng(seed)
    for part, n, fonts in (("train", n_train, TRAIN_FONTS + VALID_FONTS), ("valid", n_valid, TRAIN_FONTS + VALID_FONTS)):
        for digit in "37":
            (folder / part / digit).mkdir(parents=True)
            for number in range(n // 2):
                draw(rng, digit, str(rng.choice(fonts))).save(folder / part / digit / f"{number}.png")
    return folder
