"What a run leaves that must not depend on what befell it: history, curves and weights, without what is in seconds."

import csv
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def history(run: Path) -> list[dict[str, str]]:
    "history.csv without the columns that are measured in seconds."
    with open(run / "history.csv") as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    "All points of all curves as TensorBoard reads them, but for those about speed."
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("speed/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def assert_same(run: Path, reference: Path) -> None:
    "Two run directories are the same, bit for bit."
    assert history(run) == history(reference)
    assert scalars(run) == scalars(reference)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (run, reference)]
    assert weights[0] == weights[1]
