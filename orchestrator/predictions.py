"Predictions: a finished run's model over image files, in this process, with what validation makes of a picture."

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.comms import Solo
from cluster.messages import Chunk
from cluster.worker import Worker
from learner.data.files import Labelled, image_files
from learner.data.loader import usable_cores
from learner.errors import UsageError
from orchestrator.loaded_run import LoadedRun
from orchestrator.measure import measuring_job


@dataclass(frozen=True)
class Prediction:
    "The likeliest classes of an image with their probabilities, the likeliest first; or why it can't be read."

    file: str
    classes: tuple[tuple[str, float], ...] = ()
    reason: str = ""


def image_list(places: Sequence[str]) -> list[str]:
    "The files that are meant: each as named, of a folder all images in it; UsageError for a folder without any."
    files: list[str] = []
    for place in places:
        within = image_files(place) if Path(place).is_dir() else [place]
        if not within:
            raise UsageError(f"{place} has no images; name image files, or a folder that has some")
        files += within
    return files


def predictions(run: LoadedRun, files: Sequence[str], top: int, batch_size: int) -> Iterator[Prediction]:
    "The `top` likeliest classes of each file, in order, as they are computed; on the GPU if there is one."
    labelled = Labelled(tuple(files), (0,) * len(files))
    job = measuring_job(run, labelled, batch_size, top, "fp32", skip_bad=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    worker = Worker(job, Solo(), device, usable_cores())
    try:
        for number, first in enumerate(range(0, len(files), batch_size)):
            report = worker.run(Chunk(False, 0, number, 0, ({},)))
            assert report.outcomes is not None
            rows = zip(
                *(
                    column.tolist()
                    for column in (report.outcomes.samples, report.outcomes.ranked, report.outcomes.probabilities)
                )
            )
            known = {
                sample: Prediction(files[sample], tuple(zip((run.classes[c] for c in ranked), chances)))
                for sample, ranked, chances in rows
            }
            reasons = dict(report.bad_images)
            for sample in range(first, min(first + batch_size, len(files))):
                yield known.get(sample) or Prediction(files[sample], reason=reasons[files[sample]])
    finally:
        worker.close()
