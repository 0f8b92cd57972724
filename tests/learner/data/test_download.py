"A download ends with the very bytes of one version of the remote file, or with an error and no file."

import errno
import hashlib
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from learner.data.download import fetch, quoted, room_for
from learner.errors import UsageError, UserError

BODY = random.Random(1).randbytes(300_000)
OTHER = random.Random(2).randbytes(300_000)
get = partial(fetch, pause=0.001, timeout=5)


def md5(body: bytes) -> str:
    return hashlib.md5(body).hexdigest()


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_downloads_checks_and_leaves_only_the_file(web: Any, tmp_path: Path) -> None:
    web.put("/a.tgz", BODY)
    seen: list[tuple[str, int, int]] = []
    path = get(web.url("/a.tgz"), tmp_path / "a.tgz", size=len(BODY), md5=md5(BODY), progress=lambda *p: seen.append(p))
    assert path.read_bytes() == BODY
    assert files_in(tmp_path) == ["a.tgz"]
    assert ("downloading a.tgz", len(BODY), len(BODY)) in seen


def test_a_file_that_is_there_is_not_asked_for(web: Any, tmp_path: Path) -> None:
    page = web.put("/a", BODY)
    for _ in range(2):
        get(web.url("/a"), tmp_path / "a", size=len(BODY))
    assert len(page.requests) == 1
    (tmp_path / "a").write_bytes(b"cut by hand")
    assert get(web.url("/a"), tmp_path / "a", size=len(BODY)).read_bytes() == BODY


def test_resumes_after_each_cut_and_sends_no_byte_twice(web: Any, tmp_path: Path) -> None:
    page = web.put("/a", BODY, cuts=[1000, 0, 0, 70_000, 5, 0])
    assert get(web.url("/a"), tmp_path / "a", md5=md5(BODY)).read_bytes() == BODY
    assert page.sent == len(BODY)
    assert [r.get("Range") for r in page.requests] == [
        None, "bytes=1000-", "bytes=1000-", "bytes=1000-", "bytes=71000-", "bytes=71005-", "bytes=71005-"
    ]  # fmt: skip
    assert {r.get("If-Range") for r in page.requests[1:]} == {'"one"'}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 9000), max_size=8), ranges=st.booleans(), change_after=st.integers(0, 8))
def test_whatever_happens_the_file_is_one_whole_version(
    web: Any, cuts: list[int], ranges: bool, change_after: int
) -> None:
    one, two = BODY[:9000], OTHER[:9000]
    page = web.put("/a", one, cuts=list(cuts), ranges=ranges)
    with TemporaryDirectory() as folder:
        for _ in range(len(cuts) + 1):
            if len(page.requests) >= change_after:
                page.body, page.headers = two, {"ETag": '"two"'}
            try:
                assert get(web.url("/a"), Path(folder, "a"), attempts=1).read_bytes() in (one, two)
                break
            except UserError:
                assert not Path(folder, "a").exists()
        else:
            pytest.fail("it never ended, though each connection was cut at most once")


def test_a_later_run_goes_on_where_an_earlier_gave_up(web: Any, tmp_path: Path) -> None:
    page = web.put("/a", BODY, cuts=[1000, 0, 0])
    with pytest.raises(UserError, match=r"127\.0\.0\.1 .*1,000 bytes are kept.*--data shapes"):
        get(web.url("/a"), tmp_path / "a", attempts=2)
    assert files_in(tmp_path) == ["a.part", "a.part.json"]
    assert get(web.url("/a"), tmp_path / "a").read_bytes() == BODY
    assert page.sent == len(BODY)
    assert files_in(tmp_path) == ["a"]


