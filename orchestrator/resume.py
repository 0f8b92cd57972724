"Resuming: finding the run that is to go on, and where it stood, as JSON beside a checkpoint's tensors."

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.checkpoint import Checkpoint, Checkpoints
from learner.errors import UsageError, UserError
from orchestrator.config import Config, flag
from orchestrator.driver import Place
from orchestrator.run_folder import newest_version
from orchestrator.tally import Tally

CHECKPOINTS = "checkpoints"
FREE = {"gpus", "cpus", "local", "address", "backend", "runs", "name", "data_dir", "cache", "debug"}
FREE |= {
    "resume",
    "autoresume",
    "keep",
    "max_restarts",
    "min_workers",
    "wait_for_workers",
    "spares",
    "hang_after",
    "on_nan",
}


@dataclass(frozen=True)
class Standing:
    "Where a run stands: its place in time, the rows of the epochs that are done, and the peak rate."

    place: Place = field(default_factory=Place)
    rows: tuple[dict[str, Any], ...] = ()
    lr: float | None = None

    def as_json(self) -> dict[str, Any]:
        "For a checkpoint's meta.json."
        tally = self.place.tally.as_json() if self.place.tally else None
        return {"epoch": self.place.epoch, "batch": self.place.batch, "tally": tally, "rows": self.rows, "lr": self.lr}

    @classmethod
    def of_json(cls, meta: Mapping[str, Any]) -> Standing:
        "What `as_json` wrote; UserError where it did not."
        try:
            tally = Tally.of_json(meta["tally"]) if meta["tally"] else None
            place = Place(int(meta["epoch"]), int(meta["batch"]), tally)
            return cls(place, tuple(dict(row) for row in meta["rows"]), float(meta["lr"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"a checkpoint does not say where the run stood: {error!r}") from error


def find_run(config: Config, parent: Path) -> Path | None:
    """The run directory that `--resume` or `--autoresume` means, None where a new run is to begin.

    Raises UsageError where there is none to resume, or where it was asked for other things than now.
    """
    if config.resume is None and not config.autoresume:
        return None
    found = newest_version(parent) if config.resume in (None, "last") else Path(str(config.resume)).expanduser()
    if found is None or not (found / "config.json").is_file():
        if config.autoresume:
            return None
        place = found or parent
        raise UsageError(f"--resume {config.resume}: there is no run in {place}; leave the flag out to begin one")
    _refuse_changes(config, found)
    return found


def _refuse_changes(config: Config, run: Path) -> None:
    try:
        before = json.loads((run / "config.json").read_bytes())
        changed = [name for name in dataclasses.asdict(config) if name not in FREE and name in before
                   and before[name] != getattr(config, name)]  # fmt: skip
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"{run / 'config.json'} can't be read: {error}") from error
    if changed:
        name = changed[0]
        raise UsageError(
            f"{run} was begun with {flag(name)} {before[name]}, not {getattr(config, name)}; resume it with the same "
            "options, or leave --resume out to begin anew"
        )


def newest_checkpoint(run: Path, keep: int) -> Checkpoint | None:
    "The newest sound checkpoint of a run, saying which ones are not."
    found, broken = Checkpoints(run / CHECKPOINTS, keep).newest()
    for sentence in broken:
        print(f"warning: {sentence}", flush=True)
    return found
