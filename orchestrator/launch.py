"python -m orchestrator.launch: train a model, and say what came of it."

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from orchestrator.command import command
from orchestrator.config import Config


def run(config: Config) -> dict[str, Any]:
    "Train as `config` says, from the data to the model's file; the row of the epoch whose model was saved."
    from orchestrator.fit import fit  # here, since --help and most mistakes need no torch
    from orchestrator.session import open_session
    from orchestrator.summary import conclude

    with open_session(config) as session:
        row = fit(session)
    conclude(config, session.folder, row, len(session.tracker.bad_images))
    return row


def main(argv: Sequence[str] | None = None) -> int:
    "Run the command line."
    return command("launch", run, argv)


if __name__ == "__main__":
    sys.exit(main())
