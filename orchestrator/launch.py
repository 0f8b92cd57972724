"python -m orchestrator.launch: train a model, and say what came of it."

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from orchestrator.command import command
from orchestrator.config import Config


def run(config: Config) -> dict[str, Any]:
    "Train as `config` says, from the data to the model's file; the last epoch's row."
    from orchestrator.driver import train  # here, since torch is not needed for --help and for most mistakes
    from orchestrator.lr_finder import range_test, suggestion
    from orchestrator.session import open_session
    from orchestrator.summary import conclude

    with open_session(config) as session:
        session.show_samples()
        plan = session.plan
        if config.lr == "auto":
            test = range_test(plan, session.gang)
            rate = suggestion(test)
            print(
                f"LR finder: {len(test.losses)} steps, suggestion {rate:.3g}; training goes on at that rate\n",
                flush=True,
            )
            session.show_range_test(test, rate)
            plan = dataclasses.replace(plan, lr=rate)
        row = train(plan, session.gang, session.tracker)
        session.save_model()
    conclude(config, session.folder, row, len(session.tracker.bad_images))
    return row


def main(argv: Sequence[str] | None = None) -> int:
    "Run the command line."
    return command("launch", run, argv)


if __name__ == "__main__":
    sys.exit(main())
