"Config: everything that a user may choose, with its default, its help and its rule, in one place."

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

from learner.data.labels import check_labelling
from learner.data.sizes import Sizes, parse_sizes
from learner.data.splitters import SPLIT, SPLIT_RULE
from learner.errors import CONTROL, UsageError, shown
from learner.schedule import SCHEDULES


def option(default: Any, text: str, group: str, metavar: str | None = None, choices: tuple[str, ...] = ()) -> Any:
    "A Config field: its default and what the command line says of it."
    return field(default=default, metadata={"help": text, "group": group, "metavar": metavar, "choices": choices})


RATES = {"sgd": 0.1, "nesterov": 0.03, "rmsprop": 0.003, "adam": 0.003, "adamw": 0.003, "lamb": 0.01, "muon": 0.01}
MOMENTUMS = {"sgd": 0.0, "nesterov": 0.9, "rmsprop": 0.0, "adam": 0.9, "adamw": 0.9, "lamb": 0.9, "muon": 0.95}

DATA, MODEL, TRAIN, WHERE, FAULTS, RUN = "data", "model", "training", "devices", "faults", "run"


@dataclass(frozen=True, kw_only=True)
class Config:
    "A run as the user asked for it; UsageError on construction if a value breaks its rule."

    data: str = option(
        "imagenette160", "a folder, an archive (.tgz, .zip), a URL, a known name, or shapes (made on the spot)", DATA
    )
    data_dir: str = option("~/.cache/orchestrator", "where downloaded and generated datasets are kept", DATA, "DIR")
    cache: str = option(
        "auto",
        "keep decoded images: auto (below --data-dir, if there is room), device (there, and all of them in the "
        "memory of each GPU too, if they fit), off, or a folder",
        DATA,
        "auto|device|off|DIR",
    )
    split: str = option(
        "auto",
        "what validates: grandparent (below valid/, val/ ...), a share of all (random:0.2) or of each class "
        "(stratified:0.2), what FILE.txt lists or FILE.csv says (column is_valid); auto: by the folders that there are",
        DATA,
        "SPLIT",
    )
    label_regex: str | None = option(
        None, r"label by the file's name, with the group of a pattern: '(.+)_\d+.jpg$'", DATA, "PATTERN"
    )
    labels_csv: str | None = option(
        None, "label by a table; its first column has paths below the dataset's folder", DATA, "FILE.csv[:COLUMN]"
    )
    channels: int | str = option(
        "auto", "of the pictures: 3 (colour), 1 (grey), or auto: 1 if the first images are grey", DATA, "auto|1|3"
    )
    size: int | str = option(
        64, "side of the square pictures that the model sees; in stages: 128:160 or 128@0.3:160", DATA, "PIXELS"
    )
    augment: str = option(
        "none",
        "train on random crops out of 9/8 of the size and mirror images (crop, as --augment alone), or on "
        "RandomResizedCrop, tilt, turn and light too, out of 5/4 (full)",
        DATA,
        choices=("none", "crop", "full"),
    )
    augmentation: str | None = option(
        None, "magnitudes of full (learner/data/warp.py): max_rotate=0,scale=0.35:1", DATA, "NAME=VALUE,..."
    )
    mixup: float = option(0.0, "MixUp: alpha of the Beta distribution; 0: none", DATA, "ALPHA")
    cutmix: float = option(0.0, "CutMix: alpha of the Beta distribution; 0: none", DATA, "ALPHA")
    bad_images: str = option("fail", "what to do at an unreadable image", DATA, choices=("fail", "skip"))

    arch: str = option(
        "simple_cnn",
        "the model: linear, simple_net, simple_cnn, simple_cnn_bn, conv_net, resnet18, resnet34, resnet50, xresnet18, "
        "xresnet34 or xresnet50; an xresnet with _mish or _silu, _se and _blur behind it: xresnet18_mish_se",
        MODEL,
        "NAME",
    )
    init: str | None = option(
        None,
        "start from the weights of a finished run, but for the head where the classes differ, or from a safetensors "
        "file of torchvision's or timm's resnet18, 34 or 50",
        MODEL,
        "RUN|FILE",
    )
    lsuv: bool = option(False, "scale the first weights until every layer gives variance 1 (LSUV)", MODEL)
    sync_batchnorm: bool = option(True, "BatchNorm over the global batch, not each worker's part", MODEL)

    epochs: int = option(8, "how often to go through the training set", TRAIN, "N")
    batch_size: int = option(128, "images per step over all workers (the global batch)", TRAIN, "N")
    lr: float | str = option(
        "own",
        "peak learning rate for the global batch; auto: find it first; own: the optimizer's (0.1 for sgd, 0.03 for "
        "nesterov, 0.01 for lamb and muon, else 0.003)",
        TRAIN,
        "RATE",
    )
    body_lr: float = option(
        1.0, "rate of all layers before the head, as a share of --lr: 0.01 for pretrained ones", TRAIN, "SHARE"
    )
    schedule: str = option("one_cycle", "how the rate moves", TRAIN, choices=tuple(SCHEDULES))
    optimizer: str = option("sgd", "sgd, nesterov, rmsprop, adam, adamw, lamb or muon", TRAIN, "NAME")
    momentum: float | None = option(
        None, "momentum, 0 to below 1; Adam's beta1 (default: 0 for sgd and rmsprop, muon 0.95, else 0.9)", TRAIN, "M"
    )
    moms: str | None = option(None, "momentum along one cycle, as in fastai: 0.95,0.85,0.95", TRAIN, "A,B,C")
    weight_decay: float | None = option(None, "weight decay (default: the optimizer's own)", TRAIN, "WD")
    decay_weights_only: bool = option(False, "no weight decay for biases and BatchNorm", TRAIN)
    balance_classes: bool = option(
        False, "weigh each class's losses by how rare it is, so that all classes count alike in training", TRAIN
    )
    label_smoothing: float = option(0.0, "how much of each label goes to all classes", TRAIN, "E")
    clip_grad: float = option(0.0, "bound on the norm of all gradients; 0: none", TRAIN, "NORM")
    accumulate: int = option(
        1, "put each batch through the model in N parts, to save memory; BatchNorm sees a part at a time", TRAIN, "N"
    )
    ema: float = option(0.0, "validate and save averaged weights, with this decay; 0: none", TRAIN, "DECAY")
    precision: str = option("fp32", "arithmetic of forward and backward", TRAIN, choices=("fp32", "bf16", "fp16"))
    compile: str = option(
        "off",
        "forward and backward as code made for them by torch.compile: auto (on GPUs), on or off",
        TRAIN,
        choices=("auto", "off", "on"),
    )
    fine_tune: int = option(0, "train the head alone for N epochs first, as fastai's fine_tune does", TRAIN, "N")
    early_stop: int = option(0, "end after N epochs without a better accuracy; 0: never", TRAIN, "N")
    save_best: bool = option(False, "save the epoch with the best accuracy instead of the last", TRAIN)
    seed: int = option(42, "seeds weights, order, augmentation and random splits", TRAIN, "N")

    gpus: str | None = option(
        None,
        "a count (4), ids (0,2), a range (2:8) or all; default: all visible, or one CPU worker where there is none",
        WHERE,
        "N|IDS|MIN:MAX|all",
    )
    cpus: int | str | None = option(None, "train on N CPU workers instead, or a range (2:8)", WHERE, "N|MIN:MAX")
    local: bool = option(False, "one worker in this process, without Ray: the debugger works", WHERE)
    address: str | None = option(None, "join the Ray cluster there instead of starting one", WHERE, "HOST:PORT")
    backend: str | None = option(
        None,
        "how gradients travel: nccl for GPUs, gloo for CPUs or GPUs that are shared",
        WHERE,
        choices=("nccl", "gloo"),
    )

    max_restarts: int = option(10, "how many deaths, errors and hangs, of each, are made up for", FAULTS, "N")
    min_workers: int = option(
        1, "go on with no fewer, where no replacement is to be had (as --gpus 2:8 says, too)", FAULTS, "N"
    )
    wait_for_workers: float = option(
        60.0, "how long to wait for a replacement, and at the start for all of a range", FAULTS, "SECONDS"
    )
    spares: int = option(0, "more workers, that only wait to step in at once", FAULTS, "N")
    on_nan: str = option(
        "stop",
        "where a loss or gradient is not finite: stop; skip the step; or rollback to the last checkpoint, at half rate",
        FAULTS,
        choices=("stop", "skip", "rollback"),
    )
    hang_after: float = option(
        60.0,
        "replace a worker that makes no progress for so long, or for 10 of the slowest steps of late if longer, or for "
        "5 times as long before the first steps are done",
        FAULTS,
        "SECONDS",
    )

    runs: str = option("runs", "the folder of all runs", RUN, "DIR")
    name: str | None = option(None, "this run's name in it (default: data-arch)", RUN)
    resume: str | None = option(
        None, "go on with a run: last, or its directory, or the newest in runs/NAME", RUN, "last|RUN"
    )
    autoresume: bool = option(False, "go on with the last run of this name if there is one, else begin one", RUN)
    keep: int = option(2, "how many checkpoints to keep, the newest; that of the best epoch is kept as well", RUN, "N")
    activations: bool = option(False, "show what each layer gives, once an epoch, in TensorBoard", RUN)
    debug: bool = option(False, "show tracebacks", RUN)

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            self._check_type(one)
            self._check_choice(one)
        if self.lr == "own":  # the only way into a frozen dataclass
            object.__setattr__(self, "lr", RATES.get(self.optimizer, RATES["sgd"]))
        try:
            parse_sizes(self.size)
        except UsageError as error:
            raise UsageError(f"--{error}") from None
        for name in ("epochs", "batch_size", "accumulate", "keep", "min_workers"):
            self._require(name, getattr(self, name) >= 1, "1 or more")
        for name in ("early_stop", "fine_tune", "max_restarts", "spares", "wait_for_workers"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("hang_after", 1 <= self.hang_after < math.inf, "1 or more")
        self._require("seed", self.seed >= 0, "0 or more")
        self._require("split", SPLIT.fullmatch(self.split) is not None, SPLIT_RULE)
        check_labelling(self.label_regex, self.labels_csv)
        self._require("channels", self.channels in ("auto", 1, 3), "auto, 1 or 3")
        self._require("cpus", _is_count(self.cpus), "1 or more, or a range MIN:MAX such as 2:8")
        for name in ("momentum", "label_smoothing", "ema"):
            self._require(name, 0 <= (getattr(self, name) or 0) < 1, "at least 0 and below 1")
        self._require("momentum", self.optimizer != "nesterov" or self.own_momentum != 0, "above 0 with nesterov")
        self._require("augmentation", self.augmentation is None or self.augment == "full", "used with --augment full")
        self._require("augmentation", bool(AUGMENTATION.fullmatch(self.augmentation or "")), "NAME=VALUE,NAME=LOW:HIGH")
        mixing = self.mixup or self.cutmix
        self._require("accumulate", self.accumulate == 1 or not mixing, "1 where MixUp or CutMix mix whole batches")
        for name in ("weight_decay", "clip_grad", "mixup", "cutmix"):
            self._require(name, 0 <= (getattr(self, name) or 0) < math.inf, "0 or more")
        self._require("moms", self.moms is None or _three_momentums(self.moms), "A,B,C, each above 0 and below 1")
        self._require("lr", self.lr == "auto" or (not isinstance(self.lr, str) and 0 < self.lr < math.inf),
                      "above 0, auto or own")  # fmt: skip
        self._require("name", self.name is None or re.fullmatch(r"\w[\w.+-]*", self.name) is not None,
                      "letters, digits and . _ + - only")  # fmt: skip
        self._require("schedule", self.schedule == "one_cycle" or not self.fine_tune, "left out with --fine-tune")
        self._require("momentum", self.momentum is None or self.moms is None, "left out with --moms, which sets it")
        self._require("body_lr", 0 < self.body_lr < math.inf, "above 0")
        self._require("body_lr", self.body_lr == 1 or not self.fine_tune, "left out with --fine-tune, which sets it")
        self._require("lsuv", not (self.lsuv and self.init), "left out with --init, whose weights it would replace")
        self._require("address", self.address is None or ADDRESS.fullmatch(self.address) is not None, "HOST:PORT")

    def _check_type(self, one: dataclasses.Field) -> None:
        value, allowed = getattr(self, one.name), str(one.type).split(" | ")
        fits = {
            "str": isinstance(value, str),
            "bool": isinstance(value, bool),
            "int": isinstance(value, int) and not isinstance(value, bool),
            "float": isinstance(value, int | float) and not isinstance(value, bool),
            "None": value is None,
        }
        wanted = " or ".join(name for name in allowed if name != "None")
        quoted = ", without quotes" if isinstance(value, str) else ""
        self._require(one.name, any(fits[name] for name in allowed), f"of type {wanted}{quoted}")
        self._require(one.name, not isinstance(value, str) or not re.search(CONTROL, value),
                      "without control characters")  # fmt: skip
        self._require(one.name, not isinstance(value, int) or abs(value) < 2**63, "of 64 bits at most")

    def _check_choice(self, one: dataclasses.Field) -> None:
        choices, value = one.metadata["choices"], getattr(self, one.name)
        if choices and value is not None:
            self._require(one.name, value in choices, f"one of {', '.join(choices)}")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UsageError(f"{flag(name)} {shown(getattr(self, name))} is not possible: it must be {rule}")

    @property
    def own_momentum(self) -> float | None:
        "`momentum`, or the optimizer's own; None where that is not known here."
        return MOMENTUMS.get(self.optimizer) if self.momentum is None else self.momentum

    @property
    def momentums(self) -> tuple[float, float, float] | None:
        "`moms` as numbers."
        return tuple(map(float, self.moms.split(","))) if self.moms else None  # type: ignore[return-value]

    @property
    def sizes(self) -> Sizes:
        "`size` as stages."
        return parse_sizes(self.size)

    @property
    def presize(self) -> int:
        "The side at which images are kept, before augmentation makes smaller ones of them."
        share = {"none": (1, 1), "crop": (9, 8), "full": (5, 4)}[self.augment]
        return self.sizes.largest * share[0] // share[1]

    @property
    def magnitudes(self) -> dict[str, float | list[float]]:
        "`augmentation` as numbers, and pairs of them."
        values: dict[str, float | list[float]] = {}
        for entry in filter(None, (self.augmentation or "").split(",")):
            name, _, text = entry.partition("=")
            numbers = [float(number) for number in text.split(":")]
            values[name] = numbers if len(numbers) > 1 else numbers[0]
        return values


NUMBER = r"-?(\d+\.?\d*|\.\d+)"
RANGE = re.compile(r"([0-9]{1,9}):([0-9]{1,9})")  # of how many workers
ADDRESS = re.compile(r"[^\s:]+:\d+")
AUGMENTATION = re.compile(rf"(\w+={NUMBER}(:{NUMBER})?(,|$))*")


def _is_count(cpus: int | str | None) -> bool:
    return RANGE.fullmatch(cpus) is not None if isinstance(cpus, str) else cpus is None or cpus >= 1


def _three_momentums(text: str) -> bool:
    parts = text.split(",")
    return len(parts) == 3 and all(re.fullmatch(r"0?\.\d*[1-9]\d*", part) for part in parts)


def flag(name: str) -> str:
    "A field's name as it is typed."
    return "--" + name.replace("_", "-")
