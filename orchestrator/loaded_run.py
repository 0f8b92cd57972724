"LoadedRun: a finished run read back from its directory, trusting nothing in it; what is wrong is named by file."

from __future__ import annotations

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
from learner.errors import CONTROL, UsageError, UserError
from learner.models import build
from learner.module import Module
from learner.reading import expanded, opened, parse_object, read_bytes
from orchestrator.run_folder import ABOUT, CONFIG, MODEL, versions

JSON_LIMIT = 2**24  # bytes
SIDE_LIMIT = 2**13  # pixels: what lies above is no size, and would fill the memory
DEFAULTS = {"channels": 3, "valid_crop": 0}  # of runs that are older than these
REMEDY = "restore the file, or name another run"


def _is_side(value: Any) -> bool:
    return type(value) is int and 1 <= value <= SIDE_LIMIT


def _is_number(value: Any, low: float = -1e9, high: float = 1e9) -> bool:
    return type(value) in (int, float) and low <= value <= high


def _are_classes(value: Any) -> bool:
    names = value if isinstance(value, list) and all(isinstance(one, str) for one in value) else []
    return 0 < len(set(names)) == len(names) and not any(re.search(CONTROL, name) for name in names)


def _are_statistics(value: Any) -> bool:
    lists = [value.get(name) for name in ("mean", "std")] if isinstance(value, dict) else [None]
    return all(isinstance(one, list) and all(map(_is_number, one)) for one in lists)


RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "arch": (lambda value: isinstance(value, str) and value.isidentifier(), "the name of a model"),
    "classes": (_are_classes, "a list of one printable name or more, all different"),
    "channels": (lambda value: type(value) is int and value in (1, 3), "1 or 3"),
    "size": (_is_side, f"a whole number from 1 to {SIDE_LIMIT}"),
    "presize": (_is_side, f"a whole number from 1 to {SIDE_LIMIT}"),
    "valid_crop": (lambda value: _is_number(value, 0, 1), "a number from 0 to 1"),
    "normalize": (_are_statistics, "a mean and a std, a list of numbers each"),
}


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """What prediction needs to know of a run: its model's name, its classes, and what a picture goes through.

    Pictures are squashed to `presize`, of which the model sees the centre, `size`, normalised; the centre is resampled
    from the share `valid_crop` of the side, or cut out where that is 0. Raises UsageError wherever a file of the run is
    missing, damaged or not what a run writes.
    """

    path: Path
    arch: str
    classes: tuple[str, ...]
    channels: int
    size: int
    presize: int
    valid_crop: float
    normalize: Normalize

    @classmethod
    def open(cls, place: str) -> LoadedRun:
        "The run in the directory `place`, or in the newest of its version_N directories that has a model."
        path = find_model(place)
        about = read_about(path / ABOUT)
        normalize = read_normalize(path / ABOUT, about)
        del about["normalize"]
        return cls(path=path, classes=tuple(about.pop("classes")), normalize=normalize, **about)

    def __str__(self) -> str:
        return f"{self.path}: {self.arch} for {len(self.classes)} classes, {self.size} px"

    def tensors(self) -> dict[str, Tensor]:
        "The weights by name, checked against the model before memory is taken for it."
        file = self.path / MODEL
        try:
            with opened(file):  # safetensors maps it into memory, whatever it is
                tensors = load_file(file)
        except MemoryError:
            raise
        except Exception as error:  # safetensors raises what its parser, torch or the system raise
            raise UsageError(f"{file} can't be read: {reason(error)}; {REMEDY}") from error
        for name, own in self._fill("meta", tensors).state_dict().items():
            if tensors[name].is_floating_point() != own.is_floating_point():
                raise UsageError(f"{file}: {name} is of {tensors[name].dtype}, the model's of {own.dtype}; {REMEDY}")
        return tensors

    def model(self) -> Module:
        "The trained model on the CPU, in evaluation mode."
        return self._fill("cpu", self.tensors()).eval()

    def arrays(self) -> dict[str, np.ndarray]:
        "The weights as they travel to workers."
        tensors = self.tensors().items()
        return {name: (tensor.float() if tensor.is_floating_point() else tensor).numpy() for name, tensor in tensors}

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
            raise UsageError(f"{self.path / MODEL} does not hold the {self.arch} of {ABOUT}: {fault}") from error

    def settings(self) -> dict[str, Any]:
        "All that config.json says."
        return read_object(self.path / CONFIG)


def find_model(place: str) -> Path:
    "The run directory that `place` is, or the newest version in it that has a model; UsageError if there is none."
    path = expanded(place)
    if (path / ABOUT).is_file():
        return path
    if not path.is_dir():
        raise UsageError(f"{place} is no folder; name a run directory such as runs/NAME/version_0, or runs/NAME")
    there = [path / f"version_{number}" for number in versions(path)]
    if with_model := [version for version in there if (version / ABOUT).is_file()]:
        return with_model[-1]
    if there or (path / CONFIG).is_file():
        raise UsageError(f"{place} has no {ABOUT}: a run writes its model when its training ends; name one that did")
    raise UsageError(f"{place} is no run directory: it has neither {ABOUT} nor version_N folders; name runs/NAME")


def read_about(file: Path) -> dict[str, Any]:
    "The entries of model.json that RULES names; UsageError for one that is missing or that is not as it must be."
    about = {**DEFAULTS, **read_object(file)}
    for name, (holds, rule) in RULES.items():
        if name not in about:
            raise UsageError(f"{file} has no {name!r}, which must be {rule}; {REMEDY}")
        if not holds(about[name]):
            shown = textwrap.shorten(repr(about[name]), 60)
            raise UsageError(f"{file}: {name} is {shown}; it must be {rule}; {REMEDY}")
    if about["presize"] < about["size"]:
        raise UsageError(f"{file}: presize {about['presize']} is below size {about['size']}; {REMEDY}")
    return {name: about[name] for name in RULES}


def read_normalize(file: Path, about: Mapping[str, Any]) -> Normalize:
    "How pictures of so many channels are normalised, by two of a file's entries; UsageError where they don't say."
    channels, saved = about.get("channels"), about.get("normalize") or {}
    if channels not in (1, 3) or not _are_statistics(saved) or not len(saved["mean"]) == len(saved["std"]) == channels:
        raise UsageError(f"{file}: normalize must be a mean and a std of a number for each channel, 1 or 3; {REMEDY}")
    if min(saved["std"]) <= 0:
        raise UsageError(f"{file}: normalize has a std that is not above 0; {REMEDY}")
    return Normalize(tuple(saved["mean"]), tuple(saved["std"]))


def read_object(file: Path) -> dict[str, Any]:
    "The JSON object in a file; UsageError for anything else, however long or deep."
    try:
        return parse_object(read_bytes(file, JSON_LIMIT))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} can't be read: {reason(error)}; {REMEDY}") from error


def reason(error: BaseException) -> str:
    "Why a file can't be read, in a few words."
    return getattr(error, "strerror", None) or textwrap.shorten(str(error), 200) or type(error).__name__
