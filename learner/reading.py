"Reading files that nobody vouches for: regular ones alone, up to a length, and JSON that is one object."

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from learner.errors import UsageError

READING = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


def expanded(path: str | Path) -> Path:
    "The path with `~` as the home that it stands for; UsageError where there is none, as in containers."
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{path} can't be told: {error} Set HOME, or write the path without ~") from error


def absolute(path: str) -> str:
    "What is there, from the root on, so that it means the same in any folder; all else (a URL, a name) as it is."
    place = expanded(path)
    return os.path.abspath(place) if os.path.exists(place) else path  # which says no of what can be no path


@contextmanager
def opened(file: str | Path, limit: int | None = None) -> Iterator[IO[bytes]]:
    """A file open for reading; OSError where it has more than `limit` bytes, or is a pipe or a device, without an end.

    To open a pipe alone would wait for its writer: hence O_NONBLOCK, which means nothing to a regular file.
    """
    with open(file, "rb", opener=lambda path, _: os.open(path, READING)) as stream:
        _checked_size(stream.fileno(), limit)
        yield stream


def _checked_size(descriptor: int, limit: int | None) -> int:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is no regular file")
    if limit is not None and status.st_size > limit:
        raise OSError(f"it has {status.st_size:,} bytes, and {limit:,} are the most")
    return status.st_size


def read_bytes(file: str | Path, limit: int) -> bytes:
    "What a file holds; OSError as `opened`. By the system's calls alone, since Python's file takes twice as long."
    descriptor = os.open(file, READING)
    try:
        size = _checked_size(descriptor, limit)
        content = os.read(descriptor, size)
        while len(content) < size and (more := os.read(descriptor, size - len(content))):
            content += more
        return content
    finally:
        os.close(descriptor)


def parse_object(content: bytes) -> dict[str, Any]:
    "The JSON object that `content` is; ValueError for anything else, however deep."
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value
