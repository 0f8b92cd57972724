"python -m orchestrator.interpret: where a finished run's model errs, as pictures, tables and in TensorBoard."

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learner.errors import UsageError
from orchestrator.command import UNCHANGED, command

DESCRIPTION = "Show where a finished run's model errs: confusion matrix, most confused classes, top losses, classes."
TOP, MOST = 24, 120
FOLDER = "interpret"


def read(argv: Sequence[str], name: str) -> dict[str, Any]:
    "The command line, by name."
    from orchestrator.command_line import EXAMINE, positive, run_parser

    parser = run_parser(name, DESCRIPTION, EXAMINE)
    text = f"how many images and pairs the pictures show (default: {TOP}, at most {MOST})"
    parser.add_argument("--top", metavar="N", type=positive, help=text)
    arguments = parser.read(argv)
    if arguments.setdefault("top", TOP) > MOST:
        raise UsageError(f"--top {arguments['top']} is more than a picture holds, {MOST}; the tables have all")
    return arguments


def run(arguments: dict[str, Any]) -> Path:
    "Measure, then write the pictures and tables; the folder that they are in."
    from learner.interpret import most_confused  # here, since --help needs no torch
    from orchestrator.board import add_pictures
    from orchestrator.examine import examine
    from orchestrator.findings import columns, pair_rows, pictures, tables, write_csv
    from orchestrator.summary import tensorboard_command

    examined = examine(arguments, FOLDER)
    folder, shown = examined.run.path / FOLDER, pictures(examined, arguments["top"])
    for name, rows in tables(examined).items():
        write_csv(folder / f"{name}.csv", rows)
    for name, picture in shown.items():
        picture.save(folder / f"{name}.png")
    add_pictures(examined.run.path, {f"{FOLDER}/{name}": picture for name, picture in shown.items()})
    print(f"accuracy {examined.outcomes.rates()['accuracy']:.6f}; most often confused:\n")
    print(columns(pair_rows(examined.run.classes, most_confused(examined.confusion, 10))))
    examined.mention_bad()
    print(f"\nin {folder}: {', '.join(f'{name}.png and .csv' for name in shown)}")
    print(f"look at it: {tensorboard_command(examined.run.path)}")
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    "Run the command line."
    return command("interpret", run, argv, read, UNCHANGED)


if __name__ == "__main__":
    sys.exit(main())
