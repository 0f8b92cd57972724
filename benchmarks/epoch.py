"An epoch by two CPU workers, from JPEG files: ours against pure compute, and against what one would use instead."

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F

from benchmarks.accuracy import DATA, read_history
from benchmarks.driver import Coordinated
from benchmarks.peers.common import BATCH, LR, MARK, WORKERS
from benchmarks.ranks import Ranks, barrier
from benchmarks.timing import aim, shown
from cluster.comms import Group
from cluster.ray_gang import RayGang, Workers
from cluster.reducer import GradientSum
from cluster.shards import n_batches, part
from learner.data.decoder import decoder_version
from learner.data.files import open_split
from learner.data.sources import resolve
from learner.memory import keep_memory
from learner.models import build
from learner.optim import SGD
from orchestrator.build import make_job, make_store
from orchestrator.config import Config

N, EPOCHS, ROUNDS = 4800, 3, 2  # images, epochs a run, runs of the peers
HUNG = 240.0  # seconds; once, Accelerate's workers stood still for a quarter of an hour
PEERS = {  # name: module, what must be installed, by torchrun
    "DataLoader + DistributedDataParallel (torchrun)": ("ddp", "torch", True),
    "Accelerate (torchrun)": ("accelerated", "accelerate", True),
    "Lightning": ("lit", "lightning", False),
    "Ray Train's TorchTrainer": ("ray_train", "pyarrow", False),
    "the book's loop and loader": ("book", "torch", False),
}
FIRST_AIMS = {64: 1.30, 128: 1.36}
LATER_AIMS = {(64, "none"): 1.05, (64, "crop"): 1.10, (128, "none"): 1.15, (128, "crop"): 1.20}
WAITING_AIM = 2  # percent
KINDS = ("none", "crop")  # augmentation
COMPARED = {64: 7, 128: 3}  # side: runs that are compared with pure compute
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


def warm(root: Path) -> None:
    "Have all files in memory: the system may have forgotten some, and the disk takes its time."
    for file in root.rglob("*.JPEG"):
        file.read_bytes()


def ours(root: Path) -> Seconds:
    "Training time of each epoch by the command that users run, with a store that is empty at first."
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "orchestrator.launch", "--data", str(root), "--cpus", f"{WORKERS}"]
        command += ["--size", "64", "--augment", "none", "--batch-size", f"{BATCH}", "--lr", f"{LR}"]
        command += ["--epochs", f"{EPOCHS}", "--schedule", "constant", "--cache", f"{folder}/store"]
        check(subprocess.run([*command, "--runs", f"{folder}/runs", "--name", "run"], capture_output=True, text=True))
        rows = read_history(Path(folder, "runs", "run", "version_0"))
        return [N / row["images_per_second"] for row in rows]


def check(done: subprocess.CompletedProcess[str]) -> str:
    "What it printed; an error where it failed."
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, done.args))} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def peer(module: str, by_torchrun: bool, root: Path, size: int, tries: int = 3) -> Seconds:
    "Training time of each epoch by a peer's script; one that hangs is ended and begun anew."
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={WORKERS}", "-m"] if by_torchrun else []
    command = [sys.executable, "-m", *launcher, f"benchmarks.peers.{module}", str(root), f"{size}", f"{EPOCHS}"]
    quiet = {"OMP_NUM_THREADS": f"{WORKERS if module == 'book' else 1}", "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | quiet
    ) as process:
        try:
            out, err = process.communicate(timeout=HUNG)
        except subprocess.TimeoutExpired:
            process.terminate()  # upon which torchrun ends its workers
            out, err = process.communicate()
            if tries > 1:
                print(f"{module} hung for {HUNG:g} s: once more", flush=True)
                return peer(module, by_torchrun, root, size, tries - 1)
    printed = check(subprocess.CompletedProcess(command, process.returncode, out, err))
    (line,) = [line for line in printed.splitlines() if MARK in line]
    return json.loads(line.split(MARK)[1])