def test_a_killed_process_left_what_had_arrived(web: Any, tmp_path: Path) -> None:
    page = web.put("/a", BODY, cuts=[200_000], hangs=True)
    code = "import sys, pathlib, learner.data.download as d; d.fetch(sys.argv[1], pathlib.Path(sys.argv[2]))"
    process = subprocess.Popen([sys.executable, "-c", code, web.url("/a"), str(tmp_path / "a")])
    try:
        wait_until(lambda: (tmp_path / "a.part").exists() and (tmp_path / "a.part").stat().st_size > 100_000)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    page.hangs = False
    assert not (tmp_path / "a").exists()
    assert get(web.url("/a"), tmp_path / "a").read_bytes() == BODY
    assert page.requests[-1]["Range"] >= "bytes=1"


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("checks_version", [True, False], ids=["If-Range", "no If-Range"])
@pytest.mark.parametrize("header", ["ETag", "Last-Modified"])
def test_a_changed_file_is_never_spliced(web: Any, tmp_path: Path, header: str, checks_version: bool) -> None:
    dates = ["Mon, 06 May 2024 00:00:00 GMT", "Tue, 07 May 2024 00:00:00 GMT"]
    page = web.put("/a", BODY, cuts=[150_000, 0], headers={header: dates[0]}, checks_version=checks_version)
    with pytest.raises(UserError):
        get(web.url("/a"), tmp_path / "a", attempts=1)
    page.body, page.headers = OTHER, {header: dates[1]}
    assert get(web.url("/a"), tmp_path / "a").read_bytes() == OTHER


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"weak"'}], ids=["none", "weak"])
def test_without_proof_of_the_version_it_starts_over(web: Any, tmp_path: Path, headers: dict[str, str]) -> None:
    page = web.put("/a", BODY, cuts=[1000, 2000], headers=headers)
    assert get(web.url("/a"), tmp_path / "a").read_bytes() == BODY
    assert [request.get("Range") for request in page.requests] == [None] * 3


@pytest.mark.parametrize("length", ["\xb2", "9" * 5000, "-1", "0x10", "1e3", "\xb2" * 60_000])
def test_a_length_that_is_none_is_not_believed(web: Any, tmp_path: Path, length: str) -> None:
    web.put("/a", BODY, sized=False, headers={"Content-Length": length})
    assert get(web.url("/a"), tmp_path / "a", md5=md5(BODY)).read_bytes() == BODY


def test_a_server_without_ranges_sends_all_again(web: Any, tmp_path: Path) -> None:
    page = web.put("/a", BODY, cuts=[1000, 2000], ranges=False)
    assert get(web.url("/a"), tmp_path / "a", md5=md5(BODY)).read_bytes() == BODY
    assert page.sent == 3000 + len(BODY)


def test_a_part_longer_than_the_file_is_dropped(web: Any, tmp_path: Path) -> None:
    page = web.put("/a", BODY, cuts=[100_000, 0])
    with pytest.raises(UserError):
        get(web.url("/a"), tmp_path / "a", attempts=1)
    page.body = BODY[:50_000]  # with the old ETag, so that the server answers 416
    assert get(web.url("/a"), tmp_path / "a").read_bytes() == BODY[:50_000]


@pytest.mark.parametrize("note", ["", "{", "[]", '{"version": 1}', '"text"'])
def test_a_torn_note_costs_only_what_had_arrived(web: Any, tmp_path: Path, note: str) -> None:
    web.put("/a", BODY)
    (tmp_path / "a.part").write_bytes(OTHER[:1000])
    (tmp_path / "a.part.json").write_text(note)
    assert get(web.url("/a"), tmp_path / "a").read_bytes() == BODY


def test_a_whole_part_is_not_asked_for_again(web: Any, tmp_path: Path) -> None:
    page = web.put("/a", BODY)
    (tmp_path / "a.part").write_bytes(BODY)
    (tmp_path / "a.part.json").write_text(json.dumps({"validator": '"one"', "total": len(BODY)}))
    assert get(web.url("/a"), tmp_path / "a", md5=md5(BODY)).read_bytes() == BODY
    assert not page.requests


@pytest.mark.parametrize("expected", [{"size": 5}, {"size": 10**6}, {"md5": md5(OTHER)}], ids=str)
def test_another_file_than_expected_is_thrown_away(web: Any, tmp_path: Path, expected: dict[str, Any]) -> None:
    page = web.put("/a", BODY)
    said = rf"brings (MD5 {md5(BODY)}|300,000 bytes) where .* are expected.*thrown away.*--data its path"
    with pytest.raises(UserError, match=said):
        get(web.url("/a"), tmp_path / "a", **expected)
    assert files_in(tmp_path) == []
    assert len(page.requests) == 1


