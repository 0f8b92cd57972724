"Runs the benchmarks that are named, or all but the long ones, and writes each one's section into RESULTS.md."

from __future__ import annotations

import importlib
import os
import platform
import sys
import time
from pathlib import Path

import torch

NAMES = (
    "chaos", "data_path", "decoding", "driver", "epoch", "optimizer", "parameter", "scaling", "shapes", "startup",
    "step", "store",
)  # fmt: skip
LONG = ("accuracy", "gpu", "imagenette")  # an hour, or for a GPU; only when named
RESULTS = Path(__file__).with_name("RESULTS.md")
HEAD = (
    "# Results\n\nWritten by `python -m benchmarks [NAME ...]`; each section says on what and when it was measured.\n"
)


def machine() -> str:
    "One line about where this runs."
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cpu = model[0].split(":")[1].strip() if model else platform.processor()
    return (
        f"{time.strftime('%Y-%m-%d')}: {os.cpu_count()} cores ({cpu}), {device}, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def write_section(name: str, text: str) -> None:
    "Replace the section of that name, or add it."
    old = RESULTS.read_text() if RESULTS.exists() else HEAD
    head, *sections = old.split("\n## ")
    kept = {section.split("\n")[0]: section for section in sections}
    kept[name] = f"{name}\n\n{text.strip()}\n\n{machine()}.\n"
    RESULTS.write_text("\n## ".join([head.rstrip() + "\n", *(kept[key].rstrip() + "\n" for key in sorted(kept))]))


def main(names: list[str]) -> None:
    "Run benchmarks one after the other, each in the state in which a new process finds torch."
    threads = torch.get_num_threads()
    for name in names or NAMES:
        if name not in NAMES + LONG:
            sys.exit(f"error: no benchmark is called {name}; there are {', '.join(NAMES + LONG)}")
        print(f"== {name}", flush=True)
        torch.set_num_threads(threads)
        write_section(name, importlib.import_module(f"benchmarks.{name}").run())


if __name__ == "__main__":
    main(sys.argv[1:])
