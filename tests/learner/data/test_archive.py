"Honest archives come out byte for byte; hostile and broken ones are refused whole, and nothing leaves the folder."

import gzip
import io
import os
import random
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.data.archive import BadArchive, Limits, extract, safe_path
from learner.errors import UserError

FILES = {"set/train/cat/1.JPEG": random.Random(1).randbytes(5000), "set/2": b"", "set/val/ä b": b"x" * 2_500_000}
ENDINGS = (".tgz", ".tar", ".zip")


def tar_bytes(entries: dict[str, bytes], *more: tarfile.TarInfo, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, body in entries.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(body), 0o4777
            archive.addfile(info, io.BytesIO(body))
        for info in more:
            archive.addfile(info)
    return buffer.getvalue()


def zip_bytes(entries: dict[str, bytes], attributes: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in entries.items():
            info = zipfile.ZipInfo("x")
            info.filename, info.external_attr = name, attributes << 16
            archive.writestr(info, body, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def pack(ending: str, entries: dict[str, bytes]) -> bytes:
    return zip_bytes(entries) if ending == ".zip" else tar_bytes(entries, mode="w:gz" if ending == ".tgz" else "w")


def unpacked(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def unpack(tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    "Unpack bytes into outer/inner, check that nothing came to lie beside inner, return what lies in it."

    def run(body: bytes, **options: object) -> dict[str, bytes]:
        (tmp_path / "some.archive").write_bytes(body)
        inner = tmp_path / "outer" / "inner"
        inner.mkdir(parents=True)
        try:
            extract(tmp_path / "some.archive", inner, **options)  # type: ignore[arg-type]
        finally:
            assert list(inner.parent.iterdir()) == [inner]
            assert sorted(path.name for path in tmp_path.iterdir()) == ["outer", "some.archive"]
            assert not any(path.is_symlink() for path in inner.rglob("*"))
        return unpacked(inner)

    return run


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_was_packed_comes_out(unpack: Callable, ending: str) -> None:
    seen: list[tuple[str, int, int]] = []
    assert unpack(pack(ending, FILES), progress=lambda *step: seen.append(step)) == FILES
    total = sum(map(len, FILES.values()))
    assert seen[-1] == ("extracting some.archive", total, total)


def test_rights_of_the_archive_are_not_taken_over(unpack: Callable, tmp_path: Path) -> None:
    unpack(tar_bytes({"a": b"1"}))
    assert not (tmp_path / "outer/inner/a").stat().st_mode & (stat.S_ISUID | stat.S_IXUSR)


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_macos_adds_and_dots_in_names_are_dropped(unpack: Callable, ending: str) -> None:
    junk = dict.fromkeys(("__MACOSX/set/._a.JPEG", "set/._a.JPEG", "set/.DS_Store"), b"junk")
    found = unpack(pack(ending, {"./set/a.JPEG": b"a", "set//sub/./b": b"b", **junk}))
    assert found == {"set/a.JPEG": b"a", "set/sub/b": b"b"}


BAD_NAMES = ("../out", "a/../../out", "a/..", "/out", "//out", "a\\..\\..\\out", "n" * 256, "a/" * 1500)


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_name_that_leads_out_is_refused_and_named(unpack: Callable, ending: str, name: str) -> None:
    with pytest.raises(BadArchive) as caught:
        unpack(pack(ending, {"good.JPEG": b"good", name: b"bad"}))
    assert repr(name[:60])[:-1] in str(caught.value)
    assert "some.archive is refused" in str(caught.value)
    assert "unpack it yourself" in str(caught.value)


@given(st.text(max_size=40) | st.lists(st.sampled_from(["..", ".", "", "a", "b\\c", "~", "C:", "\0"])).map("/".join))
def test_any_name_stays_inside_or_is_refused(name: str) -> None:
    root = Path("/some/folder")
    with suppress(BadArchive):
        path = root / safe_path(name)
        assert path == Path(os.path.normpath(path))
        assert root in (path, *path.parents)


@given(st.lists(st.lists(st.sampled_from(["..", "a", "b", "."]), min_size=1, max_size=4).map("/".join), max_size=4))
def test_any_set_of_names_stays_inside_or_is_refused(names: list[str]) -> None:
    with TemporaryDirectory() as top:
        folder = Path(top, "outer", "inner")
        folder.mkdir(parents=True)
        bodies = {name: str(number).encode() for number, name in enumerate(names)}
        Path(top, "a.tar").write_bytes(tar_bytes(bodies))
        try:
            extract(Path(top, "a.tar"), folder)
            assert sorted(unpacked(folder).values()) == sorted(bodies.values())
        except BadArchive:
            assert not list(folder.iterdir())
        assert list(folder.parent.iterdir()) == [folder]


KINDS = {
    "link": (tarfile.SYMTYPE, tarfile.LNKTYPE),
    "special file": (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE),
}


@pytest.mark.parametrize(("kind", "type"), [(kind, type) for kind, types in KINDS.items() for type in types])
def test_links_and_devices_in_tars_are_refused(unpack: Callable, kind: str, type: bytes) -> None:
    info = tarfile.TarInfo("set/evil")
    info.type, info.linkname = type, "good"
    with pytest.raises(BadArchive, match=f"'set/evil' is a {kind}; only files and folders"):
        unpack(tar_bytes({"good": b"1"}, info))


@pytest.mark.parametrize(("type", "kind"), [(stat.S_IFLNK, "link"), (stat.S_IFCHR, "special file")])
def test_links_and_devices_in_zips_are_refused(unpack: Callable, type: int, kind: str) -> None:
    with pytest.raises(BadArchive, match=f"'evil' is a {kind}"):
        unpack(zip_bytes({"evil": b"/etc/passwd"}, type | 0o777))


@pytest.mark.parametrize("ending", [".tgz", ".tar"])
@pytest.mark.parametrize("names", [("a", "./a"), ("a/b", "a"), ("a", "a/b"), (".", "b")])
def test_members_in_each_others_place_are_refused(unpack: Callable, ending: str, names: tuple[str, str]) -> None:
    with pytest.raises(BadArchive, match=r"overwrite|both a file and a folder"):
        unpack(pack(ending, dict.fromkeys(names, b"1")))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_same_name_twice_in_a_zip_is_refused(unpack: Callable) -> None:
    with pytest.raises(BadArchive, match="'bb' would overwrite"):
        unpack(zip_bytes({"aa": b"1", "bb": b"2"}).replace(b"aa", b"bb"))


@pytest.mark.parametrize("ending", [".tgz", ".zip"])
def test_bombs_are_refused_before_anything_is_written(unpack: Callable, ending: str, tmp_path: Path) -> None:
    bomb = pack(ending, {"fine": b"1", "bomb": bytes(3_000_000)})
    with pytest.raises(BadArchive, match=r"'bomb' claims .* longer than 1000000 bytes"):
        unpack(bomb, limits=Limits(ratio=10, ratio_free=1_000_000))
    assert not list((tmp_path / "outer/inner").iterdir())


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("limits", [{"members": 1}, {"bytes": 5000}], ids=str)
def test_absolute_limits(unpack: Callable, ending: str, limits: dict[str, int]) -> None:
    with pytest.raises(BadArchive, match=r"'b'.* (beyond the 1 members|longer than 5000 bytes)"):
        unpack(pack(ending, {"a": b"12345", "b": b"123456"}), limits=Limits(**limits))


def test_a_zip_that_lies_about_a_size_is_refused(unpack: Callable) -> None:
    body = zip_bytes({"a": b"x" * 70_000})
    assert body.count(struct.pack("<L", 70_000)) == 2
    assert attempt(body) == {"a": b"x" * 70_000}
    for lie in (10, 100_000):
        assert attempt(body.replace(struct.pack("<L", 70_000), struct.pack("<L", lie))) is None


@pytest.mark.parametrize("type", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
@pytest.mark.parametrize("size", [1 << 32, -512, -1024])
def test_a_tar_header_with_an_absurd_length_is_refused(unpack: Callable, type: bytes, size: int) -> None:
    "Believed, these fill the memory or go around in circles. Newer Pythons refuse a negative one before we see it."
    info = tarfile.TarInfo("header")
    info.type, info.size = type, size
    with pytest.raises(BadArchive, match=f"{size} bytes long|invalid offset"):
        unpack(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20)))


def test_endless_padding_is_refused(unpack: Callable) -> None:
    with pytest.raises(BadArchive, match="follow its end"):
        unpack(gzip.compress(tar_bytes({"a": b"1"}) + bytes(20 << 20)))


@given(st.just(bytes(2048)) | st.binary(max_size=1500), st.sampled_from([b"PK\3\4", b"\x1f\x8b\x08\0", b"", b"<html>"]))
def test_what_is_no_archive_is_refused(noise: bytes, start: bytes) -> None:
    assert attempt(start + noise) is None


SMALL = {"set/a.JPEG": random.Random(3).randbytes(700), "set/b.JPEG": b"b" * 600}


@pytest.mark.parametrize("ending", ENDINGS)
@given(data=st.data())
def test_a_truncated_archive_is_never_taken_for_whole(ending: str, data: st.DataObject) -> None:
    body = pack(ending, SMALL)
    whole = {".tar": 4 * 512 + 2 * 512 + 512}.get(ending, len(body))  # what a tar needs ends with the first zero block
    assert attempt(body[: data.draw(st.integers(0, whole - 1))]) is None


@pytest.mark.parametrize("ending", [".tgz", ".zip"])  # a .tar has checksums for its headers only
@given(data=st.data())
def test_a_damaged_archive_is_refused_or_gives_the_true_bytes(ending: str, data: st.DataObject) -> None:
    body = bytearray(pack(ending, SMALL))
    body[data.draw(st.integers(0, len(body) - 1))] ^= data.draw(st.integers(1, 255))
    found = attempt(bytes(body))
    assert found is None or sorted(found.values()) == sorted(SMALL.values())


def attempt(body: bytes) -> dict[str, bytes] | None:
    "What comes out of an archive; None if it is refused, and any other error fails the test."
    with TemporaryDirectory() as top:
        folder = Path(top, "inner")
        folder.mkdir()
        Path(top, "a").write_bytes(body)
        try:
            extract(Path(top, "a"), folder)
        except BadArchive:
            return None
        return unpacked(folder)


def test_no_room_names_the_folder_and_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes({"a": b"12345"}))
    (tmp_path / "inner").mkdir()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3))
    with pytest.raises(UserError, match="inner has no room: 5 bytes are needed, 3 are free"):
        extract(tmp_path / "a.tar", tmp_path / "inner")
