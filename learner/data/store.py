"""The store: decoded pictures of a dataset on this machine's disk, so that each is decoded once.

A store is a folder with a file of pixels, one row a picture, and a file of checksums, one a row. All processes of the
machine map both into memory and fill rows as they first need them, while they train. A row counts only if its checksum
fits, and each process looks at that before it first uses the row: so a writer that was killed half-way, a page that
never reached the disk, or a flipped bit costs one more decoding and nothing else, and two runs may fill one store at
once. The folder's name is a hash of all that the pixels depend on; what changes is another store.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import re
import shutil
import tempfile
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from learner.data.decoder import decoder_version
from learner.data.files import Labelled
from learner.data.images import BadImage
from learner.data.loader import Dataset
from learner.errors import UserError

PIXELS, CHECKSUMS, LOCK = "pixels", "checksums", "lock"
EMPTY = 0  # the checksum of a row that nobody has filled
LIMIT = 50 * 2**30  # bytes that all stores of a folder may take together
OURS = re.compile(r"[0-9a-f]{32}")  # what stores are called: a folder may hold other things, too
LEFTOVER = re.compile(rf"\.{OURS.pattern}\..+")
LOOK_AHEAD = 512  # rows


def store_name(files: Sequence[str], size: int, channels: int = 3) -> str:
    """The name of the store of these files decoded to `size` square: a hash of paths, sizes, modification times,
    `size`, `channels` and the decoder's version. A file that is missing counts as such: reading it will say so."""
    digest = hashlib.sha256(f"1 {size} {channels} {decoder_version()}".encode())
    for file in files:
        try:
            status = os.stat(file)
            digest.update(f"\0{file}\0{status.st_size}\0{status.st_mtime_ns}".encode(errors="surrogateescape"))
        except OSError:
            digest.update(f"\0{file}\0missing".encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def store_bytes(n: int, size: int, channels: int = 3) -> int:
    "What a store of `n` pictures takes on disk."
    return n * (size * size * channels + 4)


class Store:
    """Rows uint8 (size, size, channels) by number, shared by all processes that open the same folder.

    `named` (in ns, by `time`) is a moment before the files were looked at for its name; else that is now. Raises
    UserError where the disk has no room; nothing is left there then.
    """

    def __init__(self, folder: Path, n: int, size: int, channels: int = 3, named: int | None = None) -> None:
        self.folder, shape, now = folder, (n, size, size, channels), time.time_ns()
        self.named = min(named or now, now)  # a clock that is ahead, on the driver's machine, would let too much pass
        try:
            with ExitStack() as files, _locked(folder.parent):
                _make(folder, {PIXELS: max(1, math.prod(shape)), CHECKSUMS: max(1, 4 * n)})
                os.utime(folder)  # pruning goes by the last use
                lock = files.enter_context(open(folder / LOCK, "a"))
                fcntl.flock(lock, fcntl.LOCK_SH)
                self._file = files.enter_context(open(folder / PIXELS, "r+b", buffering=0))
                self.pixels = np.memmap(self._file, np.uint8, "r+", shape=shape)
                self.checksums = np.memmap(folder / CHECKSUMS, np.uint32, "r+", shape=(n,))
                weakref.finalize(self, files.pop_all().close)  # they are held as long as the store is in use
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            mebibytes = store_bytes(n, size, channels) / 2**20
            raise UserError(
                f"the store of decoded images ({mebibytes:.0f} MiB) can't be kept in {folder.parent}: {reason}; "
                "pass --cache DIR with more room, or --cache off"
            ) from error
        self._trusted = np.zeros(n, bool)
        self._looked = 0

    def get(self, row: int) -> NDArray[np.uint8] | None:
        "The row, or None where it is not there or not sound."
        return None if self.missing(np.array([row])) else self.pixels[row]

    def knows(self, rows: NDArray[np.int64]) -> bool:
        "Whether this process has seen that all these rows are there and sound."
        return bool(self._trusted[rows].all())

    def missing(self, rows: NDArray[np.int64]) -> list[int]:
        "At which places of `rows` there are such as are not there or not sound."
        if self.knows(rows):
            return []
        new = rows[~self._trusted[rows]]
        for row in new[self.checksums[new] != EMPTY]:
            self._trusted[row] = self.checksums[row] == checksum(self.pixels[row])
        return np.flatnonzero(~self._trusted[rows]).tolist()

    def take(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> list[int]:
        "Copy rows into `out`, in one call, since one for each row takes longer; the places of those `missing`."
        missing = self.missing(rows)
        np.take(self.pixels, rows, 0, out=out, mode="clip")
        return missing

    def look_ahead(self) -> None:
        """See whether some more rows are sound, in their order.

        Others have filled most of them: without this, it would take many epochs of ever new samples to know them all.
        """
        first = self._looked
        self._looked = min(first + LOOK_AHEAD, len(self._trusted))
        self.missing(np.arange(first, self._looked))

    def put(self, row: int, pixels: NDArray[np.uint8]) -> None:
        """Fill a row, its checksum last; where the disk refuses it, it is not there.

        Written, not copied into the map, which takes twice as long: each of its pages would have to be asked for.
        """
        data = np.ascontiguousarray(pixels).data
        with suppress(OSError):
            if os.pwrite(self._file.fileno(), data, row * data.nbytes) == data.nbytes:
                self.checksums[row] = checksum(pixels)
                self._trusted[row] = True

    @property
    def filled(self) -> int:
        "How many rows have been filled, sound or not."
        return int(np.count_nonzero(self.checksums))


def checksum(pixels: NDArray[np.uint8]) -> int:
    "CRC-32 of a row, never that of an empty one."
    return zlib.crc32(np.ascontiguousarray(pixels).data) or EMPTY + 1


def changed(file: str) -> int:
    "When a file was last written or replaced, in ns: not its modification time, which can be set to anything."
    try:
        return os.stat(file).st_ctime_ns
    except OSError:
        return time.time_ns()


class StoredDataset(Dataset):
    """A Dataset whose pictures are rows of a store from `first` on, decoded when they are not there yet.

    Those of files that have changed since the store was named are not kept: they may change back.
    """

    def __init__(self, labelled: Labelled, size: int, store: Store, first: int) -> None:
        super().__init__(labelled, size, store.pixels.shape[-1])
        self.store, self.first, self.look_ahead = store, first, False

    def pixels(self, i: int) -> NDArray[np.uint8]:
        "The picture of sample `i`; raises BadImage, each time anew."
        row = self.store.get(self.first + i)
        if row is None:
            row = super().pixels(i)
            if changed(self.labelled.files[i]) < self.store.named:
                self.store.put(self.first + i, row)
        return row

    def at_hand(self, indices: Sequence[int]) -> bool:
        "Whether all these samples are known to be in the store; who asks has `read` come to know them all soon."
        self.look_ahead = True
        return self.store.knows(self._rows(indices))

    def _rows(self, indices: Sequence[int]) -> NDArray[np.int64]:
        return np.fromiter(indices, np.int64, len(indices)) + self.first

    def read(self, indices: Sequence[int], out: NDArray[np.uint8]) -> dict[int, BadImage]:
        "See Dataset; what is not there yet is decoded, all at once."
        rows = self._rows(indices)
        missing = self.store.take(rows, out)
        if not missing:
            if self.look_ahead:
                self.store.look_ahead()
            return {}
        fresh = out if len(missing) == len(out) else np.empty((len(missing), *out.shape[1:]), np.uint8)
        bad = super().read([indices[place] for place in missing], fresh)
        for number, place in enumerate(missing):
            if number not in bad and changed(self.labelled.files[indices[place]]) < self.store.named:
                self.store.put(int(rows[place]), fresh[number])
        if fresh is not out:
            out[missing] = fresh
        return {missing[number]: error for number, error in bad.items()}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    "Let one process at a time create and remove stores in `folder`."
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(folder: Path, files: dict[str, int]) -> None:
    """Make the folder with files of zeros of these sizes, unless it is there and they fit.

    Aside first, and with their blocks taken at once: a disk that fills under a mapped file kills whoever writes.
    """
    if folder.exists():
        if all((folder / name).exists() and (folder / name).stat().st_size == size for name, size in files.items()):
            return
        shutil.rmtree(folder)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, size in files.items():
            with open(aside / name, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        os.rename(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def prune(folder: Path, room: int = 0, limit: int = LIMIT, keep: Iterable[str] = ()) -> list[str]:
    """Remove the least recently used stores until `room` bytes more fit: with the others into `limit`, and twice into
    what the disk has left. The names of those removed.

    A store that any process has open stays, and so do those in `keep`; what a killed creation left goes. Whatever else
    is in that folder is none of ours.
    """
    removed: list[str] = []
    with _locked(folder):
        entries = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()]
        for leftover in (entry for entry in entries if LEFTOVER.fullmatch(entry.name)):
            shutil.rmtree(leftover, ignore_errors=True)
        stores = sorted(filter(_is_store, entries), key=lambda entry: entry.stat().st_mtime)
        sizes, free = {store: _size(store) for store in stores}, shutil.disk_usage(folder).free
        idle = [store for store in stores if store.name not in set(keep) and not _in_use(store)]
        if 2 * room > free + sum(sizes[store] for store in idle):
            room = 0  # to remove them would not help
        for store in idle:
            if sum(sizes.values()) + room > limit or (room and 2 * room > free):
                free += sizes.pop(store)
                shutil.rmtree(store)
                removed.append(store.name)
    return removed


def _is_store(folder: Path) -> bool:
    return bool(OURS.fullmatch(folder.name)) and {file.name for file in folder.iterdir()} <= {PIXELS, CHECKSUMS, LOCK}


def _size(store: Path) -> int:
    return sum(file.stat().st_size for file in store.iterdir())


def _in_use(store: Path) -> bool:
    try:
        with open(store / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
