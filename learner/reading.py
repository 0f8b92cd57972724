"Reading files that nobody vouches for: regular ones alone, up to a length, and JSON that is one object."

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def opened(file: str | Path, limit: int | None = None) -> Iterator[IO[bytes]]:
    """A file open for reading; OSError where it has more than `limit` bytes, or is a pipe or a device, without an end.

    To open a pipe alone would wait for its writer: hence O_NONBLOCK, which means nothing to a regular file.
    """
    with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no regular file")
        if limit is not None and status.st_size > limit:
            raise OSError(f"it has {status.st_size:,} bytes, and {limit:,} are the most")
        yield stream


def read_bytes(file: str | Path, limit: int) -> bytes:
    "What a file holds; OSError as `opened`."
    with opened(file, limit) as stream:
        return stream.read()


def parse_object(content: bytes) -> dict[str, Any]:
    "The JSON object that `content` is; ValueError for anything else, however deep."
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value
