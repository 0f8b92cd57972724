"Tally: the reports of all ranks, merged into the numbers of an epoch."

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cluster.worker import Report
from learner.metrics import Sums, means, merge


def step_losses(reports: Sequence[Report]) -> list[float]:
    "The global batches' mean losses in a chunk, from all ranks' sums and counts; NaN for a batch without samples."
    totals = zip(*(report.losses for report in reports))
    counts = zip(*(report.counts for report in reports))
    return [sum(total) / sum(n) if sum(n) else float("nan") for total, n in zip(totals, counts)]


def layer_sums(reports: Sequence[Report]) -> dict[int, dict[str, np.ndarray]]:
    "By step and layer, the sums of what all ranks' parts of the global batch came to there (see ActivationStats)."
    merged: dict[int, dict[str, np.ndarray]] = {}
    for step, layers in ((step, layers) for report in reports for step, layers in report.activations.items()):
        into = merged.setdefault(step, {})
        for name, sums in layers.items():
            into[name] = into[name] + sums if name in into else sums
    return merged


class Tally:
    "What all ranks did in one pass over the training or validation set."

    def __init__(self) -> None:
        self.sums: Sums = {}
        self.bad_images: list[tuple[str, str]] = []
        self.samples: dict[int, int] = defaultdict(int)
        self.seconds: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.started = time.perf_counter()
        self.elapsed = 0.0

    def add(self, reports: Sequence[Report]) -> None:
        "Take one chunk's reports, one of each rank."
        before = self.sums.get("loss", (0.0, 0.0))[0]
        merged = merge([report.sums for report in reports])
        self.sums = merge([self.sums, merged]) if self.sums else merged
        # batch by batch, so that the sum does not depend, in its last digits, on how batches came in chunks
        for losses in zip(*(report.losses for report in reports)):
            before += sum(losses)
        self.sums["loss"] = (before, self.sums["loss"][1])
        for report in reports:
            self.bad_images += report.bad_images
            self.samples[report.rank] += sum(report.counts)
            for part, seconds in report.seconds.items():
                self.seconds[report.rank][part] += seconds
        self.elapsed = time.perf_counter() - self.started

    @property
    def count(self) -> int:
        "Samples seen by all ranks."
        return sum(self.samples.values())

    def as_json(self) -> dict[str, Any]:
        "For a checkpoint."
        ranks = {"samples": self.samples, "seconds": self.seconds}
        return {"sums": self.sums, "bad_images": self.bad_images, "elapsed": self.elapsed, **ranks}

    @classmethod
    def of_json(cls, saved: Mapping[str, Any]) -> Tally:
        "What `as_json` wrote, with the clock running on."
        tally = cls()
        tally.sums = {key: (float(total), float(count)) for key, (total, count) in saved["sums"].items()}
        tally.bad_images = [(str(file), str(reason)) for file, reason in saved["bad_images"]]
        tally.samples.update({int(rank): int(n) for rank, n in saved["samples"].items()})
        for rank, parts in saved["seconds"].items():
            tally.seconds[int(rank)].update({part: float(seconds) for part, seconds in parts.items()})
        tally.elapsed = float(saved["elapsed"])
        tally.started -= tally.elapsed
        return tally

    def means(self) -> dict[str, float]:
        "Loss and metrics per sample."
        return means(self.sums)

    def images_per_second(self) -> float:
        "Of all ranks, by the driver's clock."
        return self.count / self.elapsed if self.elapsed else 0.0

    def worker_speed(self) -> dict[int, float]:
        "Images per second of each rank while it did not wait for others."
        busy = {rank: spent["total"] - spent["communication"] for rank, spent in self.seconds.items()}
        return {rank: self.samples[rank] / seconds if seconds > 0 else 0.0 for rank, seconds in busy.items()}

    def waiting(self, part: str) -> float:
        "The fraction of the workers' time that went into waiting for `part`: data or communication."
        total = sum(spent["total"] for spent in self.seconds.values())
        return sum(spent[part] for spent in self.seconds.values()) / total if total else 0.0
