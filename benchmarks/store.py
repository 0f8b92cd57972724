"Batches from the store against the machine's speed of copying memory."

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import interleaved, quotients, shown
from learner.data.files import Labelled
from learner.data.loader import collate_readable, epoch_order
from learner.data.store import Store, StoredDataset
from learner.memory import keep_memory

N, BATCH, ROUNDS = 4096, 128, 15


def filled(folder: Path, size: int) -> StoredDataset:
    "A dataset all of whose pictures are in the store; there are no files behind it."
    store, rng = Store(folder / f"{size}", N, size), np.random.default_rng(0)
    for row in range(N):
        store.put(row, rng.integers(0, 256, (size, size, 3), np.uint8))
    names = tuple(f"{row}.jpg" for row in range(N))
    return StoredDataset(Labelled(names, (0,) * N), size, store, 0)


def run() -> str:
    "A table by size."
    torch.set_num_threads(1)
    keep_memory()
    lines = ["| pictures | batches/s | GB/s | time over memcpy's |", "| --- | --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as folder:
        for size in (64, 128, 160):
            dataset, order = filled(Path(folder), size), epoch_order(N, 0, 0)
            source, target = np.array(dataset.store.pixels), np.empty((BATCH, size, size, 3), np.uint8)
            starts = range(0, N, BATCH)

            def gather(dataset=dataset, order=order, starts=starts) -> None:
                for start in starts:
                    collate_readable(dataset, order[start : start + BATCH])

            def memcpy(source=source, target=target, starts=starts) -> None:
                for start in starts:
                    np.copyto(target, source[start : start + BATCH])

            seconds = interleaved({"gather": gather, "memcpy": memcpy}, ROUNDS)
            each = sorted(seconds["gather"])[ROUNDS // 2] / len(starts)
            speed = f"{1 / each:.0f} | {target.nbytes / each / 1e9:.2f}"
            lines.append(f"| {size} px | {speed} | {shown(quotients(seconds, 'gather', 'memcpy'))} |")
    note = (
        f"One thread, shuffled batches of {BATCH} out of {N} rows of the store's memory map (checksums already seen), "
        "in a process that\nkeeps the memory it frees, as workers do, against copying as many rows that lie side by "
        "side in memory into\none buffer; "
        f"medians (quartiles) of {ROUNDS} interleaved rounds."
    )
    return note + "\n\n" + "\n".join(lines)
