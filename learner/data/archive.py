"""Owns the unpacking of tar and zip archives that nobody vouches for: checked first, then written inside one folder.

1. `plan` reads every header and refuses the archive if one member could do harm. Nothing is written yet.
2. `extract` makes sure that the disk has room, writes the planned files and counts the bytes that really come out.
"""

import gzip
import lzma
import math
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, cast

from learner.data.download import Progress, Report, quiet, room_for
from learner.errors import UsageError

Stream = IO[bytes] | gzip.GzipFile
CHUNK = 1 << 20
LONGEST_HEADER = 64 << 10
LONGEST_TAIL = 16 << 20  # padding that may follow a tar archive's end
BLOCK = 4096  # bytes: what the smallest file takes on a disk
LONGEST_PATH, LONGEST_PART = 2000, 255  # bytes

# What the readers of the standard library raise on damaged files, and what two names for one place lead to.
DAMAGE: tuple[type[Exception], ...] = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
)
DAMAGE += (LookupError, ValueError, NotImplementedError, RuntimeError, FileExistsError, NotADirectoryError)


class BadArchive(UsageError):
    "An archive is broken or hostile; nothing of it was kept."


@dataclass(frozen=True, slots=True)
class Member:
    "One entry of an archive, whatever its format: what it wants to be and how to read it."

    name: str
    kind: str
    size: int
    open: Callable[[], IO[bytes] | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    "What an archive may unpack to; `ratio` is the unpacked size over the archive's, ignored up to `ratio_free` bytes."

    bytes: int = 400 << 30
    members: int = 2_000_000
    ratio: float = 50.0
    ratio_free: int = 256 << 20

    def bytes_of(self, archive_bytes: int) -> int:
        "Return how many bytes an archive of this size may unpack to."
        return int(min(self.bytes, max(self.ratio_free, self.ratio * archive_bytes)))


def safe_path(name: str) -> PurePosixPath:
    "Return the relative path of the member `name`, or refuse a name that could leave the folder or cannot be written."
    path = PurePosixPath(name)
    lengths = [len(part.encode(errors="replace")) for part in path.parts]
    if sum(lengths) + len(lengths) > LONGEST_PATH or max(lengths, default=0) > LONGEST_PART:
        raise BadArchive(f"{name[:60]!r}... is too long for a path")
    if path.is_absolute():
        raise BadArchive(f"{name!r} is an absolute path")
    if ".." in path.parts:
        raise BadArchive(f"{name!r} climbs out with '..'")
    if "\\" in name or "\0" in name:
        raise BadArchive(f"{name!r} holds a backslash or a zero byte")
    return path


def extract(archive: Path, folder: Path, *, limits: Limits = Limits(), progress: Progress = quiet) -> None:
    "Unpack `archive` into the existing empty `folder`; after an error, what `folder` holds is to be thrown away."
    with _explained(archive):
        files = plan(_members(archive), limits, archive.stat().st_size)
    with room_for(sum(files.values()), folder), _explained(archive):
        _write(_members(archive), files, folder, partial(progress, f"extracting {archive.name}"))


def plan(members: Iterable[Member], limits: Limits, archive_bytes: int) -> dict[PurePosixPath, int]:
    "Return the files to write and their sizes, or refuse the whole archive, naming the member to blame."
    files: dict[PurePosixPath, int] = {}
    allowed, total = limits.bytes_of(archive_bytes), 0
    for count, member in enumerate(members, 1):
        if count > limits.members:
            raise BadArchive(f"{member.name!r} is beyond the {limits.members} members that are allowed")
        path = safe_path(member.name)
        if member.kind not in ("file", "folder"):
            raise BadArchive(f"{member.name!r} is a {member.kind}; only files and folders are allowed")
        if member.kind == "folder" or _is_junk(path):
            continue
        if path in files or path == PurePosixPath():
            raise BadArchive(f"{member.name!r} would overwrite another member or the folder itself")
        total += max(member.size, BLOCK)
        if member.size < 0 or total > allowed:
            raise BadArchive(
                f"{member.name!r} claims to be {member.size} bytes long; all files of such an archive, each counting "
                f"as {BLOCK} bytes or more, may together be no longer than {allowed} bytes"
            )
        files[path] = member.size
    _check_parents(files)
    return files


def _check_parents(files: dict[PurePosixPath, int]) -> None:
    if not files:
        raise BadArchive("it holds no files")
    for folder in {parent for path in files for parent in path.parents}:
        if folder in files:
            raise BadArchive(f"'{folder}' is both a file and a folder")


def _is_junk(path: PurePosixPath) -> bool:
    "What macOS adds to archives: resource forks and folder settings, which would look like broken images."
    return "__MACOSX" in path.parts or path.name.startswith("._") or path.name == ".DS_Store"


def _write(members: Iterable[Member], files: dict[PurePosixPath, int], folder: Path, report: Report) -> None:
    done, total = 0, sum(files.values())
    for member in members:
        path = PurePosixPath(member.name)
        if member.kind == "file" and path in files:
            _write_file(member, folder / path)
            done += member.size
            report(done, total)


def _write_file(member: Member, target: Path) -> None:
    "Copy one member, whose header promised `member.size` bytes, to a file that must not exist."
    target.parent.mkdir(parents=True, exist_ok=True)
    written, source = 0, member.open()
    if source is None:
        raise BadArchive(f"{member.name!r} has no content")
    with source, open(target, "xb") as out:
        while chunk := source.read(min(CHUNK, member.size + 1 - written)):
            written += out.write(chunk)
            if written > member.size:
                break
    if written != member.size:
        raise BadArchive(f"{member.name!r} does not hold the {member.size} bytes that its header promises")


@contextmanager
def _explained(archive: Path) -> Iterator[None]:
    "Say which archive an error is about, and what to do."
    remedy = "nothing of it was kept; get a whole copy, or, if you trust it, unpack it yourself and give the folder"
    try:
        yield
    except BadArchive as error:
        raise BadArchive(f"{archive} is refused: {error}; {remedy}") from None
    except DAMAGE as error:
        raise BadArchive(f"{archive} is broken ({type(error).__name__}: {error}); {remedy}") from error


def _members(archive: Path) -> Iterator[Member]:
    "Read the members of an archive, whose format is told by its first bytes."
    with open(archive, "rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic.startswith(b"PK"):
            yield from _zip_members(file)
        elif magic.startswith(b"\x1f\x8b"):
            yield from _tar_members(gzip.GzipFile(fileobj=file))
        else:
            yield from _tar_members(file)


def _zip_members(file: IO[bytes]) -> Iterator[Member]:
    with zipfile.ZipFile(file) as archive:
        _check_count(file, len(archive.infolist()))
        for info in archive.infolist():
            if info.header_offset < 0:
                raise BadArchive(f"{info.filename!r} would lie before the archive's beginning")
            yield Member(info.orig_filename, _zip_kind(info), info.file_size, partial(archive.open, info))


def _check_count(file: IO[bytes], found: int) -> None:
    "Refuse a zip whose directory lost members, which `zipfile` does not notice."
    file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 16) - 22))
    tail = file.read()
    (promised,) = struct.unpack_from("<H", tail, tail.rindex(b"PK\5\6") + 10)
    if promised not in (found & 0xFFFF, 0xFFFF):  # the field has 16 bits; all set, it says to look elsewhere
        raise BadArchive(f"it holds {found} members where it promises {promised}")


