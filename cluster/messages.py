"What driver and workers say to each other: the job once, then chunks of steps, and reports of what came of them."

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from learner.data.files import Labelled
from learner.data.mix import MixConfig
from learner.data.normalize import Normalize
from learner.data.warp import AugmentConfig
from learner.interpret import Outcomes
from learner.metrics import Sums


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker is told, the same for all ranks: pictures are `presize` square in memory, `size` in use.

    `augment` is none, crop or full, as `augmentation` says; `mix` is MixUp and CutMix; in a `progressive` run, training
    steps come with a `size` of their own; `channels` is 3, or 1 for pictures in grey;
    `store` is the folder of the store of decoded pictures, if there is to be one;
    `clip` is a bound on the global norm of gradients, `ema` the decay of averaged weights (0: none of either),
    `accumulate` in how many parts a batch goes through the model, `precision` fp32, bf16 or fp16;
    `fine_tune` has the head and the body in groups of their own, the body frozen until told otherwise;
    `body_apart` only has the groups; `decay_weights_only` spares biases and BatchNorm from weight decay;
    `class_weights` has one for each class, or none;
    `weights` replace those that the seed gives, all or some by name; `lsuv` scales them on the first training images;
    `activations` asks for what each layer gives in the first step of each epoch;
    `outcomes` asks for what the model makes of each validation sample, with so many likeliest classes (0: for none).
    """

    train: Labelled
    valid: Labelled
    n_classes: int
    arch: str
    size: int
    presize: int
    batch_size: int
    seed: int
    normalize: Normalize
    augment: str
    sync_batchnorm: bool
    skip_bad_images: bool
    augmentation: AugmentConfig = field(default_factory=AugmentConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    progressive: bool = False
    channels: int = 3
    store: str | None = None
    optimizer: str = "sgd"
    momentum: float | None = None
    weight_decay: float | None = None
    label_smoothing: float = 0.0
    clip: float = 0.0
    ema: float = 0.0
    accumulate: int = 1
    precision: str = "fp32"
    fine_tune: bool = False
    body_apart: bool = False
    decay_weights_only: bool = False
    class_weights: tuple[float, ...] = ()
    lsuv: bool = False
    activations: bool = False
    weights: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    outcomes: int = 0


@dataclass(frozen=True)
class Chunk:
    """Consecutive batches of one epoch, given to all workers in one message.

    `first` is the number of the first batch in the epoch, `step` the optimizer steps done before it. Training batches
    come with the hyperparameters of each; validation ones with empty dictionaries.
    """

    train: bool
    epoch: int
    first: int
    step: int
    hypers: tuple[dict[str, float], ...]


@dataclass(frozen=True)
class Report:
    """What one rank did in a chunk: per batch its sum of losses and its count, in all its sums and counts.

    `seconds` has the chunk's total, and of it the time waiting for data and for communication. `outcomes` are those of
    its validation samples, and `activations` the sums of each layer (see ActivationStats) in each recorded step, where
    the job asks for them.
    """

    rank: int
    chunk: Chunk
    losses: list[float]
    counts: list[int]
    sums: Sums
    seconds: dict[str, float]
    bad_images: list[tuple[str, str]] = field(default_factory=list)
    outcomes: Outcomes | None = None
    activations: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
