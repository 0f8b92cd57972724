"The store gives the pixels that decoding gives, whatever was killed, changed, damaged, shared or full."

import fcntl
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from learner.data.decoder import decode_all
from learner.data.files import Labelled
from learner.data.images import BadImage, decode
from learner.data.store import EMPTY, Store, StoredDataset, changed, checksum, prune, store_bytes, store_name
from learner.errors import UserError

SIZE = 12


@pytest.fixture
def labelled(tmp_path: Path) -> Labelled:
    "Nine JPEGs of noise."
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    files = [str(tmp_path / "images" / f"{n}.jpg") for n in range(9)]
    for file in files:
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(file)
    return Labelled(tuple(files), tuple(range(9)))


def open_all(labelled: Labelled, folder: Path) -> StoredDataset:
    return StoredDataset(labelled, SIZE, Store(folder / "stores" / "one", len(labelled), SIZE), 0)


def assert_right(dataset: StoredDataset) -> None:
    for i, file in enumerate(dataset.labelled.files):
        np.testing.assert_array_equal(dataset.pixels(i), decode(file, SIZE))


def test_pictures_are_decoded_once_and_stay(labelled, tmp_path, monkeypatch) -> None:
    assert_right(open_all(labelled, tmp_path))
    again = open_all(labelled, tmp_path)
    assert again.store.filled == 9
    truth = [decode(file, SIZE) for file in labelled.files]
    monkeypatch.setattr("learner.data.loader.decode", lambda *_: pytest.fail("decoded a second time"))
    for i, picture in enumerate(truth):
        np.testing.assert_array_equal(again.pixels(i), picture)


def test_at_hand_is_what_was_decoded_or_seen_to_be_sound(labelled, tmp_path) -> None:
    dataset = open_all(labelled, tmp_path)
    out = np.empty((2, SIZE, SIZE, 3), np.uint8)
    assert not dataset.at_hand([3, 4])
    dataset.read([3, 4], out)
    assert dataset.at_hand([4, 3]) and not dataset.at_hand([3, 5])
    again = open_all(labelled, tmp_path)
    assert not again.at_hand([3])
    again.store.checksums[4] += 1
    again.read([3, 5], out)
    assert again.at_hand([3, 5]) and not again.at_hand([4])
    truth = np.empty_like(out)
    decode_all([labelled.files[3], labelled.files[5]], truth)
    np.testing.assert_array_equal(out, truth)


def test_pictures_in_grey_are_kept_as_such(labelled, tmp_path) -> None:
    store = Store(tmp_path / "stores" / "grey", 9, SIZE, channels=1)
    for _ in range(2):
        dataset = StoredDataset(labelled, SIZE, store, 0)
        assert np.array_equal(dataset.pixels(4), decode(labelled.files[4], SIZE, channels=1))
    assert store.filled == 1 and store_bytes(9, SIZE, 1) == 9 * (SIZE**2 + 4)
    assert store_name(labelled.files, SIZE, 1) != store_name(labelled.files, SIZE)


@given(row=st.integers(0, 8), place=st.integers(0, SIZE * SIZE * 3 - 1), flip=st.integers(1, 255))
def test_a_damaged_row_is_decoded_again(tmp_path_factory, row, place, flip) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    picture = np.random.default_rng(row).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    Store(folder / "one", 9, SIZE).put(row, picture)
    with open(folder / "one" / "pixels", "r+b") as file:
        file.seek(row * picture.size + place)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ flip]))
    reopened = Store(folder / "one", 9, SIZE)
    assert reopened.filled == 1 and reopened.get(row) is None
    reopened.put(row, picture)
    np.testing.assert_array_equal(Store(folder / "one", 9, SIZE).get(row), picture)


def test_a_row_whose_writer_died_before_its_checksum_is_not_there(labelled, tmp_path) -> None:
    dataset = open_all(labelled, tmp_path)
    dataset.store.pixels[3] = 77
    assert dataset.store.get(3) is None
    assert_right(dataset)


def test_a_black_picture_and_an_empty_row_differ() -> None:
    black = np.zeros((SIZE, SIZE, 3), np.uint8)
    assert checksum(black) != 0


