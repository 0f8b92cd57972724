"A rank's batches: each picture is decoded once on a machine, ahead of its step, and while steps are done."

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cluster.local_batches import LocalBatches
from cluster.messages import Job
from learner.data import loader
from learner.data.decoder import decode_all
from learner.data.images import BadImage
from learner.data.store import StoredDataset
from tests.cluster.conftest import chunks


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    "The files that are decoded from here on, as often as they are."
    files: list[str] = []

    def noting(asked: Sequence[str], out: NDArray[np.uint8]) -> dict[int, BadImage]:
        files.extend(asked)
        return decode_all(asked, out)

    monkeypatch.setattr(loader, "decode_all", noting)
    return files


@pytest.fixture
def stored(job: Job, tmp_path: Path) -> Job:
    "A job with a store, and batches of two."
    return replace(job, batch_size=2, store=str(tmp_path / "stores" / "one"))


def epoch(batches: LocalBatches, number: int, length: int = 4) -> None:
    "Go through an epoch of the training set, in chunks of so many batches."
    stream = None
    for chunk in chunks(batches.job, True, number, length):
        last, stream = stream, batches.open(chunk)
        assert last in (None, stream), "what was read ahead is not read again"
        for _ in chunk.hypers:
            next(stream)


@pytest.mark.parametrize("length", [1, 3, 100])
def test_each_picture_is_decoded_once_by_the_rank_that_needs_it(stored: Job, decoded: list[str], length: int) -> None:
    ranks = [LocalBatches(stored, rank, 2, threads=2) for rank in range(2)]
    for number, batches in enumerate(ranks):
        epoch(batches, 0, length)
        assert abs(len(decoded) - (number + 1) * len(stored.train) / 2) < 1, "its share"
    assert Counter(decoded) == Counter(stored.train.files)
    for batches in ranks:
        epoch(batches, 1, length)
        batches.close()
    assert len(decoded) == len(stored.train)


def test_training_begins_before_all_is_decoded_and_batches_are_read_ahead(stored: Job, decoded: list[str]) -> None:
    third = Event()

    class Told(StoredDataset):
        def read(self, indices: Sequence[int], out: NDArray[np.uint8]) -> dict[int, BadImage]:
            bad = super().read(indices, out)
            if len(decoded) >= 6:
                third.set()
            return bad

    batches = LocalBatches(stored, 0, 1, threads=1)
    dataset: Any = batches.loaders[True].dataset
    dataset.__class__ = Told
    next(batches.open(next(chunks(stored, True, 0, 4))))
    assert third.wait(60), "while the first one is in use"
    assert len(decoded) < len(stored.train) / 2
    batches.close()


def test_what_is_known_to_be_in_the_store_is_gathered_by_who_trains(stored: Job) -> None:
    by: list[set[str]] = []

    class Told(StoredDataset):
        def read(self, indices: Sequence[int], out: NDArray[np.uint8]) -> dict[int, BadImage]:
            by[-1].add(threading.current_thread().name)
            return super().read(indices, out)

    batches = LocalBatches(stored, 0, 1, threads=1)
    dataset: Any = batches.loaders[True].dataset
    dataset.__class__ = Told
    for number in range(2):
        by.append(set())
        epoch(batches, number)
    assert by == [{"loader_0"}, {threading.current_thread().name}]
    batches.close()
