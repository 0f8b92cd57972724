"Steps fed from the store against the same steps on tensors that lie ready in memory: what the data path costs."

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.accuracy import DATA
from benchmarks.timing import interleaved, ratios
from cluster.gang import LocalGang
from cluster.messages import Chunk
from learner.data.files import open_split
from learner.data.sources import resolve
from orchestrator.build import make_job, make_store
from orchestrator.config import Config

ROUNDS = 9
CASES = ((64, "none", 40), (64, "crop", 40), (128, "none", 12), (128, "crop", 12))


def contest(size: int, augment: str, steps: int) -> tuple[float, float, float]:
    "Median and quartiles of the time from the store over the time from memory, `steps` of batch 128 a round."
    config = Config(data=str(DATA), size=size, augment=augment, local=True)
    split = open_split(resolve(config.data, Path(config.data_dir).expanduser()), config.seed)
    job = make_job(config, split)
    job = replace(job, store=make_store(config, split))
    with tempfile.TemporaryDirectory() as logs:
        gang = LocalGang(job, "cpu", Path(logs))
        chunks = endless(steps, len(split.train) // job.batch_size)
        for _ in range(len(split.train) // job.batch_size // steps):
            gang.call("run", next(chunks))  # fill the store
        ready = prepared(gang, steps)
        alternatives = {"memory": lambda: train(gang, ready), "store": lambda: gang.call("run", next(chunks))}
        result = ratios(interleaved(alternatives, ROUNDS), "memory")["store"]
        gang.close()
    return result


def endless(steps: int, per_epoch: int) -> Iterator[Chunk]:
    "Chunks of full batches, the same first ones of the epoch in turn with the next, for ever."
    while True:
        for first in range(0, per_epoch - steps + 1, steps):
            yield Chunk(True, 0, first, first, ({"lr": 0.01},) * steps)


def prepared(gang: LocalGang, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    "Batches as the model sees them."
    worker = gang.worker
    batches = []
    for batch, _ in worker.data.open(Chunk(True, 1, 0, 0, ({},) * steps)):
        worker.learner.batch, worker.learner.rows = (batch.inputs, batch.targets), batch.rows
        worker.learner("before_batch")
        batches.append(worker.learner.batch)
        if len(batches) == steps:
            return batches
    raise ValueError(f"the epoch has fewer than {steps} batches")


def train(gang: LocalGang, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    "The bare steps: forward, backward, update, on the worker's own model."
    learner = gang.worker.learner
    learner.model.training = True
    gang.worker.reducer.weight.fill_(len(batches[0][1]))
    for learner.batch in batches:
        learner.predict()
        learner.get_loss()
        learner.backward()
        learner.step()
        learner.zero_grad()
    gang.worker.reducer.reset()


def run() -> str:
    "A table of the ratios."
    lines = ["| pictures | augmentation | time from the store / from memory |", "| --- | --- | --- |"]
    for size, augment, steps in CASES:
        middle, low, high = contest(size, augment, steps)
        lines.append(f"| {size} px | {augment} | {middle:.3f} ({low:.3f} to {high:.3f}) |")
    note = f"`simple_cnn`, batch 128, one process with all cores, median (quartiles) of {ROUNDS} interleaved rounds."
    return note + "\n\n" + "\n".join(lines)
