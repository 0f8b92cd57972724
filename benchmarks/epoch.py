"An epoch by two CPU workers, from JPEG files: ours against pure compute, and against what one would use instead."

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from benchmarks.accuracy import DATA, read_history
from benchmarks.peers.common import BATCH, LR, MARK, WORKERS
from benchmarks.ranks import run_ranks
from cluster.comms import Group
from cluster.reducer import GradientSum
from cluster.shards import n_batches, part
from learner.data.decoder import decoder_version
from learner.data.files import open_split
from learner.data.sources import resolve
from learner.memory import keep_memory
from learner.models import build
from learner.optim import SGD

N, EPOCHS, ROUNDS = 4800, 3, 2
PEERS = {  # name: module, what must be installed, by torchrun
    "DataLoader + DistributedDataParallel (torchrun)": ("ddp", "torch", True),
    "Accelerate (torchrun)": ("accelerated", "accelerate", True),
    "Lightning": ("lit", "lightning", False),
    "Ray Train's TorchTrainer": ("ray_train", "pyarrow", False),
    "the book's loop and loader": ("book", "torch", False),
}
FIRST_AIMS = {64: 1.30, 128: 1.36}
LATER_AIMS = {(64, "none"): 1.05, (64, "crop"): 1.10, (128, "none"): 1.15, (128, "crop"): 1.20}
KINDS = ("none", "crop")  # augmentation
PURE = {"pure compute": False, "pure compute, memory kept": True}
Seconds = list[float]


def subset(folder: Path) -> Path:
    "Links to `N` training images of Imagenette, and to a few to validate with."
    split = open_split(resolve(str(DATA), Path("~/.cache/orchestrator").expanduser()), 42)
    for name, labelled, n in (("train", split.train, N), ("val", split.valid, 100)):
        for i in (number * len(labelled) // n for number in range(n)):  # evenly over all classes
            link = folder / name / split.vocab.classes[labelled.targets[i]] / f"{i}.JPEG"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.realpath(labelled.files[i]))
    return folder


def ours(root: Path, size: int, augment: str) -> Seconds:
    "Training time of each epoch by the command that users run, with a store that is empty at first."
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "orchestrator.launch", "--data", str(root), "--cpus", f"{WORKERS}"]
        command += ["--size", f"{size}", "--augment", augment, "--batch-size", f"{BATCH}", "--lr", f"{LR}"]
        command += ["--epochs", f"{EPOCHS}", "--schedule", "constant", "--cache", f"{folder}/store"]
        check(subprocess.run([*command, "--runs", f"{folder}/runs", "--name", "run"], capture_output=True, text=True))
        rows = read_history(Path(folder, "runs", "run", "version_0"))
        return [N / row["images_per_second"] for row in rows]


def check(done: subprocess.CompletedProcess[str]) -> str:
    "What it printed; an error where it failed."
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, done.args))} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def peer(module: str, by_torchrun: bool, root: Path, size: int) -> Seconds:
    "Training time of each epoch by a peer's script."
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}", "-m"] if by_torchrun else []
    command = [sys.executable, "-m", *launcher, f"benchmarks.peers.{module}", str(root), f"{size}", f"{EPOCHS}"]
    quiet = {"OMP_NUM_THREADS": f"{WORKERS if module == 'book' else 1}", "PYTHONPATH": str(Path(__file__).parents[1])}
    printed = check(subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet))
    (line,) = [line for line in printed.splitlines() if MARK in line]
    return json.loads(line.split(MARK)[1])


def compute(group: Group, size: int, images: int, epochs: int, kept: bool) -> Seconds:
    """The same steps, by the same optimizer and exchange, on normalised batches that lie ready in memory.

    In processes as torch has them, or that keep what they free as our workers do: then only the data path, the reports
    and the driver are left to tell ours from these.
    """
    if kept:
        keep_memory()
    torch.manual_seed(group.rank)
    net = build("simple_cnn", 3, 10)
    reducer = GradientSum(net.parameters(), group)
    optimizer = SGD(net.parameters(), LR, reduce=reducer)
    counts = [min(images, (b + 1) * BATCH) - b * BATCH for b in range(n_batches(images, BATCH))]
    batches = []
    for n in (len(part(n, group.rank, group.world_size)) for n in counts):
        batches.append((torch.randn(n, size, size, 3).permute(0, 3, 1, 2), torch.randint(10, (n,))))
    seconds = []
    for _ in range(epochs):
        group.barrier()
        started = time.perf_counter()
        for x, y in batches:
            reducer.weight.fill_(len(x))
            F.cross_entropy(net(x), y, reduction="sum").backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return seconds


