"Hostile archives through the whole command; what single members may be is in tests/learner/data/test_archive.py."

import gzip
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def tar(path: Path, *members: tarfile.TarInfo, data: bytes = b"") -> None:
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            member.size = len(data) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(data))


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def zipped(path: Path, names: list[str], data: bytes = b"x") -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, data)


ESCAPES = ["/tmp/escaped.jpg", "../escaped.jpg", "a/../../escaped.jpg", "~/../../../escaped.jpg", "a\\..\\..\\e.jpg"]
LINKS = {"link": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "disk": tarfile.BLKTYPE,
         "pipe": tarfile.FIFOTYPE}  # fmt: skip
MAKERS: dict[str, Callable[[Path], Any]] = {
    **{f"tar {name}": lambda path, name=name: tar(path, member(name), data=b"x") for name in ESCAPES},
    **{f"zip {name}": lambda path, name=name: zipped(path, [name]) for name in ESCAPES},
    **{kind: lambda path, kind=kind: tar(path, member("x.jpg", LINKS[kind], "../../../x")) for kind in LINKS},
    "link, then a file through it": lambda path: tar(path, member("a", tarfile.SYMTYPE, "/tmp"), member("a/x.jpg")),
    "bomb of bytes": lambda path: zipped(path, ["x.jpg"], bytes(300 << 20)),
    "escapes in a name": lambda path: tar(path, member("\x1b]0;owned\x07/x.jpg"), data=b"x"),
    "escapes and two dots": lambda path: tar(path, member("\x1b[2J/../x.jpg"), data=b"x"),
    "no archive": lambda path: Path(path).write_bytes(b"nothing"),
    "cut": lambda path: [zipped(path, ["x.jpg"]), os.truncate(path, 40)],
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_hostile_archive_is_one_sentence_and_leaves_nothing(refused, arguments, tmp_path: Path, kind: str) -> None:
    archive = tmp_path / ("x.zip" if kind.startswith(("zip", "bomb", "cut")) else "x.tgz")
    MAKERS[kind](archive)
    refused("launch", *arguments, "--data", archive)
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    assert [path for path in kept if path != archive and "escapes in a name" not in kind] == []
    assert not Path("/tmp/escaped.jpg").exists()


COSTS = r"""
import re, sys, tempfile
from pathlib import Path
from learner.data.archive import BadArchive, extract
with tempfile.TemporaryDirectory() as folder:
    try:
        extract(Path(sys.argv[1]), Path(folder))
    except BadArchive as error:
        peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        print(int(peak[1]) / 2**10, len(list(Path(folder).iterdir())), error)
"""


def headers(path: Path) -> None:
    "Headers that hold for all members to come, more and more of them."
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for number in range(60):
            fields = {f"k{number}.{field}": "v" for field in range(1500)}
            stream.write(tarfile.TarInfo.create_pax_global_header(fields) + tarfile.TarInfo(f"{number}.jpg").tobuf())
        stream.write(bytes(1024))


def members(path: Path) -> None:
    "Tens of thousands of files of no length, which would each take a block of the disk."
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for number in range(66_000):
            stream.write(tarfile.TarInfo(f"{number}.jpg").tobuf(tarfile.USTAR_FORMAT))
        stream.write(bytes(1024))


@pytest.mark.parametrize(("make", "said"), [(headers, "bytes of global headers"), (members, "each counting as 4096")])
def test_bombs_of_members_and_headers_cost_little(tmp_path: Path, make: Callable[[Path], None], said: str) -> None:
    "Before they were bounded, a megabyte of headers took 2.2 GiB and a minute."
    make(tmp_path / "x.tgz")
    assert (tmp_path / "x.tgz").stat().st_size < 2 << 20
    line = [sys.executable, "-c", COSTS, str(tmp_path / "x.tgz")]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60)
    mebibytes, written, error = done.stdout.split(maxsplit=2)
    assert said in error and int(written) == 0 and float(mebibytes) < 150
