"What `make run` reaches: the recipe for the generated dataset on 2 CPU workers, several seeds."

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.accuracy import read_history, spread

RECIPE = Path(__file__).parents[1] / "recipes" / "shapes.toml"


def run() -> str:
    "A table of accuracies and times, from the command to its end."
    lines = ["| seed | validation accuracy | seconds |", "| --- | --- | --- |"]
    accuracies = []
    for seed in (1, 2, 3, 42):
        with tempfile.TemporaryDirectory() as runs:
            command = [sys.executable, "-m", "orchestrator.launch", "--config", str(RECIPE), "--cpus", "2"]
            started = time.perf_counter()
            subprocess.run([*command, "--seed", f"{seed}", "--runs", runs, "--name", "run"], check=True,
                           stdout=subprocess.DEVNULL)  # fmt: skip
            seconds = time.perf_counter() - started
            accuracies.append(read_history(Path(runs, "run", "version_0"))[-1]["accuracy"])
        lines.append(f"| {seed} | {accuracies[-1]:.4f} | {seconds:.0f} |")
    return "\n".join([*lines, f"| mean ± sd | {spread(accuracies)} | |"])
