"--init: the weights of a finished run as those that another starts from."

from __future__ import annotations

from dataclasses import replace

from cluster.messages import Job
from learner.errors import UsageError
from learner.groups import head_names
from orchestrator.loaded_run import LoadedRun


def start_from(place: str, job: Job, classes: tuple[str, ...]) -> tuple[Job, str]:
    """The job with the weights of the run `place`, and a sentence on what is kept and what is new.

    The head, which is the last linear layer, is new where the classes differ. Pictures are normalised as that run's
    were, since that is what its layers know. Raises UsageError where the run's model is another than the job's.
    """
    run = LoadedRun.open(place)
    for name in ("arch", "channels"):
        theirs, ours = getattr(run, name), getattr(job, name)
        if theirs != ours:
            raise UsageError(
                f"--init {place} was trained with {name} {theirs}, and this run has {ours}: its weights do not fit; "
                f"pass --{name} {theirs}, or start from another run"
            )
    model, arrays = run.model(), run.arrays()
    head = [] if run.classes == classes else head_names(model)
    kept = {name: array for name, array in arrays.items() if name not in head}
    told = f"--init {run.path}: {sum(array.size for array in kept.values()):,} numbers of its {run.arch} are kept"
    if head:
        told += f"; its head ({', '.join(head)}) is new, as the classes are: {len(classes)}, there {len(run.classes)}"
    return replace(job, weights=kept, normalize=run.normalize), told