def _zip_kind(info: zipfile.ZipInfo) -> str:
    mode = stat.S_IFMT(info.external_attr >> 16)
    kinds = {0: "file", stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}
    kind = "folder" if info.is_dir() else kinds.get(mode, "special file")
    return "folder with contents" if kind == "folder" and info.file_size else kind


class _Guard:
    "A tar stream that lets headers read only so much: `tarfile` believes the length that a header gives for itself."

    def __init__(self, file: Stream) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell
        self.left: float = LONGEST_HEADER

    def read(self, size: int) -> bytes:
        "Read up to `size` bytes."
        if not 0 <= size <= self.left:
            raise BadArchive(f"a header claims to be {size} bytes long, which may be {LONGEST_HEADER} at most")
        self.left -= size
        return self.file.read(size)


def _tar_members(file: Stream) -> Iterator[Member]:
    guard = _Guard(file)
    with tarfile.open(fileobj=cast(IO[bytes], guard), mode="r:") as archive:
        for info in archive:
            guard.left = math.inf  # a file's contents
            yield Member(info.name, _tar_kind(info), info.size, partial(archive.extractfile, info))
            guard.left = LONGEST_HEADER
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep all for random access
            if sum(map(len, archive.pax_headers)) > LONGEST_HEADER:  # and hands a copy of these to every member
                raise BadArchive(f"{info.name!r} comes after more than {LONGEST_HEADER} bytes of global headers")
        _check_end(file, archive.offset)


def _tar_kind(info: tarfile.TarInfo) -> str:
    if info.isdir():
        return "folder"
    if info.issym() or info.islnk():
        return "link"
    return "file" if info.isfile() and not info.issparse() else "special file"


def _check_end(file: Stream, end: int) -> None:
    "Refuse an archive cut between two members, which `tarfile` takes for whole; reading on lets gzip check its sum."
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise BadArchive("it ends without the mark of its end")
    if len(file.read(LONGEST_TAIL)) == LONGEST_TAIL:
        raise BadArchive(f"{LONGEST_TAIL} bytes or more follow its end")
