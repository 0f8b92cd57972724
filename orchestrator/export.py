"python -m orchestrator.export: a finished run's model as a torch.export program or an ONNX file, by torch's exporters."

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learner.errors import UsageError
from learner.reading import expanded
from orchestrator.command import UNCHANGED, command

DESCRIPTION = "Write a finished run's model as a file that runs without this package."
SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}


def read(argv: Sequence[str], name: str) -> dict[str, Any]:
    "The command line, by name."
    from orchestrator.command_line import run_parser

    parser = run_parser(name, DESCRIPTION)
    parser.add_argument(
        "--format",
        metavar="{torch,onnx}",
        help="a torch.export program (default), or ONNX, which needs onnx and onnxscript",
    )
    parser.add_argument("--output", metavar="FILE", help="the file to write (default: RUN/model.pt2 or RUN/model.onnx)")
    arguments = parser.read(argv)
    if arguments.setdefault("format", "torch") not in SUFFIXES:
        raise UsageError(f"--format {arguments['format']} is not possible: it must be one of {', '.join(SUFFIXES)}")
    return arguments


def run(arguments: dict[str, Any]) -> Path:
    "Export, and say what the file takes and gives; the file."
    from orchestrator.exporter import save_onnx, save_program  # here, since --help needs no torch
    from orchestrator.loaded_run import LoadedRun

    loaded = LoadedRun.open(arguments["run"])
    kind = arguments["format"]
    file = expanded(arguments.get("output", loaded.path / f"model{SUFFIXES[kind]}"))
    (save_onnx if kind == "onnx" else save_program)(loaded, file)
    side = loaded.size
    mean, std = (" ".join(f"{value:.4f}" for value in each) for each in (loaded.normalize.mean, loaded.normalize.std))
    print(f"{loaded}\n\nwritten to {file}")
    print(f"takes float32 (n, {loaded.channels}, {side}, {side}): pixels from 0 to 1, less mean {mean}, over std {std}")
    print(
        f"gives float32 (n, {len(loaded.classes)}): logits of the classes; {loaded.path / 'model.json'} has all in full"
    )
    return file


def main(argv: Sequence[str] | None = None) -> int:
    "Run the command line."
    return command("export", run, argv, read, UNCHANGED)


if __name__ == "__main__":
    sys.exit(main())
