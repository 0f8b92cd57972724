"The command lines: options and a TOML file read into a Config, or RUN and what is asked of a finished run."

from __future__ import annotations

import argparse
import dataclasses
import difflib
import tomllib
from collections.abc import Collection, Mapping, Sequence
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

FILE_LIMIT = 2**16  # bytes
DESCRIPTIONS = {
    "launch": "Train an image classifier on GPUs or CPUs.",
    "find_lr": "Find a learning rate for what launch would train with the same options, and train nothing.\n"
    "Options of when to stop or save have no effect.",
    "data_summary": "Walk one image through what launch would do with the same data options, step by step.\n"
    "It takes any command line of launch's, and heeds --seed, --batch-size, --runs and what finds or reads images.",
}

EXAMINE = (  # options of what measures a finished run; their defaults are the run's
    "data", "data_dir", "split", "label_regex", "labels_csv", "bad_images", "batch_size",
    "gpus", "cpus", "local", "address", "backend",
)  # fmt: skip
EXAMINE_TEXTS = {
    "data": "measure on this instead of the run's own data: on its validation part, or all of it where it has no parts",
    "split": "measure on what validates by this split, instead of the run's",
    "data_dir": "where downloaded and generated datasets are kept (default: where the run kept them)",
    "bad_images": "what to do at an unreadable image (default: what the run did)",
    "batch_size": "images at once, over all workers (default: the run's)",
    "cpus": "work with N CPU workers instead, or a range (2:8)",
}


class Parser(argparse.ArgumentParser):
    "Reads the options of `python -m orchestrator.COMMAND`: errors are one sentence, what is not given leaves no trace."

    def __init__(self, command: str, description: str, epilog: str | None = None) -> None:
        super().__init__(
            prog=f"python -m orchestrator.{command}",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        "Raise UsageError instead of printing the whole usage."
        raise UsageError(message)

    def add_fields(self, names: Collection[str], texts: Mapping[str, str] | None = None) -> None:
        "Add a flag for each of these fields of Config; `texts` replace what --help says of some."
        groups: dict[str, Any] = {}
        for one in dataclasses.fields(Config):
            if one.name in names:
                title = one.metadata["group"]
                if title not in groups:
                    groups[title] = self.add_argument_group(title)
                groups[title].add_argument(flag(one.name), dest=one.name, **_argument(one, (texts or {}).get(one.name)))

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        "What was given by name; flags may have underscores. UsageError for what is unknown."
        given, unknown = self.parse_known_intermixed_args([_dashed(arg) for arg in argv])
        if unknown:
            raise UsageError(_unknown(unknown[0], [name for name in self._option_string_actions if name[:2] == "--"]))
        return vars(given)


def parse(argv: Sequence[str], command: str = "launch") -> Config:
    """The Config of a command line; flags win over the file that `--config` names.

    Raises UsageError for what can't be read; exits by itself for --help.
    """
    values = build_parser(command).read(argv)
    file = values.pop("config", None)
    return Config(**{**(read_file(file) if file else {}), **values})


def build_parser(command: str) -> Parser:
    "A parser with a flag for each field of Config; a flag that is not given leaves no trace."
    parser = Parser(command, DESCRIPTIONS[command], EPILOG if command == "launch" else None)
    parser.usage = "%(prog)s [options]"  # argparse's own would list all of them, and then again
    parser.add_argument("--config", metavar="FILE.toml", help="read options from a TOML file; flags win over it")
    parser.add_fields(_fields())
    return parser


def run_parser(command: str, description: str, options: Collection[str] = ()) -> Parser:
    "A parser of RUN and of these fields of Config; a flag that is not given leaves no trace."
    parser = Parser(command, description)
    text = "a run directory, runs/NAME/version_N, or runs/NAME: its newest version that has a model"
    parser.add_argument("run", metavar="RUN", help=text)
    parser.add_fields([*options, "debug"], EXAMINE_TEXTS)
    return parser


def _fields() -> dict[str, dataclasses.Field]:
    return {one.name: one for one in dataclasses.fields(Config)}


def _argument(one: dataclasses.Field, text: str | None) -> dict[str, Any]:
    "What argparse wants to know of a field; `text` stands for its help and its default."
    shown = "" if one.default is None or text else f" (default: {one.default})"
    text = text or one.metadata["help"]
    if one.type == "bool":
        action = argparse.BooleanOptionalAction if one.default else "store_true"
        return {"action": action, "help": text + (" (default: on)" if one.default else "")}
    kind = READERS.get(str(one.type), str)
    choices = one.metadata["choices"]
    metavar = "{" + ",".join(choices) + "}" if choices else one.metadata["metavar"] or one.name.upper()
    alone = {"nargs": "?", "const": choices[1]} if one.name == "augment" else {}
    return {"type": kind, "metavar": metavar, "help": text + shown, **alone}


def whole(text: str) -> int:
    "A whole number."
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def positive(text: str) -> int:
    "A whole number, 1 or more."
    number = whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def number(text: str) -> float:
    "A number."
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def rate(text: str) -> float | str:
    "A number, auto or own."
    return text if text in ("auto", "own") else number(text)


def whole_or_word(text: str) -> int | str:
    "A whole number, or else a word for Config to judge."
    return int(text) if text.isdecimal() else text


READERS = {
    "int": whole,
    "int | None": whole,
    "int | str": whole_or_word,
    "int | str | None": whole_or_word,
    "float": number,
    "float | None": number,
    "float | str": rate,
}


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
        with open(file, "rb") as stream:
            content = stream.read(FILE_LIMIT + 1)
        if len(content) > FILE_LIMIT:
            raise ValueError(f"it is longer than {FILE_LIMIT:,} bytes")
        entries = tomllib.loads(content.decode())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--config {file} can't be read: {reason}") from error
    values = {name.replace("-", "_"): value for name, value in entries.items()}
    if twice := [name for name in entries if name.replace("-", "_") != name and name.replace("-", "_") in entries]:
        raise UsageError(f"--config {file} has both {twice[0]} and {twice[0].replace('-', '_')}: drop one of the two")
    for name in values:
        if name not in _fields():
            raise UsageError(f"--config {file}: " + _unknown(name, list(_fields())))
    if type(values.get("gpus")) is int:  # a count, as TOML writes it
        values["gpus"] = str(values["gpus"])
    return values
