"python -m orchestrator.launch: read what is asked, refuse what can't be, build the gang, train, say what came of it."

from __future__ import annotations

import dataclasses
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from learner.errors import UsageError, UserError
from orchestrator.command_line import parse
from orchestrator.config import Config

if TYPE_CHECKING:
    from cluster.gang import Gang
    from cluster.worker import Job
    from learner.data.files import Split
    from orchestrator.devices import Devices
    from orchestrator.driver import Plan
    from orchestrator.run_folder import RunFolder
    from orchestrator.tracker import Tracker


def main(argv: Sequence[str] | None = None) -> int:
    "Run the command line; the exit code: 0 done, 1 failed, 2 asked for the impossible, 130 Ctrl-C, 143 SIGTERM."
    arguments = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, _terminate)
    try:
        run(parse(arguments))
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted: workers are stopped, the epochs that were done are in history.csv", file=sys.stderr)
        return 130
    except UserError as error:
        return _fail(str(error), 2 if isinstance(error, UsageError) else 1, arguments)
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{place}; the epochs that were done are in history.csv", 1, arguments)


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(143)


def _fail(message: str, code: int, arguments: Sequence[str]) -> int:
    if "--debug" in arguments:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return code


def run(config: Config) -> dict[str, Any]:
    "Train as `config` says, from the data to the model's file; the last epoch's row."
    from learner.data.files import open_split
    from learner.data.sources import resolve
    from learner.models import check_name
    from orchestrator.build import check_batch_size, visible_devices
    from orchestrator.terminal import download_bar

    check_name(config.arch)
    devices = visible_devices(config)
    check_batch_size(config, devices)
    root = resolve(config.data, Path(config.data_dir).expanduser(), download_bar())
    split = open_split(root, config.seed)
    return train_split(config, devices, split)


def train_split(config: Config, devices: Devices, split: Split) -> dict[str, Any]:
    "Train on a dataset that is known to be sound."
    from orchestrator.build import make_gang, make_job, make_plan
    from orchestrator.driver import train
    from orchestrator.run_folder import RunFolder
    from orchestrator.summary import conclude, default_name, report_configuration
    from orchestrator.terminal import Terminal
    from orchestrator.tracker import Tracker

    folder = RunFolder(config.runs, config.name or default_name(config))
    job, plan = make_job(config, split), make_plan(config, split)
    report_configuration(config, devices, split, plan, folder)
    tracker = Tracker(folder, Terminal())
    try:
        gang = make_gang(job, devices, config, folder)
        try:
            show_samples(gang, tracker, split)
            if config.lr == "auto":
                plan = dataclasses.replace(plan, lr=find_rate(plan, gang, tracker))
            row = train(plan, gang, tracker)
            save_model(gang, folder, job, split)
        finally:
            gang.close()
    finally:
        tracker.close()
    conclude(config, folder, row, len(tracker.bad_images))
    return row


def show_samples(gang: Gang, tracker: Tracker, split: Split) -> None:
    "Put training images into TensorBoard as the model sees them."
    from orchestrator.figures import image_grid

    images, targets = gang.call_first("samples", 32)
    if len(images):
        tracker.figure("train/samples", image_grid(images, [split.vocab.classes[target] for target in targets]))


def find_rate(plan: Plan, gang: Gang, tracker: Tracker) -> float:
    "The rate that the LR finder suggests, its curve in TensorBoard."
    from orchestrator.figures import lr_curve
    from orchestrator.lr_finder import range_test, suggestion

    test = range_test(plan, gang)
    found = suggestion(test)
    print(f"LR finder: {len(test.losses)} steps, suggestion {found:.3g}; training goes on at that rate\n", flush=True)
    tracker.figure("lr_finder", lr_curve(test.lrs, test.losses, test.smoothed, found))
    return found


def save_model(gang: Gang, folder: RunFolder, job: Job, split: Split) -> None:
    "Write the model and what prediction needs to know of it."
    about = {
        "arch": job.arch,
        "classes": split.vocab.classes,
        "channels": 3,
        "size": job.size,
        "presize": job.presize,
        "normalize": job.normalize.as_json(),
    }
    folder.write_model(gang.call_first("state"), about)


if __name__ == "__main__":
    sys.exit(main())
