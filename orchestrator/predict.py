"python -m orchestrator.predict: what a finished run's model says of images, in one process."

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from learner.errors import UserError
from orchestrator.command import UNCHANGED, command

DESCRIPTION = "Say what images show: their likeliest classes, each with its probability."
TOP, BATCH = 3, 64


def read(argv: Sequence[str], name: str) -> dict[str, Any]:
    "The command line, by name."
    from orchestrator.command_line import positive, run_parser

    parser = run_parser(name, DESCRIPTION)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="an image, or a folder of images")
    parser.add_argument(
        "--top", metavar="N", type=positive, help=f"how many classes to show (default: {TOP}, in JSON all)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON array with an object for each image")
    parser.add_argument("--batch-size", metavar="N", type=positive, help=f"images at once (default: {BATCH})")
    return parser.read(argv)


def run(arguments: dict[str, Any]) -> None:
    "Predict and print, image by image; UserError at the end names those that could not be read."
    from orchestrator.loaded_run import LoadedRun  # here, since --help needs no torch
    from orchestrator.predictions import Prediction, image_list, predictions

    loaded = LoadedRun.open(arguments["run"])
    files = image_list(arguments["images"])
    as_json = "json" in arguments
    top = arguments.get("top", len(loaded.classes) if as_json else TOP)
    print(loaded, file=sys.stderr, flush=True)
    width = max(map(len, files))
    found: list[Prediction] = []
    for prediction in predictions(loaded, files, top, arguments.get("batch_size", BATCH)):
        found.append(prediction)
        if not as_json and not prediction.reason:
            print(f"{prediction.file:<{width}}  {line(prediction.classes)}", flush=True)
    if as_json:
        print(json.dumps([entry(prediction) for prediction in found], indent=1))
    if bad := [f"{one.file}: {one.reason}" for one in found if one.reason]:
        raise UserError(f"{len(bad)} of {len(files)} images could not be read:\n" + "\n".join(bad))


def line(classes: Sequence[tuple[str, float]]) -> str:
    "Classes and their probabilities, for people."
    return "  ".join(f"{name} {probability:.4f}" for name, probability in classes)


def entry(prediction: Any) -> dict[str, Any]:
    "A prediction for programs; a probability that is no number is null."
    if prediction.reason:
        return {"file": prediction.file, "error": prediction.reason}
    numbers = {name: value if math.isfinite(value) else None for name, value in prediction.classes}
    label = prediction.classes[0][0]
    return {"file": prediction.file, "label": label, "probability": numbers[label], "probabilities": numbers}


def main(argv: Sequence[str] | None = None) -> int:
    "Run the command line."
    return command("predict", run, argv, read, UNCHANGED)


if __name__ == "__main__":
    sys.exit(main())
