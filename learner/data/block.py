"DataBlock: from a folder to batches in steps, any of which can be replaced."

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.data.files import Labelled, Split, image_files, list_files, split_files
from learner.data.images import decode
from learner.data.labels import (
    IS_VALID,
    Labeller,
    Table,
    check_labelling,
    matching,
    parent_label,
    read_table,
    refuse_strangers,
    split_column,
)
from learner.data.loader import DataLoader, DataLoaders, collate, epoch_order
from learner.data.normalize import Normalize
from learner.data.splitters import Splitter, automatic, by_table, locate, make_splitter
from learner.errors import UsageError

Transform = Callable[[Any], Any]


def squash(size: int, channels: int = 3) -> Transform:
    "The item transform that makes a square uint8 (size, size, channels) of a file, whatever the picture's shape."
    return partial(decode, size=size, channels=channels)


@dataclass(frozen=True, kw_only=True)
class DataBlock:
    """The steps from a folder to batches; each default can be replaced.

    `get_items(folder)` lists the files. `splitter(names, get_y)` says which train and which validate, and `get_y(name)`
    what a file is labelled: both see its name, the path below the folder. `item_tfms` make of a file, one after the
    other, an array of the same shape for all, and `batch_tfms` of a batch of them what the model sees. What learns
    from data learns from the training part alone: the classes, and a batch transform that is a class with `of`, such
    as Normalize, which is made from a training batch.
    """

    get_items: Callable[[Any], Iterable[str | Path]] = image_files
    get_y: Labeller = parent_label
    splitter: Splitter = field(default_factory=lambda: automatic(seed=42))
    item_tfms: Sequence[Transform] = (squash(128),)
    batch_tfms: Sequence[Any] = (Normalize,)

    def open(self, source: str | Path) -> Split:
        "The files of the folder `source`, listed, split and labelled; UsageError where a step fails."
        return split_files(source, self.get_items, self.get_y, self.splitter)

    def loaders(self, split: Split, batch_size: int = 64, seed: int = 42, n_workers: int | None = None) -> DataLoaders:
        """Batches (inputs, targets) of what `open` gave; training ones shuffled by `seed`.

        They are as the item transforms make them: SetupLearner has the batch transforms done on the device.
        """
        train, valid = Samples(split.train, self.item_tfms), Samples(split.valid, self.item_tfms)
        return DataLoaders(
            DataLoader(train, batch_size, shuffle=True, n_workers=n_workers, seed=seed),
            DataLoader(valid, batch_size, n_workers=n_workers),
            self.batch_tfm,
        )

    def first_batch(self, split: Split, n: int = 32, seed: int = 42) -> tuple[Tensor, Tensor]:
        "The first `n` samples that such a training loader gives."
        return collate(Samples(split.train, self.item_tfms), epoch_order(len(split.train), seed, 0)[:n])

    def batch_tfm(self, batch: Tensor) -> Transform:
        "All batch transforms as one function, with the state that this training batch gives them."
        made: list[Transform] = []
        for tfm in self.batch_tfms:
            made.append(tfm.of(batch) if isinstance(tfm, type) and hasattr(tfm, "of") else tfm)
            batch = made[-1](batch)
        return partial(_in_turn, made)


def _in_turn(tfms: Sequence[Transform], x: Any) -> Any:
    for tfm in tfms:
        x = tfm(x)
    return x


class Samples:
    "Labelled files as samples: what the item transforms make of each, and its class number, an int64 scalar."

    def __init__(self, labelled: Labelled, item_tfms: Sequence[Transform]) -> None:
        self.labelled, self.item_tfms = labelled, item_tfms

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        made = _in_turn(self.item_tfms, self.labelled.files[i])
        return as_tensor(made), torch.tensor(self.labelled.targets[i])


def as_tensor(made: Any) -> Tensor:
    "Numbers in whatever form, a tensor, array or Pillow image, as a tensor; UsageError for what is none."
    try:
        return made if isinstance(made, Tensor) else torch.from_numpy(np.array(made))
    except TypeError as error:
        raise UsageError(
            f"the last item transform gives a {type(made).__name__}; it must give numbers, as squash(128) does"
        ) from error


def make_block(
    root: str | Path,
    split: str = "auto",
    label_regex: str | None = None,
    labels_csv: str | None = None,
    seed: int = 42,
    **steps: Any,
) -> DataBlock:
    """The block for the folder `root` that these texts mean, as on the command line; `steps` are its other steps.

    `split` as in SPLIT_RULE; labels come from the folders, from `label_regex` or from `labels_csv`, FILE.csv[:COLUMN],
    whose column is_valid splits where `split` is auto. Files are looked for as named, then below `root`.
    """
    check_labelling(label_regex, labels_csv)
    splitter = make_splitter(split, seed, root)
    if label_regex is not None:
        return DataBlock(get_y=matching(label_regex), splitter=splitter, **steps)
    if labels_csv is None:
        return DataBlock(splitter=splitter, **steps)
    file, column = split_column(labels_csv)
    table = read_table(locate(file, root))
    if split == "auto" and IS_VALID in table.columns:
        splitter = by_table(table)
    return DataBlock(get_items=partial(_files_of, table), get_y=table.labels(column), splitter=splitter, **steps)


def _files_of(table: Table, root: str | Path) -> list[str]:
    "All images below `root`; UsageError if the table names others."
    files, names = list_files(root)
    refuse_strangers(table.file, table.rows, names)
    return files
