"What `--data` says becomes a whole dataset folder, made once, or an error that says what to do."

import errno
import hashlib
import io
import itertools
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from learner.data import download, shapes, sources
from learner.data.archive import BadArchive
from learner.data.sources import Known, known, made, resolve
from learner.errors import UsageError, UserError

FILES = {"set/train/cat/1.JPEG": random.Random(1).randbytes(50_000), "set/val/cat/2.JPEG": b"two"}


def tgz(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, body in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


ARCHIVE = tgz(FILES)


def holds_the_files(folder: Path) -> bool:
    found = {path.relative_to(folder.parent).as_posix(): path.read_bytes() for path in folder.rglob("*.JPEG")}
    return folder.is_absolute() and folder.name == "set" and found == FILES


def only_parts(cache: Path) -> bool:
    "Nothing in the cache could be taken for a dataset or a whole archive."
    return all(path.name.endswith((".lock", ".part", ".part.json")) for path in cache.iterdir())


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    "No waiting between attempts."
    monkeypatch.setattr(sources, "fetch", partial(download.fetch, pause=0.001, timeout=10))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "cache"


@pytest.fixture
def listed(web: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    "A dataset that is known by the name `tiny`; its page."
    tiny = Known("tiny", web.url("/tiny.tgz"), len(ARCHIVE), hashlib.md5(ARCHIVE).hexdigest(), "train|val/CLASS/*.JPEG")
    monkeypatch.setattr(sources, "known", lambda: (tiny,))
    return web.put("/tiny.tgz", ARCHIVE)


def test_the_table_is_complete() -> None:
    table = known()
    assert [dataset.name for dataset in table][:3] == ["imagenette160", "imagenette320", "imagenette"]
    assert len({dataset.name for dataset in table}) == len({dataset.url for dataset in table}) == len(table)
    for dataset in table:
        assert dataset.url == download.quoted(dataset.url)
        assert dataset.bytes > 10**6
        assert len(bytes.fromhex(dataset.md5)) == 16


def test_a_folder_is_used_where_it_lies(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pictures", "shapes", "imagenette160"):
        (tmp_path / name).mkdir()
        assert resolve(name, cache) == tmp_path / name
    assert resolve(".", cache) == tmp_path
    assert not cache.exists()


@pytest.mark.parametrize("name", ["set.tgz", "Set of.tar.GZ", "-.tgz"])
def test_a_local_archive_is_unpacked_once(tmp_path: Path, cache: Path, name: str) -> None:
    archive = tmp_path / name
    archive.write_bytes(ARCHIVE)
    folder = resolve(str(archive), cache)
    assert holds_the_files(folder)
    (folder / "mark").touch()
    assert resolve(str(archive), cache) == folder
    assert (folder / "mark").exists()
    archive.write_bytes(tgz({"set/other": b"1"}))
    assert [path.name for path in resolve(str(archive), cache).iterdir()] == ["other"]


def test_an_archive_without_one_top_folder(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.tgz").write_bytes(tgz({"train/cat/1.JPEG": b"1", "val/cat/2.JPEG": b"2"}))
    assert sorted(path.name for path in resolve(str(tmp_path / "a.tgz"), cache).iterdir()) == ["train", "val"]


def test_a_url_is_downloaded_once_through_interruptions(web: Any, cache: Path) -> None:
    page = web.put("/some/set.tgz?x=1", ARCHIVE, cuts=[1000, 20_000, 0])
    seen: list[str] = []
    folder = resolve(web.url("/some/set.tgz?x=1"), cache, lambda what, done, total: seen.append(what))
    assert holds_the_files(folder)
    assert page.sent == len(ARCHIVE)
    assert [key.split()[0] for key, _ in itertools.groupby(seen)] == ["downloading", "extracting"]
    web.stop()
    assert resolve(web.url("/some/set.tgz?x=1"), cache) == folder


def test_a_broken_archive_is_downloaded_anew(web: Any, cache: Path) -> None:
    page = web.put("/set.tgz", ARCHIVE[:-20])
    with pytest.raises(BadArchive, match="is broken"):
        resolve(web.url("/set.tgz"), cache)
    assert only_parts(cache)
    page.body = ARCHIVE
    assert holds_the_files(resolve(web.url("/set.tgz"), cache))


def test_a_malicious_archive_leaves_nothing(web: Any, cache: Path, tmp_path: Path) -> None:
    web.put("/set.tgz", tgz({"set/good": b"1", "set/../../../../evil": b"2"}))
    with pytest.raises(BadArchive, match=r"evil.*climbs out"):
        resolve(web.url("/set.tgz"), cache)
    assert only_parts(cache)
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("by_url", [False, True])
def test_a_known_name_is_checked_against_the_table(listed: Any, cache: Path, by_url: bool, web: Any) -> None:
    data = web.url("/tiny.tgz") if by_url else "tiny"
    listed.body = bytes(len(ARCHIVE))
    with pytest.raises(UserError, match=r"brings MD5 .* are expected"):
        resolve(data, cache)
    assert only_parts(cache)
    listed.body = ARCHIVE
    folder = resolve(data, cache)
    assert holds_the_files(folder)
    assert folder.parent.name.startswith("tiny-")


def test_offline_names_the_host_and_the_way_out(listed: Any, cache: Path, web: Any) -> None:
    web.stop()
    with pytest.raises(UserError, match=r"127\.0\.0\.1 could not be reached for .*tiny\.tgz.*--data shapes"):
        resolve("tiny", cache)
    assert only_parts(cache)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("imagenete160", "did you mean imagenette160"),
        ("Shapes", "did you mean shapes"),
        ("nothing-like-it", "one of shapes, imagenette160, imagenette320"),
        ("", "is no known dataset"),
        ("~/missing.zip", "does not exist"),
        ("ftp://host/a.tgz", "an address is http"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(data: str, said: str, cache: Path) -> None:
    with pytest.raises(UsageError, match=said):
        resolve(data, cache)
    assert not cache.exists()


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"1")
    with pytest.raises(UsageError, match=r"photo\.jpg is a file but no archive"):
        resolve(str(tmp_path / "photo.jpg"), cache)


def test_a_cache_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.* cannot be used .*choose another cache folder"):
        resolve("shapes", tmp_path / "file" / "cache")


def test_a_cache_without_room_is_told_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "a.png")

    monkeypatch.setattr(shapes, "generate", full)
    with pytest.raises(UserError, match=r"a.png cannot be used \(No space left on device\): make room, or choose"):
        resolve("shapes", cache)


def test_shapes_are_made_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "generate", partial(shapes.generate, train=20, valid=10))
    folder = resolve("shapes", cache)
    assert folder.name == f"shapes-v{shapes.VERSION}-seed42-5000x1000"
    assert len(list(folder.rglob("*.JPEG"))) == 30
    before = folder.stat()
    assert resolve("shapes", cache).stat() == before


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "set", build)
    assert only_parts(tmp_path)


KILLED = """import sys, time, pathlib, learner.data.sources as s
s.made(pathlib.Path(sys.argv[1]), lambda folder: (folder / "half").touch() or time.sleep(60))
"""


def test_what_a_killed_process_left_is_cleaned_up(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "set")])
    deadline = time.monotonic() + 30
    while not (tmp_path / "set.aside" / "half").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "set").exists()
    made(tmp_path / "set", lambda folder: (folder / "whole").touch())
    assert os.listdir(tmp_path / "set") == ["whole"]
    assert not (tmp_path / "set.aside").exists()


def test_processes_and_threads_that_want_the_same_share_one_download(web: Any, cache: Path) -> None:
    page = web.put("/set.tgz", ARCHIVE)
    code = "import sys, pathlib, learner.data.sources as s; print(s.resolve(sys.argv[1], pathlib.Path(sys.argv[2])))"
    command = [sys.executable, "-c", code, web.url("/set.tgz"), str(cache)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(resolve, [web.url("/set.tgz")] * 3, [cache] * 3))
    found += [Path(process.communicate(timeout=60)[0].strip()) for process in processes]
    assert found == found[:1] * 5
    assert holds_the_files(found[0])
    assert len(page.requests) == 1


def test_who_waits_says_so(tmp_path: Path) -> None:
    waiting = threading.Event()
    with sources.locked(tmp_path / "set"):
        said: list[str] = []

        def watch(what: str, done: int, total: int) -> None:
            said.append(what)
            waiting.set()

        thread = threading.Thread(target=made, args=(tmp_path / "set", lambda folder: None, watch))
        thread.start()
        assert waiting.wait(10)
    thread.join(10)
    assert said == ["waiting for the process that makes set"]
    assert (tmp_path / "set").is_dir()
