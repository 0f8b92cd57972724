"python -m orchestrator.interpret: where a finished run's model errs, as pictures, tables and in TensorBoard."

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.command import command
from orchestrator.run_arguments import GANG, KEPT, positive, run_parser

DESCRIPTION = "Show where a finished run's model errs: confusion matrix, most confused classes, top losses, classes."
TOP = 24
FOLDER = "interpret"


def read(argv: Sequence[str], name: str) -> dict[str, Any]:
    "The command line, by name."
    parser = run_parser(name, DESCRIPTION, GANG)
    parser.add_argument("--top", metavar="N", type=positive, help=f"how many images and pairs to show (default: {TOP})")
    return parser.read(argv)


def run(arguments: dict[str, Any]) -> Path:
    "Measure, then write the pictures and tables; the folder that they are in."
    from learner.interpret import most_confused  # here, since --help needs no torch
    from orchestrator.examine import examine
    from orchestrator.findings import figures, tables
    from orchestrator.summary import tensorboard_command
    from orchestrator.tables import columns, pair_rows, write_csv
    from orchestrator.tracker import add_figures

    top = arguments.get("top", TOP)
    examined = examine(arguments, FOLDER)
    folder, pictures = examined.run.path / FOLDER, figures(examined, top)
    for name, rows in tables(examined).items():
        write_csv(folder / f"{name}.csv", rows)
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
    add_figures(examined.run.path, {f"{FOLDER}/{name}": figure for name, figure in pictures.items()})
    print(f"accuracy {examined.outcomes.rates()['accuracy']:.6f}; most often confused:\n")
    print(columns(pair_rows(examined.run.classes, most_confused(examined.confusion, 10))))
    examined.mention_bad()
    print(f"\nin {folder}: {', '.join(f'{name}.png and .csv' for name in pictures)}")
    print(f"look at it: {tensorboard_command()} --logdir {examined.run.path}")
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    "Run the command line."
    return command("interpret", run, argv, read, KEPT)


if __name__ == "__main__":
    sys.exit(main())
