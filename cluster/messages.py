"What driver and workers say to each other: the job once, then chunks of steps, and reports of what came of them."

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from learner.data.files import Labelled
from learner.data.mix import MixConfig
from learner.data.normalize import Normalize
from learner.data.warp import AugmentConfig
from learner.interpret import Outcomes


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker is told, the same for all ranks: pictures are `presize` square in memory, `size` in use.

    `augment` is none, crop or full, as `augmentation` says; `mix` is MixUp and CutMix; in a `progressive` run, training
    steps come with a `size` of their own; `channels` is 3, or 1 for pictures in grey;
    `store` is the folder of the store of decoded pictures, if there is to be one, which was named since the job was
    `made`; `on_device` has all of them kept in the device's memory;
    `clip` is a bound on the global norm of gradients, `ema` the decay of averaged weights (0: none of either),
    `accumulate` in how many parts a batch goes through the model, `precision` fp32, bf16 or fp16;
    `fine_tune` has the head and the body in groups of their own, the body frozen until told otherwise;
    `body_apart` only has the groups; `decay_weights_only` spares biases and BatchNorm from weight decay;
    `class_weights` has one for each class, or none;
    `weights` replace those that the seed gives, all or some by name; `lsuv` scales them on the first training images;
    `activations` asks for what each layer gives in the first step of each epoch;
    `compile` is auto (on a GPU), on or off;
    `on_nan` is what to do at a step whose loss or gradient is not finite: stop, skip it, or rollback;
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
    made: int = field(default_factory=time.time_ns, repr=False, compare=False)
    on_device: bool = False
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
    on_nan: str = "stop"
    compile: str = "off"


@dataclass(frozen=True)
class Chunk:
    """Consecutive batches of one epoch, given to all workers in one message.

    `first` is the number of the first batch in the epoch, `step` the optimizer steps done before it. Training batches
    come with the hyperparameters of each; validation ones with empty dictionaries. To a `probe`, such as the LR finder,
    a loss that is no number is an answer like another.
    """

    train: bool
    epoch: int
    first: int
    step: int
    hypers: tuple[dict[str, float], ...]
    probe: bool = False


@dataclass(frozen=True)
class Report:
    """What a rank knows of a chunk that is done.

    `batches` are, by name, the sums over the samples of each global batch, all ranks' together: "count", "loss" and
    the metrics. `own` is how many samples were the rank's; `seconds` has the chunk's total, and of it the time waiting
    for "data", for "communication" and, where the model is compiled, for "compiling". `outcomes` are those of its own
    validation samples, and `activations` the sums of each layer over its own samples (see ActivationStats) in each
    recorded step, where the job asks for them. `notes` are sentences for the user.
    """

    rank: int
    chunk: Chunk
    batches: Mapping[str, list[float]]
    own: int
    seconds: dict[str, float]
    bad_images: list[tuple[str, str]] = field(default_factory=list)
    outcomes: Outcomes | None = None
    activations: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        "Seconds a step, or a batch of a validation, but for those of compiling."
        return (self.seconds["total"] - self.seconds.get("compiling", 0.0)) / len(self.chunk.hypers)

    @property
    def counts(self) -> list[float]:
        "The samples of each global batch."
        return self.batches["count"]

    @property
    def losses(self) -> list[float]:
        "The mean loss of each global batch; NaN for one without samples."
        return [loss / n if n else float("nan") for loss, n in zip(self.batches["loss"], self.counts)]
