"python -m orchestrator.launch: train a model, and say what came of it."

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from orchestrator.command import command
from orchestrator.config import Config


def run(config: Config) -> dict[str, Any]:
    """Train as `config` says, from the data to the model's file; the row of the epoch whose model was saved.

    Where no worker is left, all begin again at the newest checkpoint.
    """
    from cluster.faults import Failure, NoneLeft, verdict  # here, since --help and most mistakes need no torch
    from orchestrator.build import tolerance
    from orchestrator.fit import fit
    from orchestrator.session import open_session
    from orchestrator.summary import conclude

    seen: list[Failure] = []
    again = config
    while True:
        try:
            with open_session(again) as session:
                again = replace(config, resume=str(session.folder.path), autoresume=False)
                row = fit(session)
            break
        except NoneLeft as lost:
            if verdict(lost.failures, seen, tolerance(config)) is not None:
                raise
            seen += lost.failures
            print(f"{lost}\nno worker is left: all begin again at the newest checkpoint\n", file=sys.stderr, flush=True)
    conclude(config, session.folder, row, len(session.tracker.bad_images))
    return row


def main(argv: Sequence[str] | None = None) -> int:
    "Run the command line."
    return command("launch", run, argv)


if __name__ == "__main__":
    sys.exit(main())
