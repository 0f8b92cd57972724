"Predictions: a finished run's model over image files, in this process, with what validation makes of a picture."

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.comms import Solo
from cluster.messages import Chunk
from cluster.shards import n_batches
from cluster.worker import Worker
from learner.cores import usable_cores
from learner.data.files import Labelled, image_files, printable_path
from learner.errors import UsageError
from learner.interpret import Outcomes
from orchestrator.examine import measuring_job
from orchestrator.loaded_run import LoadedRun

Ranking = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Prediction:
    "The likeliest classes of an image with their probabilities, the likeliest first; or why it can't be read."

    file: str
    classes: Ranking = ()
    reason: str = ""


def image_list(places: Sequence[str]) -> list[str]:
    "The files that are meant: each as named, of a folder all images in it; UsageError for a folder without any."
    files: list[str] = []
    for place in places:
        within = image_files(place) if Path(place).is_dir() else [printable_path(place)]
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
        for number in range(n_batches(len(files), batch_size)):
            report = worker.run(Chunk(False, 0, number, 0, ({},)))
            assert report.outcomes is not None
            known, bad = ranking(run, report.outcomes), dict(report.bad_images)
            for sample in range(len(files))[number * batch_size : (number + 1) * batch_size]:
                file = files[sample]
                yield Prediction(file, known[sample]) if sample in known else Prediction(file, reason=bad[file])
    finally:
        worker.close()


def ranking(run: LoadedRun, outcomes: Outcomes) -> dict[int, Ranking]:
    "By sample number, the names of the likeliest classes with their probabilities."
    rows = zip(outcomes.samples.tolist(), outcomes.ranked.tolist(), outcomes.probabilities.tolist())
    return {sample: tuple(zip((run.classes[one] for one in ranked), chances)) for sample, ranked, chances in rows}
