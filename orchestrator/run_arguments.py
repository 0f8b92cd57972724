"The command lines of what works on a finished run: RUN, then some of launch's options, whose defaults are the run's."

from __future__ import annotations

import argparse
from collections.abc import Collection

from orchestrator.command_line import Parser, whole

KEPT = "the run's files are as they were"
DATA = ("data", "data_dir", "split", "label_regex", "labels_csv", "bad_images")
GANG = (*DATA, "batch_size", "gpus", "cpus", "local", "address", "backend")
TEXTS = {
    "data": "measure on this instead of the run's own data: on its validation part, or all of it where it has no parts",
    "split": "measure on what validates by this split, instead of the run's",
    "data_dir": "where downloaded and generated datasets are kept (default: where the run kept them)",
    "bad_images": "what to do at an unreadable image (default: what the run did)",
    "batch_size": "images at once, over all workers (default: the run's)",
    "cpus": "work with N CPU workers instead, or a range (2:8)",
}


def run_parser(command: str, description: str, options: Collection[str] = ()) -> Parser:
    "A parser of RUN and of these fields of Config; a flag that is not given leaves no trace."
    parser = Parser(
        prog=f"python -m orchestrator.{command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    text = "a run directory, runs/NAME/version_N, or runs/NAME: its newest version that has a model"
    parser.add_argument("run", metavar="RUN", help=text)
    parser.add_fields([*options, "debug"], TEXTS)
    return parser


def positive(text: str) -> int:
    "A whole number, 1 or more."
    number = whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number
