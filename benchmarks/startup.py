"From the command to the first step, by phase: in one process, and on two workers."

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from benchmarks.epoch import check

ROUNDS = 5


def once(where: list[str], data: str) -> dict[str, float]:
    "What a run that has one short epoch wrote of the seconds of each phase, and their sum."
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # compiled but once
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "orchestrator.launch", "--data", data, "--data-dir", f"{folder}/data", *where]
        command += ["--epochs", "1", "--runs", f"{folder}/runs", "--name", "run"]
        root = Path(__file__).parents[1]
        check(subprocess.run(command, capture_output=True, text=True, cwd=root, env=env))
        phases = json.loads(Path(folder, "runs", "run", "version_0", "startup.json").read_text())
    return {**phases, "all": sum(phases.values())}


def pictures(folder: Path) -> str:
    "A small dataset, so that the phase is that of opening data and not of making it."
    rng = np.random.default_rng(0)
    for number in range(160):
        part = "val" if number % 4 == 0 else "train"
        file = folder / part / f"class{number % 2}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (160, 160, 3), np.uint8)).save(file)
    return str(folder)


def run() -> str:
    "A table of phases."
    places = {"one worker, in this process (`--local`)": ["--local"], "two workers (`--cpus 2`)": ["--cpus", "2"]}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in places}
    with tempfile.TemporaryDirectory() as folder:
        data = pictures(Path(folder))
        for number in range(ROUNDS + 1):
            for name, where in places.items():
                phases = once(where, data)
                if number:  # the first has cold files
                    runs[name].append(phases)
    lines = ["| | phase | median s | range |", "| --- | --- | --- | --- |"]
    for name, rounds in runs.items():
        for phase in rounds[0]:
            values = [one[phase] for one in rounds]
            lines.append(f"| {name} | {phase} | {median(values):.2f} | {min(values):.2f} to {max(values):.2f} |")
    note = f"""\
What the startup.json of these runs says: 120 small images, {ROUNDS} runs of each in turn, after one that is not
counted. "import" begins with the process and has torch and TensorBoard in it, "Ray" its import and the start of its
servers; "workers" lasts until all their processes are up, each with a torch of its own; "first step" has its images
read and decoded."""
    return note + "\n\n" + "\n".join(lines)