def test_a_body_that_ends_early_without_a_length_is_caught_by_the_size(web: Any, tmp_path: Path) -> None:
    web.put("/a", BODY, sized=False, cuts=[1000])
    assert get(web.url("/a"), tmp_path / "a", size=len(BODY)).read_bytes() == BODY
    with pytest.raises(UserError, match="where 5 bytes are expected"):
        get(web.url("/a"), tmp_path / "b", size=5)


def test_a_chunked_body_that_is_cut_is_not_taken_for_whole(web: Any, tmp_path: Path) -> None:
    web.put("/a", BODY, sized=False, chunked=True, ranges=False, cuts=[1000, 2000])
    assert get(web.url("/a"), tmp_path / "a").read_bytes() == BODY


def test_final_refusals_are_not_tried_again(web: Any, tmp_path: Path) -> None:
    page = web.put("/a", BODY, statuses=[403])
    with pytest.raises(UserError, match="403 Forbidden; check the address"):
        get(web.url("/a"), tmp_path / "a")
    assert len(page.requests) == 1
    with pytest.raises(UserError, match="404"):
        get(web.url("/missing"), tmp_path / "a")


def test_passing_refusals_are(web: Any, tmp_path: Path) -> None:
    web.put("/a", BODY, statuses=[503, 429, 500])
    assert get(web.url("/a"), tmp_path / "a").read_bytes() == BODY


def test_redirects_are_followed_but_not_off_the_web(web: Any, tmp_path: Path) -> None:
    web.put("/a", BODY)
    web.put("/moved", b"", statuses=[302], headers={"Location": web.url("/a"), "Content-Length": "0"})
    assert get(web.url("/moved"), tmp_path / "a").read_bytes() == BODY
    for place in ("file:///etc/passwd", "ftp://127.0.0.1/a"):
        web.put("/out", b"", statuses=[302] * 4, headers={"Location": place, "Content-Length": "0"})
        with pytest.raises(UserError):
            get(web.url("/out"), tmp_path / "b")


def test_offline_says_what_could_not_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match=r"^127\.0\.0\.1 could not be reached .*refused.*--data shapes"):
            get(f"http://127.0.0.1:{closed.getsockname()[1]}/a", tmp_path / "a")
    with pytest.raises(UserError, match="could not be reached"):
        get(f"http://{'a' * 70}.invalid/a", tmp_path / "a", attempts=1)
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=socket.gaierror(-2, "Name or service not known")))
    with pytest.raises(UserError, match=r"^some\.host could not be reached .*Name or service not known"):
        get("https://some.host/a", tmp_path / "a", attempts=1)


def test_a_silent_server_is_given_up(web: Any, tmp_path: Path) -> None:
    web.put("/a", BODY, cuts=[10, 0, 0], hangs=True)
    with pytest.raises(UserError, match=r"timed out.*10 bytes are kept"):
        get(web.url("/a"), tmp_path / "a", timeout=0.1, attempts=2)


NO_URLS = ("ftp://host/a", "file:///etc", "http://", "https:///a", "http://h:x/a", "a", "http://[::1/a", "http://h:0/")


@pytest.mark.parametrize("url", NO_URLS)
def test_only_addresses_of_the_web_are_taken(url: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="an address is http"):
        get(url, tmp_path / "a")


def test_spaces_are_escaped_and_escapes_are_left() -> None:
    assert quoted("http://h/a b%20c?d=1&e=[2]") == "http://h/a%20b%20c?d=1&e=[2]"


def test_a_full_disk_is_foreseen_or_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no room: 9,000,000,000,000,000 bytes are needed"):
        room_for(9 * 10**15, tmp_path).__enter__()
    with pytest.raises(UserError, match=rf"{tmp_path} has no room: 5 bytes are needed"), room_for(5, tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), room_for(5, tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")