def compute(group: Group, size: int, kept: bool) -> Callable[[], float]:
    """Seconds of the same steps, by the same optimizer and exchange, on normalised batches that lie ready in memory.

    In processes as torch has them, or that keep what they free as our workers do: then only the data path, the reports
    and the driver are left to tell ours from these.
    """
    if kept:
        keep_memory()
    torch.manual_seed(group.rank)
    net = build("simple_cnn", 3, 10)
    reducer = GradientSum(net.parameters(), group)
    optimizer = SGD(net.parameters(), LR, reduce=reducer)
    counts = [min(N, (b + 1) * BATCH) - b * BATCH for b in range(n_batches(N, BATCH))]
    batches = []
    for n in (len(part(n, group.rank, group.world_size)) for n in counts):
        batches.append((torch.randn(n, size, size, 3).permute(0, 3, 1, 2), torch.randint(10, (n,))))

    def epoch() -> float:
        barrier(group)
        started = time.perf_counter()
        for x, y in batches:
            reducer.weight.fill_(len(x))
            F.cross_entropy(net(x), y, reduction="sum").backward()
            optimizer.step()
            optimizer.zero_grad()
        return time.perf_counter() - started

    return epoch


def mine(gang: RayGang, root: Path, size: int, augment: str) -> list[tuple[float, float]]:
    """Seconds of training of `EPOCHS` epochs by workers that are there, from a store that is empty at first.

    And what part of them, in percent, the workers waited for data.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = Config(data=str(root), size=size, augment=augment, batch_size=BATCH, cache=f"{folder}/store")
        split = open_split(root, config.seed)
        job = make_job(config, split)
        job = replace(job, store=make_store(config, split))
        gang.start(job, WORKERS)
        warm(root)
        epoch, told = Coordinated(gang, job, Path(folder, "runs")), []
        for _ in range(EPOCHS):
            started = time.perf_counter()
            tally = epoch()
            told.append((time.perf_counter() - started, 100 * tally.waiting("data")))
        epoch.tracker.close()
        return told


def standing(root: Path, folder: Path) -> RayGang:
    "Workers that stand by."
    config = Config(data=str(root), size=64, batch_size=BATCH)
    return RayGang(make_job(config, open_split(root, config.seed)), Workers(WORKERS, 0.0, "gloo"), folder / "logs")


def against_compute(gang: RayGang, root: Path, size: int, n_rounds: int) -> list[str]:
    """Rows of ours over both kinds of pure compute, epoch by epoch in turn in processes that stand by.

    Each run of ours has an epoch of pure compute before and behind it, whose mean it is compared to.
    """
    pure = [Ranks(WORKERS, compute, size, kept) for kept in (False, True)]
    found: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in KINDS}
    before = [[ranks() for ranks in pure] for _ in range(2)][1]  # the first has them start
    for number in range(n_rounds):
        for kind in KINDS if number % 2 else KINDS[::-1]:
            (first, _), *epochs = mine(gang, root, size, kind)
            later, waiting = (mean(column) for column in zip(*epochs))
            behind = [ranks() for ranks in pure]
            plain, kept = (mean(pair) for pair in zip(before, behind))
            found[kind].append((first / plain, first / kept, later / plain, later / kept, waiting))
            print(f"{size} px, {kind}: {', '.join(f'{ratio:.2f}' for ratio in found[kind][-1])}", flush=True)
            before = behind
    for ranks in pure:
        ranks.close()
    return [compared_row(size, kind, *zip(*runs)) for kind, runs in found.items()]


def compared_row(size: int, kind: str, *columns: Sequence[float]) -> str:
    "A row of the table: first epochs over both kinds of pure compute, later ones, and percents of waiting."
    first, later, waiting = columns[:2], columns[2:4], columns[4]
    cells = [f"{size} px", kind, *[shown(ratios) for ratios in first], aim(FIRST_AIMS[size], *first)]
    cells += [*[shown(ratios) for ratios in later], aim(LATER_AIMS[size, kind], *later)]
    cells += [f"{median(waiting):.2f}%, at most {max(waiting):.2f}%", aim(WAITING_AIM, waiting)]
    return f"| {' | '.join(cells)} |"


def rounds(root: Path, contestants: dict[str, Callable[[], Seconds]]) -> dict[str, list[Seconds]]:
    "Each one's epochs, run after run, in turns."
    runs: dict[str, list[Seconds]] = {name: [] for name in contestants}
    for number in range(ROUNDS):
        names = list(contestants)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            warm(root)
            runs[name].append(contestants[name]())
            print(f"{name}: {', '.join(f'{s:.2f}' for s in runs[name][-1])} s", flush=True)
    return runs


def first_and_later(runs: list[Seconds]) -> tuple[Seconds, Seconds]:
    "Seconds of all first epochs, and of all later ones."
    return [run[0] for run in runs], [seconds for run in runs for seconds in run[1:]]


def peers(root: Path) -> tuple[dict[str, Callable[[], Seconds]], list[str]]:
    "The peers that are installed, at 64 px without augmentation, and the names of the others."
    missing = [name for name, (_, needed, _) in PEERS.items() if find_spec(needed) is None]
    scripts = {name: partial(peer, module, run, root, 64) for name, (module, _, run) in PEERS.items()}
    return {name: script for name, script in scripts.items() if name not in missing}, missing


def peer_rows(runs: dict[str, list[Seconds]]) -> list[str]:
    "Everyone's seconds, and those over ours."
    own, rows = [median(each) for each in first_and_later(runs["ours"])], []
    for name, theirs in runs.items():
        both = first_and_later(theirs)
        seconds = [f"{median(each):.2f} ({min(each):.2f} to {max(each):.2f})" for each in both]
        over_ours = [f"{median(each) / ours:.2f}" for each, ours in zip(both, own)]
        rows.append(f"| {' | '.join([name, *seconds, *over_ours])} |")
    return rows


def run() -> str:
    "Both tables."
    if not DATA.exists():
        sys.exit(f"error: {DATA} is missing; this benchmark needs it")
    with tempfile.TemporaryDirectory() as folder:
        root = subset(Path(folder))
        there, missing = peers(root)
        runs = rounds(root, {"ours": partial(ours, root), **there})
        gang = standing(root, Path(folder))
        try:
            rows = [row for size, n in COMPARED.items() for row in against_compute(gang, root, size, n)]
        finally:
            gang.close()
    compared = " and ".join(f"{n} (at {size} px)" for size, n in COMPARED.items())
    lacking = (
        f"Not installed here, so not measured (`pip install '.[peers]'`): {', '.join(missing)}.\n" if missing else ""
    )
    return f"""\
`simple_cnn`, global batch {BATCH}, plain SGD, {WORKERS} CPU workers of one thread, {N} images of Imagenette's training
set, {EPOCHS} epochs a run, {ROUNDS} runs of each in turn; seconds of training, start-up and validation left out.
Ours decodes by {decoder_version()}.

64 px, without augmentation, medians (range):

| | first epoch, s | later epochs, s | first, over ours | later, over ours |
| --- | --- | --- | --- | --- |
{chr(10).join(peer_rows(runs))}

{lacking if missing else ""}
Ours over pure compute, the same steps on tensors that lie in memory, in processes that stand by, driver and Ray at
work. Median (quartiles) of {compared} runs, each between two epochs of pure compute. "Kept": over
the same in processes that keep the memory they free, as our workers do (`learner/memory.py`), so that all else is left.
"Waiting": what part of their time in later epochs, those from the store, workers wait for data, in percent. What was
tried where an aim is missed is in NOTES.md.

| pictures | augmentation | first epoch | kept | aim | later epochs | kept | aim | waiting | aim |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(rows)}
"""
