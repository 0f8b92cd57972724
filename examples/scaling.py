"""From one process to many: the same training by a Learner that is told what to do.

What one learns: what distributes training is not the loop, which stays the Learner's. A gang of workers holds one
Learner each; the driver owns time, and sends them chunks of steps with the rate of each. So a run comes out the same

1. by hand: a LocalGang (one worker, in this process) and a dozen lines that play the driver;
2. by the command line with --local: the real driver, on such a gang;
3. by the command line on several workers, which Ray starts, each on its slice of every global batch.

    python examples/scaling.py --cpus 2
"""

import argparse
import csv
import tempfile
from pathlib import Path

from cluster.gang import LocalGang
from cluster.messages import Job
from learner.data import shapes
from learner.data.files import Split, open_split
from learner.data.loader import Dataset, collate_readable, epoch_order
from learner.data.normalize import Normalize
from orchestrator import launch
from orchestrator.driver import Pace, Plan
from orchestrator.tally import Tally

SIZE, BATCH, SEED, RATE = 32, 50, 42, 0.1
History = list[dict[str, float]]


def by_hand(split: Split, epochs: int, logs: Path) -> History:
    "Drive a gang of one: its history, a row for each epoch."
    first = epoch_order(len(split.train), SEED, 0)[:64]
    images = collate_readable(Dataset(split.train, SIZE), first).inputs
    job = Job(
        train=split.train, valid=split.valid, n_classes=len(split.vocab), arch="simple_cnn_bn", size=SIZE,
        presize=SIZE, batch_size=BATCH, seed=SEED, normalize=Normalize.of(images), augment="none",
        sync_batchnorm=True, skip_bad_images=False,
    )  # fmt: skip
    plan = Plan(
        n_train=len(split.train), n_valid=len(split.valid), batch_size=BATCH, epochs=epochs, schedule="one_cycle",
        lr=RATE,
    )  # fmt: skip
    gang, history = LocalGang(job, "cpu", logs), []
    for epoch in range(epochs):
        sums = {}
        for part, training in (("train", True), ("valid", False)):
            sums[part] = Tally()
            for reports in gang.stream(plan.chunks(training, epoch, Pace())):  # a report of each rank, per chunk
                sums[part].add(reports)
        learned, measured = sums["train"].means(), sums["valid"].means()
        history.append(
            {"train_loss": learned["loss"], "valid_loss": measured["loss"], "accuracy": measured["accuracy"]}
        )
    gang.close()
    return history


def by_command(data: Path, epochs: int, where: list[str]) -> History:
    "What `python -m orchestrator.launch` with these arguments writes into history.csv."
    name = where[0].strip("-")
    arguments = f"--arch simple_cnn_bn --size {SIZE} --batch-size {BATCH} --epochs {epochs} --lr {RATE} --seed {SEED}"
    runs = data.parent / "runs"
    folders = ["--data", str(data), "--cache", "off", "--runs", str(runs), "--name", name]
    if launch.main([*arguments.split(), *folders, *where]):
        raise SystemExit(f"the run on {' '.join(where)} failed")
    with open(runs / name / "version_0" / "history.csv", newline="") as file:
        return [
            {key: float(row[key]) for key in ("train_loss", "valid_loss", "accuracy")} for row in csv.DictReader(file)
        ]


def difference(one: History, other: History) -> float:
    "The largest between two histories' numbers."
    return max(abs(a[key] - b[key]) for a, b in zip(one, other, strict=True) for key in a)


def main(cpus: int = 1, n: int = 500, epochs: int = 2) -> dict[str, float]:
    "Train by hand, by command and on `cpus` workers; how far each history is from the one by hand."
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "shapes")
        shapes.generate(data, train=n, valid=n // 5)
        histories = {"--local": by_command(data, epochs, ["--local"])}
        if cpus > 1:
            histories[f"--cpus {cpus}"] = by_command(data, epochs, ["--cpus", str(cpus)])
        logs = Path(folder, "logs")
        logs.mkdir()
        hand = by_hand(open_split(data, SEED), epochs, logs)
    print("\nby hand:")
    for row in hand:
        print("  ".join(f"{key} {value:.6f}" for key, value in row.items()))
    apart = {how: difference(hand, history) for how, history in histories.items()}
    for how, value in apart.items():
        print(f"launch {how} gives the same history, but for {value:.1e}")
    return apart


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpus", type=int, default=1, help="workers, which Ray starts; 1: only this process")
    main(parser.parse_args().cpus)
