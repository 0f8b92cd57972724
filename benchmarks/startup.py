"From the command to the first step, by phase: in one process, and on two workers."

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from subprocess import run as run_process
from typing import Any

from benchmarks.epoch import check

ROUNDS = 5
INNER = {  # parts of the phase "workers": class or module, its function, the name of the part
    "Ray": ("cluster.ray_cluster", "OwnCluster", "__init__"),
    "worker processes, each importing torch": ("cluster.ray_gang", "RayGang", "_place"),
    "process group, model": ("cluster.ray_gang", "RayGang", "start"),
}


def traced() -> None:
    "Run `launch` with the command line's arguments, and print the seconds of the inner parts that there are."
    import importlib

    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                seconds.setdefault(name, time.perf_counter() - started)

        return call

    from orchestrator import launch

    if "--local" not in sys.argv:
        for name, (module, owner, function) in INNER.items():
            cls = getattr(importlib.import_module(module), owner, None)
            if hasattr(cls, function):
                setattr(cls, function, timed(name, getattr(cls, function)))
    code = launch.main()
    print("INNER " + json.dumps(seconds))
    sys.exit(code)


def once(where: list[str], data: str) -> dict[str, float]:
    "Seconds of each phase, of a run that has one short epoch."
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "from benchmarks.startup import traced; traced()", "--data", data, *where]
        command += ["--data-dir", f"{folder}/data", "--epochs", "1", "--runs", f"{folder}/runs", "--name", "run"]
        printed = check(run_process(command, capture_output=True, text=True, cwd=Path(__file__).parents[1]))
        phases = json.loads(Path(folder, "runs", "run", "version_0", "startup.json").read_text())
    inner = json.loads(next(line for line in printed.splitlines() if line.startswith("INNER")).split(" ", 1)[1])
    return {**phases, **{f"– {name}": seconds for name, seconds in inner.items()}, "all": sum(phases.values())}


def pictures(folder: Path) -> str:
    "A small dataset, so that the phase is that of opening data and not of making it."
    import numpy as np
    from PIL import Image

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
        for _ in range(ROUNDS):
            for name, where in places.items():
                runs[name].append(once(where, data))
    lines = ["| | phase | median s | range |", "| --- | --- | --- | --- |"]
    for name, rounds in runs.items():
        for phase in rounds[0]:
            values = [one[phase] for one in rounds]
            lines.append(f"| {name} | {phase} | {median(values):.2f} | {min(values):.2f} to {max(values):.2f} |")
    note = f"120 small images, {ROUNDS} runs of each in turn; a line with a dash is a part of the phase `workers`."
    return note + "\n\n" + "\n".join(lines)
