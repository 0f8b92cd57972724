"The loader: complete batches in order however many threads make them, errors that arrive, and nothing left behind."

import os
import threading
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.cores import usable_cores
from learner.data.files import Labelled, open_split
from learner.data.images import BadImage, decode
from learner.data.loader import (
    AHEAD,
    NICE,
    DataLoader,
    DataLoaders,
    Dataset,
    collate,
    collate_readable,
    epoch_order,
)
from learner.errors import UsageError

seeds = st.integers(0, 2**31)


class Numbers:
    "Sample i is ([i, i], -i)."

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return torch.tensor([i, i]), torch.tensor(-i)


def indices(dataset: Numbers, wanted: Sequence[int]) -> list[int]:
    "A collate that gives the numbers themselves."
    return list(wanted)


def flat(batches: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(batches))


@given(st.integers(0, 40), st.integers(1, 12), st.integers(0, 3))
def test_batches_are_complete_and_in_order(n, batch_size, n_workers) -> None:
    loader = DataLoader(Numbers(n), batch_size, n_workers=n_workers)
    batches = list(loader)
    loader.close()
    assert len(batches) == len(loader)
    assert [x[:, 0].tolist() for x, _ in batches] == [
        list(range(n))[i : i + batch_size] for i in range(0, n, batch_size)
    ]
    assert all(torch.equal(x[:, 1], -y) and len(x) <= batch_size for x, y in batches)


@given(st.integers(0, 40), st.integers(1, 12), st.integers(0, 2), seeds)
def test_shuffling_permutes_each_epoch_anew_and_by_its_seed(n, batch_size, n_workers, seed) -> None:
    loaders = [DataLoader(Numbers(n), batch_size, True, n_workers, seed, indices) for _ in range(2)]
    epochs, again = ([flat(loader) for _ in range(3)] for loader in loaders)
    for loader in loaders:
        loader.close()
    assert epochs == again == [epoch_order(n, seed, epoch) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)


def test_epochs_and_seeds_differ_in_their_order() -> None:
    orders = [epoch_order(50, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in [*orders, range(50)]}) == 10


def test_the_same_threads_serve_all_epochs() -> None:
    threads = set()

    def noting(dataset: Numbers, wanted: Sequence[int]) -> None:
        threads.add(threading.current_thread())  # kept alive, so that no later thread can be taken for it

    loader = DataLoader(Numbers(20), 2, n_workers=2, collate=noting)
    for _ in range(6):
        assert len(list(loader)) == 10
    loader.close()
    assert 1 <= len(threads) <= 2 and threading.current_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def test_without_workers_the_caller_loads_when_it_asks() -> None:
    loaded = []
    loader = DataLoader(Numbers(6), 2, n_workers=0, collate=lambda _, wanted: loaded.append(threading.current_thread()))
    batches = iter(loader)
    next(batches)
    assert loaded == [threading.current_thread()]
    loader.close()


def test_what_is_at_hand_is_loaded_by_the_caller_and_the_rest_by_threads() -> None:
    threads: list[threading.Thread] = []

    def load(_: object, wanted: list[int]) -> list[int]:
        threads.append(threading.current_thread())
        return wanted

    loader = DataLoader(Numbers(8), 2, n_workers=1, collate=load, at_hand=lambda wanted: wanted[0] >= 4)
    assert list(map(list, loader)) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    loader.close()
    own = [thread is threading.current_thread() for thread in threads]
    assert sorted(own) == [False, False, True, True]


def test_batches_are_made_ahead_side_by_side() -> None:
    meet = threading.Barrier(3, timeout=20)

    def together(dataset: Numbers, wanted: Sequence[int]) -> list[int]:
        meet.wait()  # fails unless three threads are here at once
        return list(wanted)

    loader = DataLoader(Numbers(9), 1, n_workers=3, collate=together)
    assert flat(loader) == list(range(9))
    loader.close()


def test_leaving_half_way_drops_what_has_not_begun() -> None:
    begun, gate = [], threading.Event()

    def slow(dataset: Numbers, wanted: Sequence[int]) -> list[int]:
        begun.append(wanted[0])
        if wanted[0] == 1:
            started.set()
            assert gate.wait(20)
        return list(wanted)

    started = threading.Event()
    loader = DataLoader(Numbers(100), 1, n_workers=1, collate=slow)
    batches = iter(loader)
    assert next(batches) == [0] and started.wait(20)
    batches.close()
    gate.set()
    assert flat(loader) == list(range(100))
    loader.close()
    assert begun == [0, 1, *range(100)]


def test_a_break_drops_them_as_well() -> None:
    loader = DataLoader(Numbers(1000), 1, n_workers=2, collate=lambda data, wanted: begun.append(wanted[0]))
    begun: list[int] = []
    for _ in loader:
        break
    loader.close()
    assert len(begun) <= 1 + 2 + 2


@pytest.mark.parametrize("n_workers", [0, 2])
def test_an_error_reaches_the_caller_in_its_place_and_the_loader_goes_on(n_workers: int) -> None:
    def breaking(dataset: Numbers, wanted: Sequence[int]) -> list[int]:
        if wanted[0] in broken:
            raise ZeroDivisionError(f"at {wanted[0]}")
        return list(wanted)

    broken = {4, 6}
    loader = DataLoader(Numbers(20), 2, n_workers=n_workers, collate=breaking)
    got = []
    with pytest.raises(ZeroDivisionError, match="at 4"):
        for batch in loader:
            got.append(batch)
    assert got == [[0, 1], [2, 3]]
    broken.clear()
    assert flat(loader) == list(range(20))
    loader.close()


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_of_none_is_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size={batch_size}"):
        DataLoader(Numbers(3), batch_size)


