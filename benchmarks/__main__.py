"Runs the benchmarks that are named, or all that time CPUs, and writes each one's section into RESULTS.md."

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from shutil import which

import torch

NAMES = (
    "chaos", "decoding", "driver", "epoch", "optimizer", "parameter", "scaling", "startup", "step", "store",
)  # fmt: skip
NAMED = ("accuracy", "gpu", "imagenette", "shapes")  # not about speed, an hour long, or for a GPU: only when named
PACKAGES = ("torch", "numpy", "pillow", "simplejpeg", "ray", "lightning", "accelerate")
RESULTS = Path(__file__).with_name("RESULTS.md")
HEAD = (
    "# Results\n\nWritten by `python -m benchmarks [NAME ...]`, but for the digits and what was tried of Imagenette;\n"
    "each section says on what and when it was measured.\n"
)


def commit() -> str:
    "The commit that is checked out, with a + where the files differ from it, but for the results themselves."

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=RESULTS.parent, capture_output=True, text=True).stdout.strip()

    if not which("git") or not (head := git("rev-parse", "--short", "HEAD")):
        return "an unknown commit"
    return f"commit {head}" + ("+" if git("status", "--porcelain", "--", ":/", f":!{RESULTS.name}") else "")


def machine() -> str:
    "One line about what runs here, and where."
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    installed = {found.name.lower(): found.version for found in distributions()}
    versions = ", ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed)
    cpu = model[0].split(":")[1].strip() if model else platform.processor()
    return (
        f"{time.strftime('%Y-%m-%d')}, {commit()}: {os.cpu_count()} cores ({cpu}), {device}, "
        f"Python {platform.python_version()}, {versions}"
    )


def write_section(name: str, text: str, seconds: float) -> None:
    "Replace the section of that name, or add it; measuring took so many `seconds`."
    old = RESULTS.read_text() if RESULTS.exists() else HEAD
    head, *sections = old.split("\n## ")
    kept = {section.split("\n")[0]: section for section in sections}
    kept[name] = f"{name}\n\n{text.strip()}\n\n{machine()}; in {seconds:.0f} s.\n"
    RESULTS.write_text("\n## ".join([head.rstrip() + "\n", *(kept[key].rstrip() + "\n" for key in sorted(kept))]))


def main(names: list[str]) -> None:
    "Run a benchmark; of several, each in a process of its own, so that none has to do with another's state or failure."
    if unknown := set(names) - {*NAMES, *NAMED}:
        sys.exit(f"error: no benchmark is called {min(unknown)}; there are {', '.join(NAMES + NAMED)}")
    if len(names) == 1:
        started = time.perf_counter()
        text = importlib.import_module(f"benchmarks.{names[0]}").run()
        write_section(names[0], text, time.perf_counter() - started)
        return
    failed = []
    for name in names or NAMES:
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        if subprocess.run([sys.executable, "-m", "benchmarks", name]).returncode:
            failed.append(name)
        print(f"{time.perf_counter() - started:.0f} s", flush=True)
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed; what RESULTS.md says of the others is new")


if __name__ == "__main__":
    main(sys.argv[1:])
