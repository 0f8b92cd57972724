"The models that a name chooses."

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from learner.errors import UsageError, did_you_mean
from learner.layers import Activation, AdaptivePool, ConvLayer, Linear
from learner.module import Module, Sequential
from learner.resnet import resnet18, resnet34, resnet50
from learner.xresnet import xresnet18, xresnet34, xresnet50

DIGIT = 28  # the digit chapter's pictures are 28 x 28


def linear(n_in: int = 1, n_out: int = 10) -> Module:
    """The digit chapter's first model: a weight for each pixel and class, for pictures of any size.

    At 28 x 28 it sees the pixels themselves; another size is first averaged (or a smaller one repeated) to 28 x 28.
    """
    return Sequential(AdaptivePool(DIGIT), Linear(n_in * DIGIT**2, n_out))


def simple_net(n_in: int = 1, n_out: int = 10) -> Module:
    "The digit chapter's network: 28 x 28 pixels as `linear` sees them, 30 hidden numbers, a ReLU, a linear layer."
    return Sequential(AdaptivePool(DIGIT), Linear(n_in * DIGIT**2, 30), Activation("relu"), Linear(30, n_out))


def simple_cnn(n_in: int = 3, n_out: int = 10, norm: bool = False) -> Module:
    "The book chapter's network: four convolutions that halve the picture, a mean, a linear layer. 0.1 M parameters."
    widths = [n_in, 16, 32, 64, 128]
    convs = [ConvLayer(a, b, stride=2, norm=norm) for a, b in pairwise(widths)]
    return Sequential(*convs, AdaptivePool(), Linear(widths[-1], n_out))


def simple_cnn_bn(n_in: int = 3, n_out: int = 10) -> Module:
    "`simple_cnn` with a BatchNorm after each convolution."
    return simple_cnn(n_in, n_out, norm=True)


def conv_net(n_in: int = 3, n_out: int = 10) -> Module:
    """The 2019 lesson's ConvNet: seven convolutions with BatchNorm, of which all but the first halve the picture.

    The first is as wide as the largest power of two in what it sees of a picture, n_in * 3 * 3 numbers: more could
    only repeat them. The next two double it; then come the lesson's 64, 64, 128 and 256.
    """
    first = 1 << (n_in * 9).bit_length() - 1
    widths = [n_in, first, first * 2, first * 4, 64, 64, 128, 256]
    convs = [ConvLayer(a, b, stride=2 if number else 1, norm=True) for number, (a, b) in enumerate(pairwise(widths))]
    return Sequential(*convs, AdaptivePool(), Linear(widths[-1], n_out))


XRESNETS = (xresnet18, xresnet34, xresnet50)
NAMED = (linear, simple_net, simple_cnn, simple_cnn_bn, conv_net, resnet18, resnet34, resnet50, *XRESNETS)
MODELS: dict[str, Callable[..., Module]] = {model.__name__: model for model in NAMED}
OPTIONS: dict[str, dict[str, bool | str]] = {  # what may stand behind an xresnet's name: xresnet18_mish_se
    "mish": {"act": "mish"}, "silu": {"act": "silu"}, "se": {"excite": True}, "blur": {"blur": True},
}  # fmt: skip


def build(name: str, n_in: int, n_out: int) -> Module:
    "The model of that name for `n_in` image channels and `n_out` classes; UsageError lists the names if unknown."
    model, options = named(name)
    return model(n_in, n_out, **options)


def named(name: str) -> tuple[Callable[..., Module], dict[str, bool | str]]:
    """The function that makes the model of that name, and the options that the name asks it for.

    Behind an xresnet's name come words of OPTIONS in any order. UsageError, with the names there are, for any other.
    """
    base, *words = [name] if name in MODELS else name.split("_")
    options = {key: value for word in words for key, value in OPTIONS.get(word, {}).items()}
    if base not in MODELS or len(options) < len(words) or (words and MODELS[base] not in XRESNETS):
        raise UsageError(
            f"model {name!r} is unknown{did_you_mean(name, MODELS)}; known are {', '.join(MODELS)}; an xresnet may "
            "have _mish or _silu, _se (squeeze and excitation) and _blur behind its name, such as xresnet18_mish_se"
        )
    return MODELS[base], options
