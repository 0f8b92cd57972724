"A walk through a DataBlock: what came of each step for one sample and one batch, in words, and where it breaks."

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from learner.data.block import DataBlock, Samples
from learner.data.files import Vocab, check_parts, list_files
from learner.data.labels import label_all
from learner.data.loader import collate, epoch_order
from learner.errors import UserError


@dataclass
class Walk:
    "What came of each step, by name and in order; and the step that broke, with the reason, if one did."

    steps: list[tuple[str, str]]
    broken: tuple[str, str] | None = None

    @property
    def done(self) -> str:
        "The steps that did not break, a line each."
        return "\n".join(f"{number}. {name}: {said}" for number, (name, said) in enumerate(self.steps, 1))

    def __str__(self) -> str:
        if self.broken is None:
            return self.done
        return f"{self.done}\n{len(self.steps) + 1}. {self.broken[0]} breaks: {self.broken[1]}".lstrip()


def summary(block: DataBlock, source: str | Path, n: int = 8) -> Walk:
    "Take one training sample, and then a batch of `n`, through all steps, up to the first that raises an error."
    walk, told, name = Walk([]), _walk(block, source, n), ""
    try:
        for name in told:
            walk.steps.append((name, next(told)))
    except Exception as error:  # a step may be anybody's code, and raise anything
        walk.broken = name, str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return walk


def _walk(block: DataBlock, source: str | Path, n: int) -> Iterator[str]:
    "In turns: the name of the step that comes next, and what came of it."
    yield "get_items"
    files, names = list_files(source, block.get_items)
    yield f"{len(files)} files, the first {names[0]}"
    yield "splitter"
    train, valid = check_parts(block.splitter(names, block.get_y), names)
    chosen = epoch_order(len(train), 42, 0)[:n]
    sample = names[train[chosen[0]]]
    rest = len(names) - len(train) - len(valid)
    yield f"{len(train)} train, {len(valid)} validate, {rest} do neither; the sample to follow is {sample}"
    yield "get_y"
    labels = label_all([names[i] for i in (*train, *valid)], block.get_y)
    yield f"{len(labels)} labels, the sample's {labels[chosen[0]]!r}"
    yield "vocab"
    split = block.open(source)
    yield f"{_classes(split.vocab)} from the training part; the sample's is number {split.train.targets[chosen[0]]}"
    made: Any = split.train.files[chosen[0]]
    for tfm in block.item_tfms:
        yield f"item transform {name_of(tfm)}"
        made = tfm(made)
        yield describe(made)
    yield f"batch of {len(chosen)}"
    batch, targets = collate(Samples(split.train, block.item_tfms), chosen)
    yield f"inputs: {describe(batch)}; targets: {describe(targets)}"
    for tfm in block.batch_tfms:
        yield f"batch transform {name_of(tfm)}"
        batch = DataBlock(batch_tfms=(tfm,)).batch_tfm(batch)(batch)
        yield describe(batch)


def _classes(vocab: Vocab) -> str:
    more = ", ..." if len(vocab) > 10 else ""
    return f"{len(vocab)} classes ({', '.join(vocab.classes[:10])}{more})"


def describe(value: Any) -> str:
    "What kind of value this is, and for numbers their type, shape and range."
    if isinstance(value, Tensor | np.ndarray) and np.prod(value.shape):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        numbers = value.double() if isinstance(value, Tensor) else value.astype(np.float64)
        low, high, mean = float(numbers.min()), float(numbers.max()), float(numbers.mean())
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype} {kind} of shape {tuple(value.shape)}, values {low:.4g} to {high:.4g}, mean {mean:.4g}"
    if isinstance(value, Image.Image):
        return f"{value.mode} picture of {value.width} x {value.height} pixels"
    return f"{type(value).__name__} {reprlib.repr(value)}"


def name_of(tfm: Any) -> str:
    "What to call a transform."
    if isinstance(tfm, partial):
        given = [*map(repr, tfm.args), *(f"{name}={value!r}" for name, value in tfm.keywords.items())]
        return f"{name_of(tfm.func)}({', '.join(given)})"
    return getattr(tfm, "__name__", type(tfm).__name__)
