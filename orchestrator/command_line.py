"The command line and the TOML file, read into a Config."

from __future__ import annotations

import argparse
import dataclasses
import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from learner.errors import UsageError
from orchestrator.config import Config, flag

EPILOG = """\
examples:
  python -m orchestrator.launch --gpus 4                      Imagenette, 4 workers, one GPU each
  python -m orchestrator.launch --cpus 2 --data shapes        the same machinery without a GPU
  python -m orchestrator.launch --local --data DIR            one process, no Ray: the debugger works
  python -m orchestrator.launch --gpus 16 --address HOST:PORT join an existing Ray cluster
  python -m orchestrator.launch --lr auto --epochs 8          find the rate first, across all workers
  python -m orchestrator.find_lr --cpus 2 --data shapes       only find it: the curve, and four suggestions
  tensorboard --logdir runs                                   look at all runs
"""


class Parser(argparse.ArgumentParser):
    "An ArgumentParser whose errors are one sentence."

    def error(self, message: str) -> NoReturn:
        "Raise UsageError instead of printing the whole usage."
        raise UsageError(message)


def parse(argv: Sequence[str], command: str = "launch") -> Config:
    """The Config of a command line; flags win over the file that `--config` names.

    Raises UsageError for what can't be read; exits by itself for --help.
    """
    parser = build_parser(command)
    given, unknown = parser.parse_known_args([_dashed(arg) for arg in argv])
    if unknown:
        raise UsageError(_unknown(unknown[0], [flag(name) for name in _fields()] + ["--config", "--help"]))
    values = vars(given)
    file = values.pop("config", None)
    return Config(**{**(read_file(file) if file else {}), **values})


def build_parser(command: str) -> Parser:
    "A parser with a flag for each field of Config; a flag that is not given leaves no trace."
    parser = Parser(
        prog=f"python -m orchestrator.{command}",
        description="Train an image classifier on GPUs or CPUs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.toml", help="read options from a TOML file; flags win over it")
    groups: dict[str, Any] = {}
    for one in dataclasses.fields(Config):
        title = one.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(flag(one.name), dest=one.name, **_argument(one))
    return parser


def _fields() -> dict[str, dataclasses.Field]:
    return {one.name: one for one in dataclasses.fields(Config)}


def _argument(one: dataclasses.Field) -> dict[str, Any]:
    text = one.metadata["help"]
    if one.type == "bool":
        action = argparse.BooleanOptionalAction if one.default else "store_true"
        return {"action": action, "help": text + (" (default: on)" if one.default else "")}
    shown = "" if one.default is None else f" (default: {one.default})"
    kind = {"int": whole, "int | None": whole, "float": number, "float | None": number, "float | str": rate}.get(
        str(one.type), str
    )
    choices = one.metadata["choices"]
    metavar = "{" + ",".join(choices) + "}" if choices else one.metadata["metavar"] or one.name.upper()
    return {"type": kind, "metavar": metavar, "help": text + shown}


def whole(text: str) -> int:
    "A whole number."
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def number(text: str) -> float:
    "A number."
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def rate(text: str) -> float | str:
    "A number, or auto."
    return text if text == "auto" else number(text)


def _dashed(arg: str) -> str:
    "`--batch_size=64` as `--batch-size=64`."
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name.split("=")[0], known, 1)
    return f"{name} is unknown" + (f"; did you mean {close[0]}?" if close else "; --help lists all options")


def read_file(file: str) -> dict[str, Any]:
    "The options in a TOML file, with dashes or underscores; UsageError if it can't be read or names an unknown one."
    try:
        entries = tomllib.loads(Path(file).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--config {file} can't be read: {reason}") from error
    values = {name.replace("-", "_"): value for name, value in entries.items()}
    for name in values:
        if name not in _fields():
            raise UsageError(f"--config {file}: " + _unknown(name, list(_fields())))
    return values
