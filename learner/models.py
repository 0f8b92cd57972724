"The models that a name chooses."

from __future__ import annotations

import difflib
from collections.abc import Callable
from itertools import pairwise

from learner.errors import UsageError
from learner.layers import AdaptivePool, ConvLayer, Linear
from learner.module import Module, Sequential


def simple_cnn(n_in: int = 3, n_out: int = 10, norm: bool = False) -> Module:
    "The book chapter's network: four convolutions that halve the picture, a mean, a linear layer. 0.1 M parameters."
    widths = [n_in, 16, 32, 64, 128]
    convs = [ConvLayer(a, b, stride=2, norm=norm) for a, b in pairwise(widths)]
    return Sequential(*convs, AdaptivePool(), Linear(widths[-1], n_out))


def simple_cnn_bn(n_in: int = 3, n_out: int = 10) -> Module:
    "`simple_cnn` with a BatchNorm after each convolution."
    return simple_cnn(n_in, n_out, norm=True)


MODELS: dict[str, Callable[[int, int], Module]] = {model.__name__: model for model in (simple_cnn, simple_cnn_bn)}


def build(name: str, n_in: int, n_out: int) -> Module:
    "The model of that name for `n_in` image channels and `n_out` classes; UsageError lists the names if unknown."
    check_name(name)
    return MODELS[name](n_in, n_out)


def check_name(name: str) -> None:
    "Raise UsageError, with the names there are, if `name` is no model."
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"model {name!r} is unknown{hint}; known are {', '.join(MODELS)}")
