"LoadedRun: a finished run read back from its directory, trusting nothing in it; what is wrong is named by file."

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from learner.data.normalize import Normalize
from learner.errors import UsageError, UserError
from learner.models import build
from learner.module import Module

ABOUT, WEIGHTS, CONFIG = "model.json", "model.safetensors", "config.json"
JSON_LIMIT = 2**24  # bytes
PIXELS_LIMIT = 2**13  # the side of a picture: what lies above is no size, and would fill the memory


def _is_side(value: Any) -> bool:
    return type(value) is int and 1 <= value <= PIXELS_LIMIT


def _are_classes(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value) and 0 < len(set(value)) == len(value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) in (int, float) and abs(one) < 1e9 for one in value)


def _are_statistics(value: Any) -> bool:
    return isinstance(value, dict) and all(_are_numbers(value.get(name)) for name in ("mean", "std"))


RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "arch": (lambda value: isinstance(value, str), "the name of a model"),
    "classes": (_are_classes, "a list of one name or more, all different"),
    "channels": (lambda value: type(value) is int and value in (1, 3), "1 or 3"),
    "size": (_is_side, f"a whole number from 1 to {PIXELS_LIMIT}"),
    "presize": (_is_side, f"a whole number from 1 to {PIXELS_LIMIT}"),
    "normalize": (_are_statistics, "a mean and a std, a list of numbers each"),
}


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """What prediction needs to know of a run: its model's name, its classes, and what a picture goes through.

    Pictures are squashed to `presize`, of which the model sees the centre, `size`, normalised. Raises UsageError
    wherever a file of the run is missing, damaged or not what a run writes.
    """

    path: Path
    arch: str
    classes: tuple[str, ...]
    channels: int
    size: int
    presize: int
    normalize: Normalize

    @classmethod
    def open(cls, place: str) -> LoadedRun:
        "The run in the directory `place`, or in the newest of its version_N directories that has a model."
        path = find_run(place)
        file, about = path / ABOUT, {"channels": 3, **read_object(path / ABOUT)}
        for name, (holds, rule) in RULES.items():
            if name not in about:
                raise UsageError(f"{file} has no {name!r}: it must be {rule}; {REMEDY}")
            if not holds(about[name]):
                shown = textwrap.shorten(repr(about[name]), 60)
                raise UsageError(f"{file}: {name} is {shown}; it must be {rule}; {REMEDY}")
        normalize = Normalize(tuple(about["normalize"]["mean"]), tuple(about["normalize"]["std"]))
        if {len(normalize.mean), len(normalize.std)} != {about["channels"]} or min(normalize.std) <= 0:
            raise UsageError(
                f"{file}: normalize must have {about['channels']} numbers each, one a channel, and std above 0; {REMEDY}"
            )
        if about["presize"] < about["size"]:
            raise UsageError(f"{file}: presize {about['presize']} is below size {about['size']}; {REMEDY}")
        known = {name: about[name] for name in ("arch", "channels", "size", "presize")}
        return cls(path=path, classes=tuple(about["classes"]), normalize=normalize, **known)

    def __str__(self) -> str:
        return f"{self.path}: {self.arch} for {len(self.classes)} classes, {self.size} px"

    def tensors(self) -> dict[str, Tensor]:
        "The weights by name, checked against the model before memory is taken for it."
        file = self.path / WEIGHTS
        try:
            tensors = load_file(file)
        except MemoryError:
            raise
        except Exception as error:  # safetensors raises what its parser, torch or the system raise
            raise UsageError(f"{file} can't be read: {reason(error)}; {REMEDY}") from error
        if strays := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
            raise UsageError(f"{file}: {strays[0]} is of {tensors[strays[0]].dtype}, no floating point; {REMEDY}")
        self._fill("meta", tensors)
        return tensors

    def model(self) -> Module:
        "The trained model on the CPU, in evaluation mode."
        return self._fill("cpu", self.tensors()).eval()

    def arrays(self) -> dict[str, np.ndarray]:
        "The weights as they travel to workers."
        return {name: tensor.float().numpy() for name, tensor in self.tensors().items()}

    def _fill(self, device: str, tensors: Mapping[str, Tensor]) -> Module:
        "The model with these weights; on the device meta that costs nothing, and finds all that does not fit."
        try:
            with torch.device(device):
                model = build(self.arch, self.channels, len(self.classes))
        except UsageError as error:
            raise UsageError(f"{self.path / ABOUT}: {error}") from error
        try:
            return model.load_state_dict(tensors)
        except UserError as error:
            fault = textwrap.shorten(str(error), 300)
            raise UsageError(f"{self.path / WEIGHTS} does not hold the {self.arch} of {ABOUT}: {fault}") from error

    def settings(self) -> dict[str, Any]:
        "All that config.json says."
        return read_object(self.path / CONFIG)


REMEDY = "restore the file, or name another run"


def find_run(place: str) -> Path:
    "The run directory that `place` is, or the newest version in it that has a model; UsageError if there is none."
    path = Path(place).expanduser()
    if (path / ABOUT).is_file():
        return path
    if not path.is_dir():
        raise UsageError(f"{place} is no folder; name a run directory such as runs/NAME/version_0, or runs/NAME")
    versions = sorted(path.glob("version_*"), key=_version)
    if with_model := [version for version in versions if (version / ABOUT).is_file()]:
        return with_model[-1]
    if versions or (path / CONFIG).is_file():
        raise UsageError(f"{place} has no {ABOUT}: a run writes its model when its training ends; name one that did")
    raise UsageError(f"{place} is no run directory: it has neither {ABOUT} nor version_N folders; name runs/NAME")


def _version(path: Path) -> int:
    number = re.fullmatch(r"version_(\d{1,9})", path.name)
    return int(number[1]) if number else -1


def read_object(file: Path) -> dict[str, Any]:
    "The JSON object in a file; UsageError for anything else, however long or deep."
    try:
        with open(file, "rb") as stream:
            content = stream.read(JSON_LIMIT + 1)
        if len(content) > JSON_LIMIT:
            raise ValueError(f"it is larger than {JSON_LIMIT >> 20} MiB")
        value = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} can't be read: {reason(error)}; {REMEDY}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{file} holds no JSON object, as a run's does; {REMEDY}")
    return value


def reason(error: BaseException) -> str:
    "Why a file can't be read, in a few words."
    return getattr(error, "strerror", None) or textwrap.shorten(str(error), 200) or type(error).__name__