def test_lists_of_ones_own_are_loaded_in_their_order() -> None:
    loader = DataLoader(Numbers(9), 2, n_workers=2, collate=indices)
    assert list(loader.load([[8, 1], [], [3]])) == [[8, 1], [], [3]]
    loader.close()


@pytest.fixture
def labelled(image_folder) -> Labelled:
    return open_split(image_folder({"cat": (4, 1), "dog": (5, 1)}), seed=0).train


def test_a_dataset_decodes_its_files(labelled: Labelled) -> None:
    dataset = Dataset(labelled, 12)
    assert len(dataset) == 9
    for i, (file, target) in enumerate(zip(labelled.files, labelled.targets)):
        x, y = dataset[i]
        np.testing.assert_array_equal(x.numpy(), decode(file, 12))
        assert x.dtype is torch.uint8 and y.dtype is torch.int64 and y.shape == () and y == target
    x, y = collate(dataset, [8, 0])
    assert x.shape == (2, 12, 12, 3) and torch.equal(x[1], dataset[0][0]) and y.tolist() == [1, 0]


def test_a_dataset_may_be_grey(labelled: Labelled) -> None:
    dataset = Dataset(labelled, 12, channels=1)
    batch = collate_readable(dataset, [3, 1])
    assert batch.inputs.shape == (2, 12, 12, 1) and torch.equal(batch.inputs[1], dataset[1][0])
    np.testing.assert_array_equal(batch.inputs[0].numpy(), decode(labelled.files[3], 12, channels=1))


def test_samples_of_different_shapes_are_refused_by_their_numbers() -> None:
    samples = [(torch.zeros(2, n, 3), torch.tensor(0)) for n in (4, 4, 5, 4)]
    assert collate(samples, [0, 1, 3])[0].shape == (3, 2, 4, 3)
    with pytest.raises(UsageError, match=r"samples 1 and 2 can't be stacked .*\(2, 4, 3\) and \(2, 5, 3\); add"):
        collate(samples, [1, 0, 2])


@pytest.mark.parametrize("n_workers", [0, 2])
def test_an_unreadable_image_is_named_to_the_caller(labelled: Labelled, n_workers: int) -> None:
    loader = DataLoader(Dataset(labelled, 12), 2, n_workers=n_workers)
    good = Path(labelled.files[5]).read_bytes()
    Path(labelled.files[5]).write_bytes(b"")
    with pytest.raises(BadImage, match=f"{labelled.files[5]} is no readable image: the file is empty"):
        list(loader)
    Path(labelled.files[5]).write_bytes(good)
    assert sum(len(y) for _, y in loader) == 9
    loader.close()


@given(bad=st.sets(st.integers(0, 8)), wanted=st.permutations(range(9)), n=st.integers(0, 9))
def test_what_cannot_be_read_is_left_out_with_its_reason(tmp_path_factory, bad, wanted, n) -> None:
    folder = tmp_path_factory.mktemp("some bad")
    files = [str(folder / f"{i}.ppm") for i in range(9)]
    for i, file in enumerate(files):
        Path(file).write_bytes(b"" if i in bad else b"P6 1 1 255 " + bytes([10 * i] * 3))
    wanted = wanted[:n]
    batch = collate_readable(Dataset(Labelled(tuple(files), tuple(range(100, 109))), 4), wanted)
    rows = [row for row, i in enumerate(wanted) if i not in bad]
    assert batch.rows.tolist() == rows and batch.rows.dtype is batch.targets.dtype is torch.int64
    assert batch.targets.tolist() == [100 + wanted[row] for row in rows]
    assert batch.inputs.shape == (len(rows), 4, 4, 3) and batch.inputs.dtype is torch.uint8
    assert [int(picture[0, 0, 0]) for picture in batch.inputs] == [10 * wanted[row] for row in rows]
    assert batch.bad == tuple((files[i], "the file is empty") for i in wanted if i in bad)


def test_many_threads_read_no_further_ahead_than_memory_is_good_for() -> None:
    begun: list[int] = []
    loader = DataLoader(Numbers(1000), 1, n_workers=64, collate=lambda data, wanted: begun.append(wanted[0]))
    stream = iter(loader)
    next(stream)
    loader.close()
    assert len(begun) <= AHEAD + 1


def test_threads_give_way_to_who_trains_who_stays_as_it_is() -> None:
    def niceness(dataset: Numbers, wanted: Sequence[int]) -> list[int]:
        return [os.getpriority(os.PRIO_PROCESS, threading.get_native_id())]

    before = niceness(Numbers(0), [])
    loader = DataLoader(Numbers(8), 2, n_workers=2, collate=niceness)
    assert list(loader) == [[min(before[0] + NICE, 19)]] * 4
    loader.close()
    assert niceness(Numbers(0), []) == before


def test_one_thread_a_core_unless_told_otherwise() -> None:
    assert DataLoader(Numbers(1)).n_workers == usable_cores()


def test_validation_may_be_absent() -> None:
    assert DataLoaders([1]).valid is None
