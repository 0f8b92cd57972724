"python -m orchestrator.launch: train a model, and say what came of it."

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from orchestrator.command import command, leave
from orchestrator.stop import signals_as_before
from orchestrator.terminal import enduring_output

if TYPE_CHECKING:
    from orchestrator.config import Config


@signals_as_before()
def run(config: Config) -> dict[str, Any]:
    """Train as `config` says, from the data to the model's file; the row of the epoch whose model was saved.

    Where no worker is left, all begin again at the newest checkpoint.
    """
    from cluster.faults import Incident, NoneLeft, not_finite, verdict  # here: --help and most mistakes need no torch
    from learner.errors import UserError
    from orchestrator.build import tolerance
    from orchestrator.fit import fit
    from orchestrator.session import open_session
    from orchestrator.summary import conclude

    seen, rollbacks = list[Incident](), 0
    begun, what = config, ""
    while True:
        try:
            with open_session(begun, again=begun is not config) as session:
                begun = replace(config, resume=str(session.folder.path), autoresume=True)  # whatever is left of it
                if what:
                    session.tracker.log_fault(what)
                row = fit(session)
            break
        except UserError as error:
            reason = verdict(error.failures, seen, tolerance(config)) if isinstance(error, NoneLeft) else ""
            if config.on_nan == "rollback" and not_finite(error) and rollbacks < config.max_restarts:
                rollbacks, what = rollbacks + 1, "back to the last checkpoint, at half the rate"
            elif isinstance(error, NoneLeft) and reason is None:
                seen, what = [*seen, error.failures], "no worker is left: all begin again at the newest checkpoint"
            else:
                if reason:
                    error.add_note(reason)
                raise
            print(f"{error}\n{what}\n", file=sys.stderr, flush=True)
    conclude(config, session.folder, row, len(session.tracker.bad_images))
    return row


def main(argv: Sequence[str] | None = None) -> int:
    "Run the command line."
    with enduring_output():
        return command("launch", run, argv)


if __name__ == "__main__":
    leave(main())