def pure(kept: bool, size: int) -> Seconds:
    "Pure compute takes as long in the first epoch as in any."
    return run_ranks(WORKERS, compute, size, N, EPOCHS, kept)


def rounds(contestants: dict[str, Callable[[], Seconds]]) -> dict[str, list[Seconds]]:
    "Each one's epochs, run after run, in turns."
    runs: dict[str, list[Seconds]] = {name: [] for name in contestants}
    for number in range(ROUNDS):
        names = list(contestants)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            runs[name].append(contestants[name]())
            print(f"{name}: {', '.join(f'{s:.2f}' for s in runs[name][-1])} s", flush=True)
    return runs


def middle(runs: list[Seconds]) -> tuple[float, float]:
    "Median seconds of the first epoch and of the later ones."
    return median(run[0] for run in runs), median(seconds for run in runs for seconds in run[1:])


def spread(values: list[float]) -> str:
    "Median and range."
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def contestants(root: Path, size: int) -> dict[str, Callable[[], Seconds]]:
    "Ours without and with augmentation, and the same steps from memory."
    kinds: dict[str, Callable[[], Seconds]] = {f"ours, {kind}": partial(ours, root, size, kind) for kind in KINDS}
    return kinds | {name: partial(pure, kept, size) for name, kept in PURE.items()}


def peers(root: Path) -> tuple[dict[str, Callable[[], Seconds]], list[str]]:
    "The peers that are installed, at 64 px without augmentation, and the names of the others."
    missing = [name for name, (_, needed, _) in PEERS.items() if find_spec(needed) is None]
    scripts = {name: partial(peer, module, run, root, 64) for name, (module, _, run) in PEERS.items()}
    return {name: script for name, script in scripts.items() if name not in missing}, missing


def compute_rows(size: int, runs: dict[str, list[Seconds]]) -> list[str]:
    "Ours over both kinds of pure compute of the same round."
    rows = []
    for kind in KINDS:
        cells = [f"{size} px", kind]
        for aim, epochs in ((FIRST_AIMS[size], slice(1)), (LATER_AIMS[size, kind], slice(1, None))):
            mine = [median(run[epochs]) for run in runs[f"ours, {kind}"]]
            cells += [spread([m / median(run) for m, run in zip(mine, runs[name])]) for name in PURE] + [f"{aim:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def peer_rows(runs: dict[str, list[Seconds]]) -> list[str]:
    "Everyone's seconds, and those over ours without augmentation."
    mine, rows = middle(runs["ours, none"]), []
    for name, theirs in runs.items():
        first, later = middle(theirs)
        rows.append(f"| {name} | {first:.2f} | {later:.2f} | {first / mine[0]:.2f} | {later / mine[1]:.2f} |")
    return rows


def run() -> str:
    "Both tables."
    if not DATA.exists():
        sys.exit(f"error: {DATA} is missing; this benchmark needs it")
    with tempfile.TemporaryDirectory() as folder:
        root = subset(Path(folder))
        there, missing = peers(root)
        small = rounds({**contestants(root, 64), **there})
        large = rounds(contestants(root, 128))
    lacking = (
        f"Not installed here, so not measured (`pip install '.[peers]'`): {', '.join(missing)}.\n" if missing else ""
    )
    return f"""\
`simple_cnn`, global batch {BATCH}, plain SGD, {WORKERS} CPU workers of one thread, {N} images of Imagenette's training
set, {EPOCHS} epochs a run, {ROUNDS} runs of each in turn; seconds of training, start-up and validation left out.
Ours decodes by {decoder_version()}; `none` and `crop` are its augmentation, peers have none.

64 px, medians:

| | first epoch, s | later epochs, s | first, over ours | later, over ours |
| --- | --- | --- | --- | --- |
{chr(10).join(peer_rows(small))}

{lacking if missing else ""}
Ours over pure compute, the same steps on tensors that lie in memory; median (range) of the runs. "Kept": over the same
in processes that keep the memory they free, as our workers do (`learner/memory.py`), so that all else is left to see:

| pictures | augmentation | first epoch | kept | aim | later epochs | kept | aim |
| --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(compute_rows(64, small) + compute_rows(128, large))}
"""
