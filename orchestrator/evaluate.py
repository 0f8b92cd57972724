"python -m orchestrator.evaluate: a finished run's loss, accuracy and table of classes on its validation set or others."

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from orchestrator.command import UNCHANGED, command

DESCRIPTION = "Measure the model of a finished run, by default on the validation part of the data it was trained on."


def read(argv: Sequence[str], name: str) -> dict[str, Any]:
    "The command line, by name."
    from orchestrator.command_line import EXAMINE, run_parser

    return run_parser(name, DESCRIPTION, EXAMINE).read(argv)


def run(arguments: dict[str, Any]) -> dict[str, float]:
    "Measure and print; the numbers over all images."
    from orchestrator.examine import examine  # here, since --help needs no torch
    from orchestrator.findings import class_rows, columns

    examined = examine(arguments, "evaluate")
    rates = examined.outcomes.rates()
    print(columns(class_rows(examined.run.classes, examined.confusion)), end="\n\n")
    for name, value in rates.items():
        print(f"{name.replace('_5', '-5').replace('_', ' '):<16} {value:.6f}")
    examined.mention_bad()
    return rates


def main(argv: Sequence[str] | None = None) -> int:
    "Run the command line."
    return command("evaluate", run, argv, read, UNCHANGED)


if __name__ == "__main__":
    sys.exit(main())
