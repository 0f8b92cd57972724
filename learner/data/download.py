"""Owns bringing one file from the web to the disk: resumable, checked, and in its place only when it is whole.

What has arrived lies in NAME.part, and NAME.part.json notes of which version of the remote file.
1. Ask for the rest of that version (`Range`, `If-Range`), or for the whole file where nothing proves the version.
2. Append what comes. A connection that breaks is tried again, and only attempts that bring nothing new are counted.
3. Check size and MD5 of the whole, then rename. Callers hold the lock of the file: one process downloads at a time.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import cast
from urllib import request
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit

from learner.errors import UsageError, UserError

Progress = Callable[[str, int, int], None]  # what is going on, how much is done, how much there is (0: unknown)
Report = Callable[[int, int], None]
CHUNK = 1 << 18
NUMBER = "[0-9]{1,18}"  # what a server may send as one
PASSING = {408, 425, 429}  # refusals that may be over a moment later, as are all from 500 on


def quiet(what: str, done: int, total: int) -> None:
    "The progress that nobody watches."


def fetch(
    url: str,
    path: Path,
    *,
    size: int | None = None,
    md5: str | None = None,
    progress: Progress = quiet,
    attempts: int = 4,
    pause: float = 0.5,
    timeout: float = 30.0,
) -> Path:
    "Return `path`, downloaded from `url` unless it is there; `size` and `md5` are checked where given."
    if path.is_file() and size in (None, path.stat().st_size):
        return path
    source, part = quoted(url), Part(path)
    best, failures = part.size, 0
    while True:
        try:
            _advance(source, part, size, timeout, partial(progress, f"downloading {path.name}"))
            _verify(url, part, size, md5, progress)
            return part.promote()
        except Interrupted as error:
            failures = 0 if part.size > best else failures + 1
            best = max(best, part.size)
            if failures >= attempts:
                raise UserError(_unreachable(url, error, part.size)) from error
            time.sleep(pause * 2**failures)


def quoted(url: str) -> str:
    "Return `url` with what may not travel as it is escaped, or refuse what is not an http(s) address."
    valid = False
    with suppress(ValueError):
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    if not valid:
        raise UsageError(f"{url!r} cannot be downloaded: an address is http://HOST/PATH or https://HOST/PATH")
    return quote(url, safe="%/:=&?~#+!$,;'@()*[]")


@contextmanager
def room_for(needed: int, folder: Path) -> Iterator[None]:
    "Write `needed` bytes into `folder` only if they fit, and say what was needed if the disk fills up after all."
    free = shutil.disk_usage(folder).free
    full = f"{folder} has no room: {needed:,} bytes are needed, {free:,} are free; free some, or choose another folder"
    if needed > free:
        raise UserError(full)
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(full) from error
        raise


class Interrupted(Exception):
    "The exchange with the server failed in a way that another attempt may mend."


@dataclass(frozen=True, slots=True)
class Version:
    "What tells one version of a remote file from the next: a strong ETag or a date, if the server gave one, and size."

    validator: str | None = None
    total: int | None = None


class Part:
    "The beginning of a file that has arrived so far, and the version it is the beginning of."

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(target.name + ".part")
        self.notes = target.with_name(target.name + ".part.json")

    @property
    def size(self) -> int:
        "The bytes that have arrived."
        return self.path.stat().st_size if self.path.exists() else 0

    def version(self) -> Version:
        "Return the version that was noted; an empty one if there is no note or it was torn."
        try:
            return Version(**json.loads(self.notes.read_text()))
        except (FileNotFoundError, ValueError, TypeError, RecursionError):
            return Version()

    def begin(self, version: Version) -> None:
        "Forget what has arrived, and note which version is to come."
        self.discard()
        self.notes.write_text(json.dumps(asdict(version)))

    def discard(self) -> None:
        "Remove what has arrived; the note goes last, so that no other version's note can ever stand beside it."
        self.path.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)

    def promote(self) -> Path:
        "Put the whole file in its place; it is on the disk before its name is."
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self.path, self.target)
        self.notes.unlink(missing_ok=True)
        return self.target


def _advance(url: str, part: Part, size: int | None, timeout: float, report: Report) -> None:
    "Bring `part` to its end in one exchange with the server, or as far as that goes."
    version = part.version()
    have = part.size if version.validator else 0
    if have and have == version.total:
        return
    with _request(url, have, version, part, timeout) as response:
        if response.status == 206:
            version = _continued(response, have, version, part)
        else:
            have, version = 0, _version(response)
            part.begin(version)
        if size is not None and version.total not in (None, size):
            raise _mismatch(url, part, f"{version.total:,} bytes", f"{size:,} bytes")
        _append(response, part, have, version.total or size, report)


def _request(url: str, have: int, version: Version, part: Part, timeout: float) -> HTTPResponse:
    "Ask for the file from byte `have` on, and sort refusals into passing and final ones."
    headers = {"User-Agent": "image-trainer/1", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": version.validator or ""}
    with _network_errors():
        try:
            return cast(HTTPResponse, _opener().open(request.Request(url, headers=headers), timeout=timeout))
        except HTTPError as error:
            error.close()
            if error.code == 416:  # what we have is no beginning of what is there now
                part.discard()
            elif error.code < 500 and error.code not in PASSING:
                remedy = "check the address, or use --data shapes, which needs no download"
                raise UserError(f"{url} was refused with {error.code} {error.reason}; {remedy}") from error
            raise Interrupted(f"it answered {error.code} {error.reason}") from error


def _opener() -> request.OpenerDirector:
    "Open http and https only: urllib's default would follow a redirect to ftp."
    opener = request.OpenerDirector()
    for kind in ("Proxy", "HTTP", "HTTPS", "HTTPRedirect", "HTTPDefaultError", "Unknown"):
        opener.add_handler(getattr(request, f"{kind}Handler")())
    opener.add_handler(request.HTTPErrorProcessor())
    return opener


@contextmanager
def _network_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, HTTPException, UnicodeError) as error:
        reason = getattr(error, "reason", error)  # URLError wraps the error that it is about
        raise Interrupted(f"{type(reason).__name__}: {reason}") from error


def _version(response: HTTPResponse) -> Version:
    "Read which version a whole-file response brings; weak ETags don't promise equal bytes and are not used."
    tag, length = response.headers["ETag"], response.headers["Content-Length"]
    strong = tag if tag and not tag.startswith("W/") else response.headers["Last-Modified"]
    return Version(strong, int(length) if re.fullmatch(NUMBER, length or "") else None)


def _continued(response: HTTPResponse, have: int, version: Version, part: Part) -> Version:
    "Refuse a partial response that does not go on exactly where the same version broke off; else return its version."
    span = re.fullmatch(rf"bytes ({NUMBER})-{NUMBER}/({NUMBER})", response.headers["Content-Range"] or "")
    fits = span is not None and int(span[1]) == have and version.total in (None, int(span[2]))
    if span and fits and _version(response).validator in (None, version.validator):
        return Version(version.validator, int(span[2]))
    part.discard()
    raise Interrupted("what it sent does not continue what had arrived")


def _append(response: HTTPResponse, part: Part, have: int, total: int | None, report: Report) -> None:
    "Write what comes to the end of `part`, which holds `have` bytes of `total`."
    with room_for((total or have) - have, part.path.parent), open(part.path, "ab") as file:
        while total is None or have < total:
            with _network_errors():
                chunk = response.read1(CHUNK)
            if not chunk:
                break
            have += file.write(chunk)
            report(have, total or 0)
    if total is not None and have < total:
        raise Interrupted(f"it closed the connection after {have:,} of {total:,} bytes")


def _verify(url: str, part: Part, size: int | None, md5: str | None, progress: Progress) -> None:
    "Throw the whole file away if it is not the one that was asked for."
    if size not in (None, part.size):
        raise _mismatch(url, part, f"{part.size:,} bytes", f"{size:,} bytes")
    if md5 is not None:
        progress(f"checking {part.target.name}", 0, 0)
        with open(part.path, "rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != md5:
            raise _mismatch(url, part, f"MD5 {found}", f"MD5 {md5}")


def _mismatch(url: str, part: Part, found: str, expected: str) -> UserError:
    part.discard()
    remedy = "it was thrown away: try again, and if that fails too, get the file elsewhere and give --data its path"
    return UserError(f"{url} brings {found} where {expected} are expected, so {remedy}")


def _unreachable(url: str, reason: Exception, kept: int) -> str:
    again = f"; {kept:,} bytes are kept and the next run goes on from there" if kept else ""
    remedy = "check the network and try again, or use --data shapes, which needs none"
    return f"{urlsplit(url).hostname} could not be reached for {url}: {reason}{again}; {remedy}"
