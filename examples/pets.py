"""Which breed is it? Chapter 5 of the fastbook ("Image Classification").

What one learns: labels out of file names by a regular expression; presizing, and augmentation of whole batches in one
interpolation; the LR finder; transfer learning, that is, to train a new head on a frozen body and then all layers, the
first ones at lower rates; and which breeds the model confuses.

`python examples/pets.py pets resnet34.safetensors` downloads 800 MB and wants a GPU; a folder with BREED_N.jpg will do.
The weights are torchvision's (bring them; without, the frozen body is random). Without a name THESE ARE NOT PETS but
images of `shapes`, named as pets are: five classes play ImageNet, on which a small network is pretrained, and the other
five play the breeds.
"""

import sys
import tempfile
from pathlib import Path

import torch

from learner.callbacks.lr_finder import lr_find
from learner.callbacks.outcomes import KeepOutcomes
from learner.callbacks.setup import SetupLearner
from learner.callbacks.track import TrackResults
from learner.data import shapes
from learner.data.block import DataBlock, squash
from learner.data.labels import matching
from learner.data.loader import DataLoaders
from learner.data.sources import resolve
from learner.data.splitters import at_random
from learner.data.walk import summary
from learner.data.warp import make_augment
from learner.figures import confusion_matrix
from learner.groups import body_and_head, replace_head
from learner.interpret import most_confused
from learner.learner import Callback, Learner
from learner.models import resnet34, simple_cnn_bn
from learner.module import Module
from learner.optim import Adam
from learner.resnet import load_torchvision

BATCH = 50
BREED = matching(r"(.+)_\d+.jpg$")  # the label is in the name: great_pyrenees_173.jpg


def pets_like(folder: Path, n: int) -> None:
    "Write `n` images of shapes to folder/imagenet/CLASS_N.jpg and folder/breeds/CLASS_N.jpg, five classes in each."
    shapes.generate(folder / "shapes", train=n, valid=len(shapes.CLASSES))
    for number, name in enumerate(shapes.CLASSES):
        part = folder / ("imagenet", "breeds")[number % 2]
        part.mkdir(exist_ok=True)
        for file in (folder / "shapes" / "train" / name).iterdir():
            file.rename(part / f"{file.stem}.jpg")


def fit(model: Module, dls: DataLoaders, epochs: int, lr: float | slice, *cbs: Callback) -> float:
    "Train what isn't frozen of the model; `lr` may be a slice, from the body's rate to the head's. The last accuracy."
    track = TrackResults()
    Learner(model, dls, lr=lr, cbs=[track, *cbs], opt_func=Adam, splitter=body_and_head).fit(epochs)
    return track.history[-1]["accuracy"]


def fine_tune(model: Module, folder: Path, size: int, epochs: int) -> float:
    "Classify folder/CLASS_N.jpg with a model that knows other classes; the accuracy."
    presize = size * 5 // 4  # first each file becomes a square somewhat larger than needed ...
    block = DataBlock(get_y=BREED, splitter=at_random(0.2, seed=42), item_tfms=[squash(presize)])
    print(summary(block, folder))
    split = block.open(folder)
    dls, classes = block.loaders(split, BATCH), split.vocab.classes
    # ... then a whole batch is cropped, turned, warped and lit at once, on the device, with one interpolation
    setup = SetupLearner(augment=make_augment("full", size, presize, seed=42))

    replace_head(model, len(classes))  # other classes, so the last layer begins anew
    learn = Learner(model, dls, cbs=[setup], opt_func=Adam, splitter=body_and_head)
    learn.freeze()  # all but the last layer, and BatchNorm
    lr = lr_find(learn, start=1e-5, end=1.0).suggestion or 3e-3
    print(f"LR finder: {lr:.2g}, for the head alone")
    fit(model, dls, max(1, epochs // 3), lr, setup)
    learn.unfreeze()  # callbacks.fine_tune does both in one call
    print(f"then all layers, the body's at {lr / 10:.2g}, the head's at {lr:.2g}")
    reached = fit(model, dls, epochs, slice(lr / 10, lr), setup)

    keep = KeepOutcomes(BATCH)  # one more validation, of which each sample's outcome is kept
    Learner(model, dls, cbs=[setup, keep]).one_epoch(train=False)
    confusion = keep.take().confusion(len(classes))
    for pair in most_confused(confusion, 3):
        print(f"{classes[pair.actual]} was taken for {classes[pair.predicted]}: {pair.count} times")
    confusion_matrix(confusion, classes).save("pets.png")
    print(f"accuracy {reached:.4f}; the confusion matrix is in pets.png")
    return reached


def main(data: str | None = None, weights: str | None = None, n: int = 1200, size: int = 40, epochs: int = 6) -> float:
    "Fine-tune on the pets, a folder of such files, or `n` images that are named alike; the accuracy."
    torch.manual_seed(42)
    if data is not None:
        folder = resolve(data, Path("~/.cache/orchestrator"))
        model = load_torchvision(resnet34(), weights) if weights else resnet34()
        return fine_tune(model, folder / "images" if data == "pets" else folder, 224, epochs)
    with tempfile.TemporaryDirectory() as folder:
        print(f"no data was named: {n} images of `shapes` are named as pets are. These are NOT pets. Pretraining:")
        pets_like(Path(folder), n)
        block = DataBlock(get_y=BREED, item_tfms=[squash(size)])
        split = block.open(Path(folder, "imagenet"))
        known = simple_cnn_bn(n_out=len(split.vocab))
        fit(known, block.loaders(split, BATCH), epochs, 0.01, SetupLearner())
        return fine_tune(known, Path(folder, "breeds"), size, epochs)


if __name__ == "__main__":
    main(*sys.argv[1:3])
