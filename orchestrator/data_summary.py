"python -m orchestrator.data_summary: what the data options make of a dataset, step by step, and a picture of a batch."

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from learner.reading import expanded
from orchestrator.command import command

if TYPE_CHECKING:
    from orchestrator.config import Config


def run(config: Config) -> Path:
    "Print what comes of each step for one sample and a batch; the file with the picture of the first batch."
    from learner.data.block import squash  # here, since --help and most mistakes need no torch
    from learner.data.walk import summary
    from learner.errors import UsageError, UserError
    from learner.figures import show_batch
    from orchestrator.build import first_images, open_data

    root, block = open_data(config)
    wrong: UserError | None = None
    try:
        split = block.open(root)
        images = first_images(config, split)
        channels = images.inputs.shape[-1]
    except UserError as error:
        channels, wrong = 3, error  # the walk mostly comes to what is wrong, and says which step it is
    walk = summary(dataclasses.replace(block, item_tfms=(squash(config.presize, channels),)), root)
    print(walk.done, flush=True)
    if walk.broken is not None:
        raise UsageError(": ".join(walk.broken))
    if wrong is not None:
        raise wrong
    file = expanded(config.runs) / f"{Path(root).resolve().name}-batch.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    show_batch((images.inputs, images.targets), split.vocab.classes).save(file)
    print(f"\npictures of the first batch with their labels: {file}")
    return file


def main(argv: Sequence[str] | None = None) -> int:
    "Run the command line."
    return command("data_summary", run, argv, kept="nothing was changed")


if __name__ == "__main__":
    sys.exit(main())