@pytest.mark.parametrize("written", [OSError("no space"), 5])
def test_a_row_that_the_disk_refuses_is_not_there(labelled, tmp_path, monkeypatch, written: OSError | int) -> None:
    dataset = open_all(labelled, tmp_path)
    monkeypatch.setattr(os, "pwrite", Mock(side_effect=[written] * 9))
    assert_right(dataset)
    assert dataset.store.filled == 0 and not dataset.at_hand([0])
    monkeypatch.undo()
    assert_right(dataset)
    assert dataset.store.filled == 9 and dataset.at_hand(range(9))


def test_an_unreadable_file_is_reported_every_time_and_never_stored(labelled, tmp_path) -> None:
    Path(labelled.files[4]).write_bytes(b"")
    dataset = open_all(labelled, tmp_path)
    for _ in range(2):
        with pytest.raises(BadImage, match=r"4\.jpg.*empty"):
            dataset.pixels(4)
    assert dataset.store.filled == 0


def test_the_name_changes_with_all_that_pixels_depend_on(labelled, monkeypatch) -> None:
    names = [
        store_name(labelled.files, SIZE),
        store_name(labelled.files, SIZE + 1),
        store_name(labelled.files[1:], SIZE),
    ]
    names.append(store_name(labelled.files[::-1], SIZE))
    with monkeypatch.context() as another:
        another.setattr("learner.data.store.decoder_version", lambda: "Pillow 1.0")
        names.append(store_name(labelled.files, SIZE))
    os.utime(labelled.files[0], ns=(1, 1))
    names.append(store_name(labelled.files, SIZE))
    Path(labelled.files[0]).write_bytes(b"longer or shorter")
    os.utime(labelled.files[0], ns=(1, 1))
    names.append(store_name(labelled.files, SIZE))
    os.remove(labelled.files[0])
    names.append(store_name(labelled.files, SIZE))
    assert len(set(names)) == len(names)
    assert store_name(labelled.files, SIZE) == names[-1]


def fill(labelled: Labelled, folder: Path, rows: range) -> None:
    dataset = open_all(labelled, folder)
    for i in rows:
        dataset.pixels(i)


def test_processes_fill_one_store_together(labelled, tmp_path) -> None:
    context = multiprocessing.get_context("spawn")
    parts = [range(5), range(3, 9)]
    writers = [context.Process(target=fill, args=(labelled, tmp_path, part)) for part in parts]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    dataset = open_all(labelled, tmp_path)
    assert dataset.store.filled == 9
    assert_right(dataset)


def test_a_disk_without_room_is_said_and_nothing_is_left(tmp_path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"store of decoded images .* No space left .* --cache off"):
        Store(tmp_path / "stores" / "one", 9, SIZE)
    assert [entry.name for entry in (tmp_path / "stores").iterdir()] == ["lock"]


@pytest.mark.parametrize("harm", ["truncate", "remove"])
def test_a_store_whose_files_were_cut_is_made_anew(labelled, tmp_path, harm) -> None:
    assert_right(open_all(labelled, tmp_path))
    file = tmp_path / "stores" / "one" / "pixels"
    os.truncate(file, 100) if harm == "truncate" else file.unlink()
    dataset = open_all(labelled, tmp_path)
    assert dataset.store.filled == 0
    assert_right(dataset)


NAMES = {name: f"{number:032x}" for number, name in enumerate(["old", "middle", "young"])}


@pytest.fixture
def three(tmp_path) -> dict[str, Store]:
    "Stores of one size, one used after the other."
    stores = {}
    for age, (name, folder) in enumerate(NAMES.items()):
        stores[name] = Store(tmp_path / folder, 9, SIZE)
        os.utime(tmp_path / folder, (time.time() - 1000 + age, time.time() - 1000 + age))
    return stores


def test_pruning_removes_the_least_recently_used_but_none_in_use(tmp_path, three) -> None:
    one_size = store_bytes(9, SIZE)
    assert prune(tmp_path, limit=one_size) == []
    (tmp_path / f".{NAMES['middle']}.killed").mkdir()
    del three["middle"], three["young"]
    assert prune(tmp_path, limit=2 * one_size) == [NAMES["middle"]]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [NAMES["old"], NAMES["young"], "lock"]
    assert prune(tmp_path, limit=0, keep=[NAMES["young"]]) == []
    assert three["old"].filled == 0


def test_the_last_use_counts_not_the_making(tmp_path, three) -> None:
    three.clear()
    Store(tmp_path / NAMES["old"], 9, SIZE)
    assert prune(tmp_path, limit=2 * store_bytes(9, SIZE)) == [NAMES["middle"]]


