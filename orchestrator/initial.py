"--init: the weights of a finished run as those that another starts from."

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from cluster.messages import Job
from learner.data.normalize import Normalize
from learner.errors import UsageError, UserError
from learner.groups import head_names
from learner.models import build
from learner.reading import expanded
from learner.resnet import load_torchvision
from orchestrator.loaded_run import LoadedRun

RESNETS = ("resnet18", "resnet34", "resnet50")
IMAGENET = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # what pictures were for those who trained there


def start_from(place: str, job: Job, classes: tuple[str, ...]) -> tuple[Job, str]:
    """The job with the weights of the run `place`, and a sentence on what is kept and what is new.

    The head (see `groups.body_and_head`) is new where the classes differ. Pictures are normalised as that run's
    were, since that is what its layers know. Raises UsageError where the run's model is another than the job's. A
    file is one of torchvision's or timm's weights for the job's ResNet, learnt on ImageNet.
    """
    if expanded(place).is_file():
        return from_imagenet(expanded(place), job)
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


def from_imagenet(file: Path, job: Job) -> tuple[Job, str]:
    "As `start_from`, from a safetensors file by the names that torchvision and timm give; its head is left out."
    if job.arch not in RESNETS:
        raise UsageError(f"--init {file}: its weights are for {', '.join(RESNETS)}, and --arch is {job.arch}")
    model = build(job.arch, job.channels, job.n_classes)
    try:
        load_torchvision(model, file, head=False)
    except (UserError, OSError, SafetensorError) as error:
        raise UsageError(f"--init {file} does not hold the weights of {job.arch}: {error}") from error
    head = head_names(model)
    kept = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name not in head}
    told = f"--init {file}: {sum(array.size for array in kept.values()):,} numbers of {job.arch} are kept"
    return replace(job, weights=kept, normalize=IMAGENET), f"{told}; its head ({', '.join(head)}) is new"
