"python -m orchestrator.find_lr: the learning-rate range test alone, with its curve as PNG, CSV and in TensorBoard."

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from orchestrator.command import command

if TYPE_CHECKING:
    from orchestrator.config import Config


def run(config: Config) -> dict[str, float | None]:
    "Test rates on the data, model and workers of `config`; what each rule suggests."
    from learner.errors import UsageError
    from learner.figures import lr_curve
    from learner.lr_range import suggest
    from orchestrator.range_test import suggestion
    from orchestrator.run_folder import LR_CURVE
    from orchestrator.session import open_session

    if config.resume is not None:
        raise UsageError(
            f"--resume {config.resume}: a range test goes on with no run, and changes none; --init RUN begins with "
            "that run's weights"
        )
    with open_session(replace(config, autoresume=False)) as session:
        (session.folder.path / LR_CURVE).touch()  # whatever becomes of it, there is no run to go on with
        test = session.range_test()
        best, found = suggestion(test), suggest(test)
        session.show_range_test(test, best)
        folder = session.folder.path
    lr_curve(test.lrs, test.losses, test.smoothed, best).save(folder / "lr_finder.png")
    with open(folder / LR_CURVE, "w") as file:
        csv.writer(file).writerows([("lr", "loss", "smoothed"), *zip(test.lrs, test.losses, test.smoothed)])
    for name, rate in found.items():
        print(f"{name:<10} {'none' if rate is None else f'{rate:.3g}'}")
    print(f"\nthe curve: {folder / 'lr_finder.png'} and {LR_CURVE} beside it; train with --lr {best:.3g}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    "Run the command line."
    return command("find_lr", run, argv, kept="no rate was found")


if __name__ == "__main__":
    sys.exit(main())
