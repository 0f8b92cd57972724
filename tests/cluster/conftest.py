"What the tests of the cluster share: a run driven by hand, and a look at which ports processes listen on."

import ipaddress
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from cluster.gang import Gang
from cluster.messages import Chunk, Job
from cluster.shards import n_batches
from learner.metrics import Sums
from orchestrator.tally import Tally

LISTENING = "0A"  # the state's name in /proc/net/tcp


@dataclass(frozen=True)
class Outcome:
    "What a run came to: each step's global loss and count, the validation's sums, what all ranks hold at the end."

    losses: list[float]
    counts: list[float]
    trained: Sums
    valid: Sums
    bad: list[tuple[str, str]]
    states: list[dict[str, np.ndarray]]
    prints: list[str]
    activations: dict[tuple[int, str], np.ndarray]

    @property
    def layers(self) -> set[str]:
        "Those whose activations were recorded."
        return {layer for _, layer in self.activations}


Drive = Callable[..., Outcome]


def sums_of(tally: Tally) -> Sums:
    "What a pass added up to, each sum with its count."
    return {name: (total, tally.totals["count"]) for name, total in tally.totals.items() if name != "count"}


def rate(step: int, peak: float = 0.1) -> float:
    "Another learning rate for each step, so that one that came late or twice would show."
    return peak / (1 + step % 5)


def chunks(job: Job, train: bool, epoch: int, length: int, **hypers: float) -> Iterator[Chunk]:
    "An epoch of the training or validation set in chunks of `length` batches."
    per_epoch = n_batches(len(job.train), job.batch_size)
    n = per_epoch if train else n_batches(len(job.valid), job.batch_size)
    for first in range(0, n, length):
        step = epoch * per_epoch + first
        each = ({**hypers, "lr": rate(step + i, hypers.get("lr", 0.1))} for i in range(min(length, n - first)))
        yield Chunk(train, epoch, first, step, tuple(one if train else {} for one in each))


@pytest.fixture
def drive() -> Drive:
    """A function that trains and validates: `drive(gang, job, epochs=2, length=3, lr=0.1, body_lr=0.01)`.

    `length` is that of chunks, `lr` the highest rate; what else is named goes with every training step.
    """

    def run(gang: Gang, job: Job, epochs: int = 2, length: int = 3, **hypers: float) -> Outcome:
        tallies = {True: Tally(), False: Tally()}
        losses, counts = [], []
        activations: dict[tuple[int, str], np.ndarray] = {}
        for epoch in range(epochs):
            for train in (True, False):
                for reports in gang.stream(chunks(job, train, epoch, length, **hypers)):
                    assert [report.rank for report in reports] == list(range(gang.world_size))
                    assert all(report.batches == reports[0].batches for report in reports), "what all know"
                    tallies[train].add(reports)
                    for step, layers in (item for report in reports for item in report.activations.items()):
                        for layer, found in layers.items():
                            activations[step, layer] = activations.get((step, layer), 0) + found
                    if train:
                        losses += reports[0].losses
                        counts += reports[0].counts
        sums = {train: sums_of(tally) for train, tally in tallies.items()}
        bad = [image for tally in tallies.values() for image in tally.bad_images]
        states, prints = gang.call("state"), gang.call("fingerprint")
        return Outcome(losses, counts, sums[True], sums[False], bad, states, prints, activations)

    return run


Listening = Callable[[Iterable[int]], set[str]]


@pytest.fixture
def listening() -> Listening:
    "A function of process numbers: the addresses on which these processes accept connections."

    def look(pids: Iterable[int]) -> set[str]:
        table = dict(_listeners())
        return {table[inode] for pid in pids for inode in _sockets(pid) if inode in table}

    return look


def _listeners() -> Iterator[tuple[str, str]]:
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING:
                words = bytes.fromhex(fields[1].split(":")[0])
                packed = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                address = ipaddress.ip_address(packed)
                yield fields[9], str(getattr(address, "ipv4_mapped", None) or address)


def _sockets(pid: int) -> set[str]:
    found = set()
    for fd in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(fd))
        except OSError:
            continue  # closed while we looked
        found |= {match[1]} if match else set()
    return found