def test_stores_are_made_and_removed_by_one_at_a_time(tmp_path, monkeypatch) -> None:
    def alone(does: Callable[..., object], *args: Any, **options: Any) -> object:
        with open(tmp_path / "lock") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return does(*args, **options)

    rename, rmtree = Mock(side_effect=partial(alone, os.rename)), Mock(side_effect=partial(alone, shutil.rmtree))
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    Store(tmp_path / NAMES["old"], 9, SIZE)
    assert prune(tmp_path, limit=0) == [NAMES["old"]]
    assert rename.call_count == rmtree.call_count == 1


def test_pruning_makes_room_for_a_new_store(tmp_path, three, monkeypatch) -> None:
    one_size = store_bytes(9, SIZE)
    three.clear()
    assert prune(tmp_path, room=one_size, limit=3 * one_size) == [NAMES["old"]]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=one_size))
    assert prune(tmp_path, room=2 * one_size) == [], "to remove both would not be enough"
    assert prune(tmp_path, room=one_size) == [NAMES["middle"]]


def test_pruning_touches_nothing_but_stores(tmp_path) -> None:
    "Somebody may say --cache ~ or --cache . of a repository."
    kept = [
        ".git/config",
        ".ssh/key",
        "photos/a.jpg",
        f"{'a' * 32}/thesis.tex",
        f".{'a' * 31}.b/c",
        f"{'g' * 32}/pixels",
    ]
    for name in kept:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    (tmp_path / ("b" * 32)).symlink_to(tmp_path / "photos")
    assert prune(tmp_path, room=2**60, limit=0) == []
    assert all((tmp_path / name).read_text() == name for name in kept)


def touch(file: Path, since: int) -> None:
    "Have the file changed later than `since`: file systems have coarse clocks."
    while changed(str(file)) < since:
        os.utime(file)


def test_a_file_that_changes_under_way_is_not_kept(labelled, tmp_path) -> None:
    "Not even if it looks as before: it may be put back, and the store's name would be the same."
    dataset = open_all(labelled, tmp_path)
    file = Path(labelled.files[2])
    status, before = file.stat(), file.read_bytes()
    Image.new("RGB", (30, 20), "red").save(file)
    file.write_bytes(file.read_bytes().ljust(len(before), b"\0"))
    times = status.st_atime_ns, status.st_mtime_ns
    os.utime(file, ns=times)
    touch(file, dataset.store.named)
    os.utime(file, ns=times)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    dataset.read([2, 3], np.empty((2, SIZE, SIZE, 3), np.uint8))
    for i in range(9):
        if i != 3:
            dataset.pixels(i)
    assert np.flatnonzero(dataset.store.checksums == EMPTY).tolist() == [2]
    file.write_bytes(before)
    os.utime(file, ns=times)
    np.testing.assert_array_equal(open_all(labelled, tmp_path).pixels(2), decode(str(file), SIZE))


def test_a_file_that_changed_before_a_later_process_opens_the_store_is_not_kept_either(labelled, tmp_path) -> None:
    "A worker may come hours after the store was named, in place of one that died."
    named = time.time_ns()
    touch(Path(labelled.files[2]), named)
    dataset = StoredDataset(labelled, SIZE, Store(tmp_path / "stores" / "one", 9, SIZE, named=named), 0)
    assert_right(dataset)
    assert np.flatnonzero(dataset.store.checksums == EMPTY).tolist() == [2]


def test_a_store_whose_lock_a_cleaner_removed_is_as_good(labelled, tmp_path) -> None:
    "Nobody writes to that file, so that what tidies /tmp takes it for abandoned."
    assert_right(open_all(labelled, tmp_path))
    (tmp_path / "stores" / "one" / "lock").unlink()
    assert open_all(labelled, tmp_path).store.filled == 9


def test_what_others_have_filled_is_soon_known(labelled, tmp_path) -> None:
    assert_right(open_all(labelled, tmp_path))
    dataset = open_all(labelled, tmp_path)
    out = np.empty((1, SIZE, SIZE, 3), np.uint8)
    dataset.read([3], out)
    assert not dataset.at_hand([5]), "nobody had asked"
    dataset.read([3], out)
    assert dataset.at_hand(range(9))
