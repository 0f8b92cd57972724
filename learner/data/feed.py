"Feed: the way of batches from the loader's threads to the device, beside what that computes."

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from learner.data.loader import Dataset, Readable, bytes_of, collate_readable
from learner.memory import send

Ready = Callable[[], Readable]


class Feed:
    """Brings batches to `device`: loader threads `collate`, and who computes there calls what that gave.

    A GPU copies by itself from page-locked memory alone, so that the loaders write into such; it does so in a stream of
    its own, while another computes. torch keeps page-locked memory for the next one of that size, once it is let go of
    and the copies from it are done: a few buffers go round, and none is written to while it is read.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.buffer = partial(torch.empty, dtype=torch.uint8, pin_memory=True) if self.stream else bytes_of

    def collate(self, dataset: Dataset, indices: Sequence[int], first: int = 0) -> Ready:
        "Read samples and start their way; `first` is where a store of several datasets has this one's."
        batch = collate_readable(dataset, indices, self.buffer)
        if self.stream is None:
            return lambda: batch
        with torch.cuda.stream(self.stream):
            there = replace(batch, inputs=send(batch.inputs, self.device))
            arrived = torch.cuda.Event()
            arrived.record()
        return partial(self._take, there, arrived)

    def _take(self, batch: Readable, arrived: torch.cuda.Event) -> Readable:
        "Have the stream that computes wait until the batch is there; the caller does not."
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(arrived)
        batch.inputs.record_stream(stream)  # the next copy gets this memory only once that stream is done with it
        return batch


class KeepingFeed(Feed):
    """Keeps all pictures, `n` of a store, on the device: each is copied once, and batches are gathered there.

    A picture comes with the first batch that needs it. It counts as kept from when that batch is used, not when it was
    read: batches are read in any order, but used in one.
    """

    def __init__(self, device: torch.device | str, n: int, size: int, channels: int = 3) -> None:
        super().__init__(device)
        self.pixels = torch.empty((n, size, size, channels), dtype=torch.uint8, device=self.device)
        self.kept = torch.zeros(n, dtype=torch.bool)

    def collate(self, dataset: Dataset, indices: Sequence[int], first: int = 0) -> Ready:
        "As Feed does, of those that are not kept yet."
        rows = torch.tensor(indices, dtype=torch.int64) + first
        places = (~self.kept[rows]).nonzero().squeeze(1)
        fresh = super().collate(dataset, [indices[place] for place in places.tolist()], first)
        return partial(self._gather, rows, dataset.targets(indices), places, fresh)

    def _gather(self, rows: Tensor, targets: Tensor, places: Tensor, fresh: Ready) -> Readable:
        batch = fresh()
        readable = torch.ones(len(rows), dtype=torch.bool)
        if len(places):
            new = rows[places[batch.rows]]
            self.pixels.index_copy_(0, send(new, self.device), batch.inputs)
            self.kept[new] = True
            readable[places] = self.kept[rows[places]]
        asked = readable.nonzero().squeeze(1)
        inputs = self.pixels.index_select(0, send(rows[asked], self.device))
        return Readable(inputs, targets[asked], asked, batch.bad)


def free_bytes(device: torch.device) -> int:
    "How much memory nobody uses there."
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def make_feed(
    device: torch.device, keep: bool, n: int, size: int, channels: int, tell: Callable[[str], object]
) -> Feed:
    "A Feed; a KeepingFeed where that is wanted and takes no more than half of what is free, else it is told why not."
    if not keep:
        return Feed(device)
    wanted, free = n * size * size * channels, free_bytes(device)
    if wanted <= free // 2:
        return KeepingFeed(device, n, size, channels)
    tell(
        f"images are not kept on the device: {wanted / 2**20:.0f} MiB are more than half of the {free / 2**20:.0f} MiB "
        f"that are free on {device}"
    )
    return Feed(device)
