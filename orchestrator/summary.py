"What a run says before it trains and after."

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from learner.data.files import Split
from learner.reading import absolute, expanded
from orchestrator.config import Config
from orchestrator.devices import Devices
from orchestrator.driver import Plan
from orchestrator.run_folder import CONFIG, RunFolder


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
    quiet: bool = False,
) -> None:
    "Print the resolved configuration, if not `quiet`, and save it as config.json, with what was `found` of the data."
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
    chosen = {**dataclasses.asdict(config), "data": absolute(config.data)}
    folder.write_json(CONFIG, {**chosen, "resolved": resolved, "found": found})
    if quiet:
        return
    told = {name: value for name, value in {**chosen, **resolved}.items() if value is not None}
    told["classes"] = ", ".join([f"{len(split.vocab)}: {split.vocab.classes[0]}", *split.vocab.classes[1:6]])
    told["classes"] += " ..." if len(split.vocab) > 6 else ""
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
    runs = expanded(config.runs)
    below = folder.path.absolute().is_relative_to(runs.absolute())
    print(f"look at it:    {tensorboard_command(runs if below else folder.path)}")


def unreadable(n: int) -> str:
    "The subject and verb of a sentence about so many images."
    return "1 unreadable image was" if n == 1 else f"{n} unreadable images were"


def tensorboard_command(folder: Path) -> str:
    "What starts TensorBoard on a folder from where the user stands."
    return shlex.join([*_tensorboard(), "--logdir", str(folder)])


def _tensorboard() -> list[str]:
    if shutil.which("tensorboard"):
        return ["tensorboard"]
    beside = Path(sys.executable).with_name("tensorboard")
    if not beside.exists():
        return [sys.executable, "-m", "tensorboard.main"]
    return [str(beside.relative_to(Path.cwd())) if beside.is_relative_to(Path.cwd()) else str(beside)]
