"""Owns the way from what `--data` says to a folder with the dataset in it.

A folder is used where it lies. All else is made once in the cache: an archive is unpacked, a URL or a known name is
downloaded and unpacked, `shapes` is drawn. Whatever is made grows in NAME.aside and is renamed to NAME when whole, by
one process at a time; so a folder without that ending is complete.
"""

import csv
import difflib
import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as once
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from learner.data import shapes
from learner.data.archive import BadArchive, extract
from learner.data.download import Progress, fetch, quiet, quoted
from learner.errors import UsageError, UserError
from learner.reading import expanded

ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")
SHAPES = "shapes"


@dataclass(frozen=True, slots=True)
class Known:
    "A public archive that can be asked for by name; `layout` says where its images lie and what labels them."

    name: str
    url: str
    bytes: int
    md5: str
    layout: str


@once
def known() -> tuple[Known, ...]:
    "Return the datasets that have a name, in the order of datasets.csv."
    with open(Path(__file__).with_name("datasets.csv"), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return tuple(Known(row["name"], row["url"], int(row["bytes"]), row["md5"], row["layout"]) for row in rows)


def resolve(data: str, cache: Path, progress: Progress | None = None) -> Path:
    "Return the folder that holds the dataset `data`, made in the folder `cache` where it is not there yet."
    cache = expanded(cache).absolute()
    try:
        return _resolve(data, expanded(data).absolute(), cache, progress or quiet)
    except OSError as error:
        remedy = "make room" if error.errno == errno.ENOSPC else "make it accessible"
        raise UserError(
            f"{error.filename or cache} cannot be used ({error.strerror or error}): {remedy}, or choose another cache "
            "folder (--data-dir)"
        ) from error


def _resolve(data: str, path: Path, cache: Path, progress: Progress) -> Path:
    if data and path.is_dir():
        return path
    if path.is_file():
        return _from_file(path, cache, progress)
    if "://" in data:
        return _from_url(data, cache, progress)
    if data == SHAPES:
        name = f"{SHAPES}-v{shapes.VERSION}-seed{shapes.SEED}-{shapes.TRAIN}x{shapes.VALID}"
        return made(cache / name, partial(shapes.generate, progress=progress), progress)
    for dataset in known():
        if data == dataset.name:
            return _from_web(dataset.url, cache, progress, dataset)
    raise _unknown(data)


def _from_file(archive: Path, cache: Path, progress: Progress) -> Path:
    "Unpack a local archive; one that was changed since is another archive."
    if not archive.name.lower().endswith(ARCHIVES):
        raise UsageError(f"{archive} is a file but no archive: --data takes a folder or one of {', '.join(ARCHIVES)}")
    name, archive = archive.name, archive.resolve()
    stat = archive.stat()
    target = cache / _key(name, f"{archive}|{stat.st_size}|{stat.st_mtime_ns}")
    return _top(made(target, partial(extract, archive, progress=progress), progress))


def _from_url(url: str, cache: Path, progress: Progress) -> Path:
    quoted(url)  # refuses a bad address before anything is made
    same = [dataset for dataset in known() if dataset.url == url]
    return _from_web(url, cache, progress, same[0] if same else None)


def _from_web(url: str, cache: Path, progress: Progress, dataset: Known | None) -> Path:
    "Download and unpack an archive; the archive is kept, so that a broken unpacking does not cost another download."
    file = PurePosixPath(unquote(urlsplit(url).path)).name or "data"
    name = f"{dataset.name}-{dataset.md5[:8]}" if dataset else _key(file, url)
    archive = cache / (name + _split(file)[1])
    size, md5 = (dataset.bytes, dataset.md5) if dataset else (None, None)

    def build(folder: Path) -> None:
        fetch(url, archive, size=size, md5=md5, progress=progress)
        try:
            extract(archive, folder, progress=progress)
        except BadArchive:
            archive.unlink()  # else the next run would take it for downloaded
            raise

    return _top(made(cache / name, build, progress))


def made(target: Path, build: Callable[[Path], None], progress: Progress = quiet) -> Path:
    "Return the folder `target`; where it is missing, `build` fills a folder beside it that takes its place when whole."
    if target.is_dir():
        return target
    with locked(target, progress):
        if target.is_dir():
            return target
        aside = target.with_name(target.name + ".aside")
        shutil.rmtree(aside, ignore_errors=True)  # left by a process that was killed
        aside.mkdir()
        try:
            build(aside)
            os.sync()  # thousands of files, then their folder's name: a power cut must not keep the name alone
            os.rename(aside, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return target


@contextmanager
def locked(target: Path, progress: Progress = quiet) -> Iterator[None]:
    "Hold NAME.lock, on which other processes and threads wait; the system drops the lock of a process that dies."
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(target.name + ".lock"), "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for the process that makes {target.name}", 0, 0)
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would leave it with a child that was forked meanwhile


def _split(name: str) -> tuple[str, str]:
    "Return a file's name without and with only the ending of an archive."
    ending = next((ending for ending in ARCHIVES if name.lower().endswith(ending)), "")
    return (name[: -len(ending)], ending) if ending else (name, ".archive")


def _key(name: str, identity: str) -> str:
    "A folder name that people can read and that no other `identity` shares."
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", _split(name)[0]).strip("-")[:40]
    return f"{readable}-{hashlib.sha256(os.fsencode(identity)).hexdigest()[:12]}"


def _top(folder: Path) -> Path:
    "Step into the one folder that an archive usually wraps its files in."
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else folder


def _unknown(data: str) -> UsageError:
    "Say what `--data` takes, and guess what was meant."
    names = [SHAPES, *(dataset.name for dataset in known())]
    rule = f"--data takes a folder, an archive ({', '.join(ARCHIVES)}), a URL, or one of {', '.join(names)}"
    if "/" in data or data.startswith((".", "~")) or data.lower().endswith(ARCHIVES):
        return UsageError(f"{data!r} does not exist: {rule}")
    close = difflib.get_close_matches(data.lower(), names, n=3, cutoff=0.5)
    guess = f"; did you mean {' or '.join(close)}?" if close else ""
    return UsageError(f"{data!r} is no known dataset and no folder here: {rule}{guess}")
