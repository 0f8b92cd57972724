"""The book's chapter, written anew: a pool of processes for each epoch that is sent the dataset with every batch, and
SGD parameter by parameter. One training process with both cores. python -m benchmarks.peers.book ROOT SIZE EPOCHS."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.peers.common import BATCH, LR, MEAN, STD, WORKERS, Clock, Pictures, Task, model


class BookPictures(Pictures):
    "Floats between 0 and 1, (size, size, 3): the batch is normalised later."

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, label = self.items[index]
        image = Image.open(file).resize((self.size, self.size)).convert("RGB")
        return torch.from_numpy(np.array(image)).float() / 255, label


def collate(indices: Sequence[int], dataset: BookPictures) -> tuple[Tensor, Tensor]:
    "The samples as a batch."
    x, y = zip(*[dataset[i] for i in indices])
    return torch.stack(x), torch.tensor(y)


def batches(dataset: BookPictures) -> Iterator[tuple[Tensor, Tensor]]:
    "An epoch, loaded by a pool of its own."
    order = torch.randperm(len(dataset)).tolist()
    chunks = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
    context = multiprocessing.get_context("fork")  # in the children one thread: else they hang in OpenMP's, see FACTS
    with ProcessPoolExecutor(WORKERS, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(collate, chunks, repeat(dataset))


def main() -> None:
    "Train."
    task, clock = Task.of_command_line(), Clock()
    torch.set_num_threads(WORKERS)
    dataset, net = BookPictures(task), model()
    for _ in range(task.epochs):
        clock.start()
        for x, y in batches(dataset):
            loss = F.cross_entropy(net((x.permute(0, 3, 1, 2) - MEAN) / STD), y)
            loss.backward()
            for p in net.parameters():
                assert p.grad is not None
                p.data -= p.grad * LR
                p.grad.zero_()
        clock.stop()
    clock.report()


if __name__ == "__main__":
    main()
