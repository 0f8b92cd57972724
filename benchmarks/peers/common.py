"What the peers share: the pictures as torch's documentation has one read them, the model, and how they report."

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.torch_models import simple_cnn

BATCH, WORKERS, LR = 128, 2, 0.1  # the global batch
MEAN, STD = torch.tensor([0.46, 0.46, 0.43]).view(3, 1, 1), torch.tensor([0.28, 0.28, 0.30]).view(3, 1, 1)
MARK = "EPOCH SECONDS "


@dataclass(frozen=True)
class Task:
    "The arguments of every peer's script: a folder with train/CLASS/*.JPEG, the side of the pictures, the epochs."

    root: str
    size: int
    epochs: int

    @classmethod
    def of_command_line(cls) -> Task:
        "From sys.argv; one thread for torch, as our workers have."
        torch.set_num_threads(1)
        root, size, epochs = sys.argv[1:4]
        return cls(root, int(size), int(epochs))


class Pictures(Dataset[tuple[Tensor, int]]):
    "Files below the folders of classes, read by Pillow and normalised, float32 (3, size, size), and class numbers."

    def __init__(self, task: Task) -> None:
        folders = sorted(Path(task.root, "train").iterdir())
        self.items = [(file, label) for label, folder in enumerate(folders) for file in sorted(folder.iterdir())]
        self.size = task.size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, label = self.items[index]
        with Image.open(file) as image:
            pixels = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC)
        tensor = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255
        return (tensor - MEAN) / STD, label


def loader(task: Task, **options: object) -> DataLoader[tuple[Tensor, int]]:
    "A rank's DataLoader: its part of the global batch, one loading process a rank, kept from epoch to epoch."
    return DataLoader(Pictures(task), BATCH // WORKERS, num_workers=1, persistent_workers=True, **options)  # type: ignore[arg-type]


def model() -> nn.Module:
    "simple_cnn, in the memory format that torch recommends for convolutions."
    torch.manual_seed(0)
    return simple_cnn().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def train(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], optimizer: torch.optim.Optimizer) -> None:
    "An epoch of the plain loop."
    for x, y in batches:
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@dataclass
class Clock:
    "Seconds of each epoch."

    seconds: list[float] = field(default_factory=list)
    started: float = 0.0

    def start(self) -> None:
        "An epoch begins."
        self.started = time.perf_counter()

    def stop(self) -> None:
        "It ended."
        self.seconds.append(time.perf_counter() - self.started)

    def report(self) -> None:
        "Print them for the benchmark to read."
        print(MARK + json.dumps(self.seconds), flush=True)
