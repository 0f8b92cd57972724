"""An optimizer of one's own, and a data block. After the 2019 lessons of fastai's "Deep Learning from the Foundations".

What one learns: an optimizer is a list of small functions, stats that remember and steppers that move, so that a new
one is written in a few lines; the way from files to batches is a list of steps, each of which can be replaced; and to
look at a batch before training on it.

    python examples/optimizers_and_data.py          trains on images of the generated dataset `shapes`
"""

import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from learner.callbacks.setup import SetupLearner
from learner.callbacks.track import TrackResults
from learner.data import shapes
from learner.data.block import DataBlock, squash
from learner.data.loader import DataLoaders
from learner.data.splitters import where
from learner.data.walk import summary
from learner.errors import UserError
from learner.figures import show_batch
from learner.learner import Learner
from learner.models import simple_cnn_bn
from learner.module import Module
from learner.optim import SGD, Adam, Optimizer, RMSProp

# A stat keeps something of the gradients in `state`; a stepper moves the parameter. What stands behind the * are the
# hyperparameters. Both see many parameters side by side in a flat one, so that they may not ask for a norm or a shape:
# for that see `per_tensor` in learner/optim.py. These five lines are RMSProp.


def remember_squares(p: Tensor, grad: Tensor, state: dict, *, sqr_momentum: float = 0.99) -> None:
    squares = state.setdefault("squares", torch.zeros_like(p))
    squares.mul_(sqr_momentum).addcmul_(grad, grad, value=1 - sqr_momentum)


def scaled_step(p: Tensor, grad: Tensor, state: dict, *, lr: float, eps: float = 1e-8) -> None:
    p.add_(grad / (state["squares"].sqrt() + eps), alpha=-lr)


OurRMSProp = partial(Optimizer, steppers=[scaled_step], stats=[remember_squares])

# And this is Lion (https://arxiv.org/abs/2302.06675), which no name stands for in learner/optim.py: a step of the same
# length for every number, in the direction of a mean of gradients.


def lion_step(p: Tensor, grad: Tensor, state: dict, *, lr: float, beta1: float = 0.9, beta2: float = 0.99) -> None:
    mean = state.setdefault("mean", torch.zeros_like(p))
    p.sub_(lr * (beta1 * mean + (1 - beta1) * grad).sign())
    mean.lerp_(grad, 1 - beta2)


Lion = partial(Optimizer, steppers=[lion_step])


def outline(name: str) -> str:
    "A labeller of one's own, a function of a file's name such as train/ring/ring_00004.JPEG: how is it bounded?"
    return "curved" if name.split("/")[1] in ("circle", "dots", "ring") else "straight"


def trained(opt_func: partial, lr: float, dls: DataLoaders, epochs: int) -> tuple[Module, float]:
    "The same network on the same batches in the same order, by this optimizer; and its last accuracy."
    torch.manual_seed(42)
    dls.train.epoch = 0  # the order of the samples is a function of the seed and the epoch
    model, track = simple_cnn_bn(n_out=2), TrackResults()
    Learner(model, dls, lr=lr, opt_func=opt_func, cbs=[SetupLearner(), track]).fit(epochs)
    return model, track.history[-1]["accuracy"]


def main(picture: Path = Path("batch.png"), n: int = 600, size: int = 32, epochs: int = 3) -> dict[str, float]:
    "The accuracies of the optimizers, and `difference`: how far our RMSProp's weights are from the named one's."
    with tempfile.TemporaryDirectory() as folder:
        shapes.generate(Path(folder), train=n, valid=n // 3)
        block = DataBlock(
            get_y=outline,
            splitter=where(lambda name: name.startswith("val/")),
            item_tfms=[squash(size)],
        )
        print(summary(block, folder))  # one sample through each step; where a step breaks, it says why
        split = block.open(folder)
        dls = block.loaders(split, batch_size=50)
        show_batch(next(iter(dls.train)), split.vocab.classes).save(picture)
        print(f"look at {picture} before you train")

        reached, models = {}, {}
        optimizers = {"SGD": (SGD, 0.1), "RMSProp": (RMSProp, 1e-3), "our RMSProp": (OurRMSProp, 1e-3)}
        for name, (opt_func, lr) in {**optimizers, "Adam": (Adam, 1e-3), "Lion": (Lion, 3e-4)}.items():
            print(f"\n{name}")
            models[name], reached[name] = trained(opt_func, lr, dls, epochs)

    named, ours = (
        torch.cat([p.detach().flatten() for p in models[n].parameters()]) for n in ("RMSProp", "our RMSProp")
    )
    reached["difference"] = (named - ours).abs().max().item()
    print("\n" + "\n".join(f"{name:<14}{value:.4g}" for name, value in reached.items()))

    try:  # a name that no part declares is an error, and not a wish
        OurRMSProp(models["our RMSProp"].parameters(), lr=1e-3, momentum=0.9)
    except UserError as error:
        print(f"\nOurRMSProp(..., momentum=0.9): {error}")
    return reached


if __name__ == "__main__":
    main()
