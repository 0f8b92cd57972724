"Tally: the reports of all ranks, merged into the numbers of an epoch."

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import compress
from statistics import median
from typing import Any, Self

import numpy as np

from cluster.messages import Report
from learner.metrics import means


def layer_sums(reports: Sequence[Report]) -> dict[int, dict[str, np.ndarray]]:
    "By step and layer, the sums of what all ranks' parts of the global batch came to there (see ActivationStats)."
    merged: dict[int, dict[str, np.ndarray]] = {}
    for step, layers in ((step, layers) for report in reports for step, layers in report.activations.items()):
        into = merged.setdefault(step, {})
        for name, sums in layers.items():
            into[name] = into[name] + sums if name in into else sums
    return merged


def spoiled_steps(reports: Sequence[Report]) -> list[int]:
    "The steps of a chunk whose loss is no finite number, those without samples apart."
    first, known = reports[0].chunk.step, zip(reports[0].batches["loss"], reports[0].counts)
    return [first + number for number, (loss, count) in enumerate(known) if count and not math.isfinite(loss)]


class Tally:
    "What all ranks did in one pass over the training or validation set."

    def __init__(self) -> None:
        self.totals: dict[str, float] = defaultdict(float)
        self.bad_images: list[tuple[str, str]] = []
        self.samples: dict[int, int] = defaultdict(int)
        self.seconds: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.spoiled = 0  # samples in steps that were skipped, since their loss is no number
        self.started = time.perf_counter()
        self.elapsed = 0.0

    def add(self, reports: Sequence[Report]) -> None:
        "Take a chunk's reports, one of each rank that is there."
        # batch by batch, so that no sum depends, in its last digits, on how batches came in chunks
        batches, train = reports[0].batches, reports[0].chunk.train
        sound = [math.isfinite(loss) or not train for loss in batches.get("loss", [])]
        for name, column in batches.items():
            self.totals[name] = sum(compress(column, sound), self.totals[name])
        self.spoiled += round(sum(n for n, fine in zip(batches.get("count", []), sound) if not fine))
        for report in reports:
            self.bad_images += report.bad_images
            self.samples[report.rank] += report.own
            for part, seconds in report.seconds.items():
                self.seconds[report.rank][part] += seconds
        self.elapsed = time.perf_counter() - self.started

    @property
    def count(self) -> int:
        "Samples seen by all ranks."
        return round(self.totals["count"])

    @property
    def seen(self) -> int:
        "Samples that all ranks have gone through, those of steps that were skipped and unreadable ones too."
        return self.count + self.spoiled + len(self.bad_images)

    def as_json(self) -> dict[str, Any]:
        "For a checkpoint: a copy, which does not change while it is written and more reports come."
        ranks = {"samples": {**self.samples}, "seconds": {rank: {**parts} for rank, parts in self.seconds.items()}}
        return {
            "totals": {**self.totals},
            "bad_images": [*self.bad_images],
            "elapsed": self.elapsed,
            "spoiled": self.spoiled,
            **ranks,
        }

    @classmethod
    def of_json(cls, saved: Mapping[str, Any]) -> Tally:
        "What `as_json` wrote; the clock stands until `go_on`."
        tally = cls()
        tally.totals.update({str(name): float(total) for name, total in saved["totals"].items()})
        tally.bad_images = [(str(file), str(reason)) for file, reason in saved["bad_images"]]
        tally.samples.update({int(rank): int(n) for rank, n in saved["samples"].items()})
        for rank, parts in saved["seconds"].items():
            tally.seconds[int(rank)].update({part: float(seconds) for part, seconds in parts.items()})
        tally.elapsed, tally.spoiled = float(saved["elapsed"]), int(saved["spoiled"])
        return tally

    def go_on(self) -> Self:
        "Let the clock run from here on, behind what was counted before a pause."
        self.started = time.perf_counter() - self.elapsed
        return self

    def means(self) -> dict[str, float]:
        "Loss and metrics per sample."
        sums = {name: (total, self.totals["count"]) for name, total in self.totals.items() if name != "count"}
        return means(sums)

    def images_per_second(self) -> float:
        "Of all ranks, by the driver's clock."
        return self.count / self.elapsed if self.elapsed else 0.0

    def worker_speed(self) -> dict[int, float]:
        "Images per second of each rank while it did not wait for others, nor for code to be compiled."
        busy = {rank: s["total"] - s["communication"] - s["compiling"] for rank, s in self.seconds.items()}
        return {rank: self.samples[rank] / seconds if seconds > 0 else 0.0 for rank, seconds in busy.items()}

    def slow(self, factor: float = 3.0, seconds: float = 1.0) -> dict[int, float]:
        """The ranks that work so much more slowly than the median of the others, and how many times as slowly.

        If it cost that many seconds at least: a moment's delay says nothing.
        """
        speeds, found = self.worker_speed(), dict[int, float]()
        for rank, speed in speeds.items():
            usual = median([other for number, other in speeds.items() if number != rank] or [0.0])
            if 0 < factor * speed < usual and self.samples[rank] * (1 / speed - 1 / usual) >= seconds:
                found[rank] = usual / speed
        return found

    def longest(self, part: str) -> float:
        "The seconds of the rank that spent the most on `part`."
        return max((spent[part] for spent in self.seconds.values()), default=0.0)

    def waiting(self, part: str) -> float:
        "The fraction of the workers' time that went into waiting for `part`: data or communication."
        total = sum(spent["total"] for spent in self.seconds.values())
        return sum(spent[part] for spent in self.seconds.values()) / total if total else 0.0
