"Hostile pictures: bombs, cut files, other formats under a picture's name, pipes; each is named, and memory is bounded."

import io
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from learner.data.images import BadImage, decode, open_image


def png(width: int, height: int, *chunks: tuple[bytes, bytes], colour: int = 2, data: bytes = b"") -> bytes:
    "A PNG that claims this size, with these chunks before its data: one row, if it is not absurdly wide."
    header = struct.pack(">2I5B", width, height, 8, colour, 0, 0, 0)
    parts = [
        (b"IHDR", header),
        *chunks,
        (b"IDAT", data or zlib.compress(bytes(min(width, 10**5) * 3 + 1))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )


def jpeg(exif: bytes = b"") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(stream, "JPEG", exif=exif)
    return stream.getvalue()


SMALL = jpeg()
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/tmp/x) (w) file closefile\n%%EOF\n"
HOSTILE = {
    "empty": b"",
    "zeros": bytes(100_000),
    "text": b"no picture at all",
    "html": b"<html><script>alert(1)</script></html>",
    "cut jpeg": SMALL[: len(SMALL) // 2],
    "cut png": png(64, 64)[:-40],
    "bomb of pixels": png(60_000, 60_000),
    "largest png": png(2**31 - 1, 2**31 - 1),
    "no width": png(0, 5),
    "bomb of text": png(8, 8, (b"zTXt", b"k\0\0" + zlib.compress(bytes(100_000_000)))),
    "bomb of data": png(8, 8, data=zlib.compress(b"\7" * 50_000_000)[:-9]),
    "postscript": EPS,
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "fits": b"SIMPLE  =                    T".ljust(2880),
    "pdf": b"%PDF-1.7\n1 0 obj <<>> endobj",
    "tiff in a loop": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "gif without a frame": b"GIF89a\x10\0\x10\0\0\0\0;",
    "ppm": b"P6 99999 99999 255\n",
    "pickle": b"\x80\x04\x95\x1b\0\0\0\0\0\0\0\x8c\x05posix",
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("extension", ["jpg", "png"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_sound_picture_is_named_with_the_reason(tmp_path: Path, kind: str, extension: str) -> None:
    file = tmp_path / f"hostile.{extension}"
    file.write_bytes(HOSTILE[kind])
    for read in (lambda: decode(str(file), 16), lambda: open_image(str(file))):
        with pytest.raises(BadImage) as caught:
            read()
        assert caught.value.file == str(file) and str(caught.value).isprintable()
        assert 0 < len(caught.value.reason) < 300


def test_pictures_that_call_other_programs_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Pillow would start Ghostscript for PostScript, whatever the file is called."
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    (tmp_path / "x.jpg").write_bytes(EPS)
    with pytest.raises(BadImage, match="cannot identify image file"):
        decode(str(tmp_path / "x.jpg"), 16)


@pytest.mark.parametrize("kind", ["pipe", "endless", "folder", "nowhere", "loop"])
def test_what_is_no_file_is_named_without_waiting(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "x.jpg"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to({"endless": "/dev/zero", "nowhere": "/no/such/file", "loop": str(place)}[kind])
    with pytest.raises(BadImage, match=r"x\.jpg is no readable image: "):
        decode(str(place), 16)


@pytest.mark.parametrize(
    "exif",
    [b"Exif\0\0" + b"\xff" * 60_000, b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\3\0\xff\xff\xff\xff" * 900,
     b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0", b"Exif\0\0", b"\0" * 65_000],
    ids=["noise", "many entries", "turned", "none", "zeros"],
)  # fmt: skip
def test_whatever_a_camera_noted_the_picture_is_read(tmp_path: Path, exif: bytes) -> None:
    (tmp_path / "x.jpg").write_bytes(jpeg(exif))
    assert np.array_equal(decode(str(tmp_path / "x.jpg"), 8), decode_plain(tmp_path))


def decode_plain(folder: Path) -> np.ndarray:
    (folder / "plain.jpg").write_bytes(SMALL)
    return decode(str(folder / "plain.jpg"), 8)


@pytest.mark.parametrize(("name", "kind"), [("x.png", "JPEG"), ("x.jpg", "PNG"), ("x.jpg", "GIF"), ("x.bmp", "WEBP")])
def test_a_picture_under_another_formats_name_is_read(tmp_path: Path, name: str, kind: str) -> None:
    Image.fromarray(np.full((9, 9, 3), 90, np.uint8)).save(tmp_path / name, kind)
    assert decode(str(tmp_path / name), 4).shape == (4, 4, 3)


LARGEST = r"""
import re, sys
from learner.data.images import decode
def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 2**20
before = peak()
decode(sys.argv[1], 64)
print(peak() - before)
"""


def test_the_largest_picture_that_is_taken_takes_bounded_memory(tmp_path: Path) -> None:
    "A file of kilobytes with as many pixels as Pillow allows, and transparent, which costs most."
    side = int(Image.MAX_IMAGE_PIXELS**0.5)  # type: ignore[operator]
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(bytes(4 * side + 1)) for _ in range(side)) + packer.flush()
    (tmp_path / "x.png").write_bytes(png(side, side, colour=6, data=data))
    line = [sys.executable, "-c", LARGEST, str(tmp_path / "x.png")]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert 0.3 < float(done.stdout) < 2.0, "GiB"


def test_a_folder_of_them_trains_on_the_others_and_lists_each(
    command, arguments, pictures: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "copy"))
    for number, content in enumerate(HOSTILE.values()):
        (folder / "train" / "ant" / f"hostile{number}.jpg").write_bytes(content)
    os.mkfifo(folder / "train" / "ant" / "pipe.jpg")
    ended = command("launch", *arguments, "--data", folder, "--bad-images", "skip")
    assert (ended.code, ended.err) == (0, "")
    assert f"{len(HOSTILE) + 1} unreadable images were skipped" in ended.out
    table = (tmp_path / "runs" / "copy-simple_cnn_bn" / "version_0" / "bad_images.csv").read_text()
    assert table.count("hostile") == len(HOSTILE) and "pipe.jpg,it is no regular file" in table


@pytest.mark.parametrize(
    "name", ["a\x1b[2Jb.jpg", "a\nb.jpg", "a\rb.jpg", "a\u202egpj.png", "a\x7f.jpg", "a\x9b1m.png"]
)
def test_names_that_could_drive_a_terminal_are_refused(
    refused, arguments, pictures: Path, tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "copy"))
    shutil.copy(next(folder.rglob("*.JPEG")), folder / "train" / "ant" / name)
    refused("launch", *arguments, "--data", folder, parts=("has control characters", "rename it"))


def test_a_name_that_is_no_unicode_is_fine(command, arguments, pictures: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "copy"))
    with open(os.fsencode(folder / "train" / "ant") + b"/\xff\xe9.jpg", "wb") as file:
        file.write(SMALL)
    ended = command("launch", *arguments, "--data", folder)
    assert (ended.code, ended.err) == (0, "")
