"""A Learner from scratch. Chapter 19 of the fastbook ("A fastai Learner from Scratch").

The chapter goes from image files to a trained network with nothing but tensors: Dataset, DataLoader, Module, loss,
optimizer, Learner, callbacks. Here the parts are imported from `learner/` (each is a short file to read beside this
one), and what one learns is how they fit together, and how to change training without touching its loop:
a callback of one's own, the LR finder, and one cycle.

    python examples/learner_from_scratch.py [FOLDER]        with FOLDER/train/CLASS/*.jpg and FOLDER/valid/CLASS/*.jpg

The chapter's data is Imagenette, which is 100 MB (`imagenette160` as FOLDER gets it). Without a folder, some images of
the generated dataset `shapes` take its place: ten classes too, but an easy task.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from learner.callbacks.lr_finder import lr_find
from learner.callbacks.one_cycle import OneCycle
from learner.callbacks.setup import SetupLearner
from learner.callbacks.track import TrackResults
from learner.data import shapes
from learner.data.files import open_split
from learner.data.loader import DataLoader, DataLoaders, Dataset
from learner.data.sources import resolve
from learner.layers import AdaptivePool, ConvLayer, Linear
from learner.learner import Callback, Learner
from learner.losses import cross_entropy
from learner.module import Module, Sequential
from learner.optim import SGD


class Kept:
    "A dataset of one's own: anything with a length and numbered samples. This one reads each file only once."

    def __init__(self, dataset: Dataset) -> None:
        self.samples = [dataset[i] for i in range(len(dataset))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.samples[i]


class LargestGradient(Callback):
    "A callback of one's own, which notes how large gradients are. A method's name says at which event it is called."

    def before_fit(self) -> None:
        "Begin anew."
        self.norms: list[float] = []

    def after_backward(self) -> None:
        "Note the norm of all gradients together; `self.model` is the learner's."
        self.norms.append(sum(p.grad.square().sum().item() for p in self.model.parameters()) ** 0.5)


def simple_cnn(n_out: int) -> Module:
    "The chapter's network, with BatchNorm: four convolutions that each halve the picture, a mean, a linear layer."
    convs = [ConvLayer(n_in, n, stride=2, norm=True) for n_in, n in ((3, 16), (16, 32), (32, 64), (64, 128))]
    return Sequential(*convs, AdaptivePool(), Linear(128, n_out))


def main(
    data: str | None = None, n_train: int = 1500, n_valid: int = 300, size: int = 40, epochs: int = 10
) -> dict[str, float]:
    "Train on a folder or a dataset that has a name, or on so many generated images; the last epoch's row."
    if data is None:
        with tempfile.TemporaryDirectory() as folder:
            print(f"no data was named: {n_train} + {n_valid} images of `shapes` are generated")
            shapes.generate(Path(folder), train=n_train, valid=n_valid)
            return main(folder, size=size, epochs=epochs)
    torch.manual_seed(42)

    # Data. A Dataset gives the bytes of one picture and its class's number, a DataLoader batches of them.
    split = open_split(resolve(data, Path("~/.cache/orchestrator")), seed=42)
    train, valid = Kept(Dataset(split.train, size)), Kept(Dataset(split.valid, size))
    dls = DataLoaders(DataLoader(train, 50, shuffle=True, n_workers=0), DataLoader(valid, 50, n_workers=0))
    x, y = train[0]
    print(f"{len(train)} + {len(valid)} images; the first is {tuple(x.shape)} {x.dtype}: {split.vocab.classes[y]}")

    # Module. Assigning a Parameter or a Module to an attribute registers it, so all parameters can be found.
    model = simple_cnn(len(split.vocab))
    print(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

    # Learner. On its own it predicts, measures and steps. All else are callbacks: SetupLearner puts batches on the
    # device and normalises them; the one that lr_find adds raises the rate at each step, ends the fit when the loss
    # explodes, and puts the model back as it was.
    sgd = partial(SGD, momentum=0.9)
    learn = Learner(model, dls, cross_entropy, cbs=[SetupLearner()], opt_func=sgd)
    finder = lr_find(learn, start=1e-3, end=10)
    lr = finder.suggestion or 0.1
    print(f"LR finder: {len(finder.losses)} steps; a tenth of the rate with the least loss is {lr:.3g}")

    # One cycle: the rate climbs to its peak during the first quarter of all steps, then falls to zero.
    track, cycle, gradients = TrackResults(), OneCycle(lr), LargestGradient()
    learn = Learner(model, dls, cross_entropy, cbs=[SetupLearner(), track, cycle, gradients], opt_func=sgd)
    learn.fit(epochs)
    step = gradients.norms.index(max(gradients.norms))
    print(f"the rate went from {cycle.lrs[0]:.3g} over {max(cycle.lrs):.3g} to {cycle.lrs[-1]:.3g}")
    print(f"the gradient was largest in step {step} of {len(gradients.norms)}: {max(gradients.norms):.3g}")
    return track.history[-1]


if __name__ == "__main__":
    main(*sys.argv[1:2])
