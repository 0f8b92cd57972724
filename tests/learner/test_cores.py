"How many processors there are to use."

import os
from pathlib import Path

import pytest

from learner import cores
from learner.cores import usable_cores

MANY = set(range(64))


@pytest.fixture
def grant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "A machine of 64 processors, whose groups are `tmp_path`; call it with the group of this process."
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: MANY)
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "OWN_CGROUP", tmp_path / "own")

    def put(own: str, **limits: str) -> None:
        (tmp_path / "own").write_text(own)
        for name, limit in limits.items():
            folder = tmp_path / name.replace("_", "/").strip("/")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "cpu.max").write_text(limit + "\n")

    return put


def test_here_it_is_what_the_kernel_lets_this_process_run_on() -> None:
    before = os.sched_getaffinity(0)
    assert 1 <= usable_cores() <= len(before)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize("limit, expected", [("max 100000", 64), ("200000 100000", 2), ("150000 100000", 2)])
def test_a_containers_share_is_not_exceeded(grant, limit: str, expected: int) -> None:
    "As a container sees itself: its group is the root."
    grant("0::/\n", _=limit)
    assert usable_cores() == expected


def test_the_least_of_all_groups_above_counts_and_one_is_always_left(grant) -> None:
    grant("1:name=systemd:/other\n0::/pods/one\n", pods="300000 100000", pods_one="max 100000")
    assert usable_cores() == 3
    grant("0::/pods/one\n", pods_one="1000 100000")
    assert usable_cores() == 1


def test_without_groups_or_with_strange_ones_there_is_no_limit(grant, tmp_path: Path) -> None:
    assert usable_cores() == len(MANY), "no file says which group this is"
    for own, limit in (("", "1"), ("4:cpu:/a\n", "1"), ("0::/gone\n", "x y z"), ("0::/\n", "100000 0")):
        grant(own, _=limit)
        assert usable_cores() == len(MANY)
