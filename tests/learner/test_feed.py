"Batches on their way to the device: none is lost, none is another's."

import random
from collections.abc import Sequence
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from learner.data import feed
from learner.data.feed import Feed, KeepingFeed, make_feed
from learner.data.files import Labelled
from learner.data.images import BadImage
from learner.data.loader import DataLoader, Dataset, Readable, collate_readable

CPU = torch.device("cpu")
on_gpu = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
)


class Numbers(Dataset):
    "Picture i has the number i in each byte; those in `bad` can't be read; `seen` are those that were."

    def __init__(self, n: int, bad: Sequence[int] = ()) -> None:
        super().__init__(Labelled(tuple(f"{i}.jpg" for i in range(n)), tuple(i % 7 for i in range(n))), 4)
        self.bad, self.seen = bad, list[int]()

    def read(self, indices: Sequence[int], out: NDArray[np.uint8]) -> dict[int, BadImage]:
        for row, i in enumerate(indices):
            self.seen.append(i)
            out[row] = i
        return {row: BadImage(f"{i}.jpg", "cut") for row, i in enumerate(indices) if i in self.bad}


def alike(batch: Readable, expected: Readable) -> bool:
    "Whether two batches are the same, wherever they are."
    pairs = [(getattr(batch, name).cpu(), getattr(expected, name)) for name in ("inputs", "targets", "rows")]
    return all(torch.equal(*pair) for pair in pairs) and batch.bad == expected.bad


@pytest.mark.parametrize("device", ["cpu", on_gpu])
@pytest.mark.parametrize("keep", [False, True])
def test_batches_arrive_as_they_were_read(device: str, keep: bool) -> None:
    "Two datasets of one store, three epochs each, in turn; a few pictures can't be read."
    way = KeepingFeed(device, 90, 4) if keep else Feed(device)
    parts = [(Numbers(60, bad=(3, 17)), 0), (Numbers(30, bad=(0,)), 60)]
    order = random.Random(2)
    for _ in range(3):
        for dataset, first in parts:
            loader = DataLoader(dataset, n_workers=3, collate=lambda d, i, first=first: way.collate(d, i, first))
            shuffled = order.sample(range(len(dataset)), len(dataset))
            wanted = [shuffled[i : i + 8] for i in range(0, len(shuffled), 8)]
            for ready, indices in zip(loader.load(wanted), wanted, strict=True):
                batch = ready()
                assert batch.inputs.device.type == device
                assert alike(batch, collate_readable(Numbers(len(dataset), dataset.bad), indices))
            loader.close()


def test_what_is_kept_is_read_once() -> None:
    way, dataset = KeepingFeed(CPU, 20, 4), Numbers(20)
    for indices in ([4, 7, 9], [9, 1, 4], [1, 9, 7]):
        assert alike(way.collate(dataset, indices)(), collate_readable(Numbers(20), indices))
    assert dataset.seen == [4, 7, 9, 1]


def test_what_was_read_but_never_used_is_not_kept() -> None:
    "Of a stream that was given up, batches were read that nobody took."
    way, dataset = KeepingFeed(CPU, 20, 4), Numbers(20)
    way.collate(dataset, [1, 2])
    first, second = way.collate(dataset, [2, 3]), way.collate(dataset, [3, 1])
    assert alike(second(), collate_readable(Numbers(20), [3, 1])), "used before the one that was read first"
    assert alike(first(), collate_readable(Numbers(20), [2, 3]))


def test_what_does_not_fit_is_fed_as_it_comes() -> None:
    told: list[str] = []
    with patch.object(feed, "free_bytes", lambda device: 2 * 10 * 16 * 3 - 1):
        assert type(make_feed(CPU, True, 10, 4, 3, told.append)) is Feed
        assert type(make_feed(CPU, False, 10, 4, 3, told.append)) is Feed
    assert len(told) == 1
    assert "more than half" in told[0]
    with patch.object(feed, "free_bytes", lambda device: 2 * 10 * 16 * 3):
        assert type(make_feed(CPU, True, 10, 4, 3, told.append)) is KeepingFeed
    assert free_is_sensible()


def free_is_sensible() -> bool:
    "Some memory is free here, and less than a hundred TiB."
    return 0 < feed.free_bytes(CPU) < 100 * 2**40
