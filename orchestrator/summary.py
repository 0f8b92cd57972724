"What a run says before it trains and after."

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from learner.data.files import Split
from orchestrator.config import Config
from orchestrator.devices import Devices
from orchestrator.driver import Plan
from orchestrator.run_folder import RunFolder


def default_name(config: Config) -> str:
    "data-arch, from the last part of a path or a URL, without an archive's ending."
    last = re.sub(r"(\.tar)?\.(tgz|gz|tar|zip)$", "", Path(config.data.rstrip("/")).name) or "data"
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in f"{last}-{config.arch}").lstrip(".-")


def report_configuration(
    config: Config,
    devices: Devices,
    split: Split,
    plan: Plan,
    folder: RunFolder,
    channels: int,
    found: Mapping[str, Any],
) -> None:
    "Print the resolved configuration and save it as config.json, with what was `found` of the data."
    smallest = config.batch_size // devices.count
    largest = -(-config.batch_size // devices.count)
    resolved = {
        "workers": str(devices),
        "local_batch": f"{smallest}" if smallest == largest else f"{smallest} or {largest}",
        "channels": channels,
        "classes": len(split.vocab),
        "train_images": plan.n_train,
        "valid_images": plan.n_valid,
        "steps_per_epoch": plan.train_batches,
        "steps": plan.steps,
        "run_directory": str(folder.path),
    }
    chosen = dataclasses.asdict(config)
    folder.write_json("config.json", {**chosen, "resolved": resolved, "found": found})
    told = {name: value for name, value in {**chosen, **resolved}.items() if value is not None}
    width = max(map(len, told))
    for name, value in told.items():
        print(f"{name:<{width}} {value}")
    print(flush=True)


def conclude(config: Config, folder: RunFolder, row: dict[str, Any], n_bad: int) -> None:
    "Say what was reached, where it lies and how to look at it."
    if n_bad:
        print(f"{unreadable(n_bad)} skipped; see {folder.path / 'bad_images.csv'}")
    done = row["epoch"] + 1
    print(f"\naccuracy {row['accuracy']:.4f} on the validation set after {done} epoch{'s' if done > 1 else ''}")
    print(f"run directory: {folder.path}")
    print(f"look at it:    {tensorboard_command()} --logdir {config.runs}")


def unreadable(n: int) -> str:
    "The subject and verb of a sentence about so many images."
    return "1 unreadable image was" if n == 1 else f"{n} unreadable images were"


def tensorboard_command() -> str:
    "What starts TensorBoard from where the user stands."
    if shutil.which("tensorboard"):
        return "tensorboard"
    beside = Path(sys.executable).with_name("tensorboard")
    if not beside.exists():
        return f"{sys.executable} -m tensorboard.main"
    return str(beside.relative_to(Path.cwd())) if beside.is_relative_to(Path.cwd()) else str(beside)
