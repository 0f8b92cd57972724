"""The workers against plain torch: nn.Module, torch's SGD, one process, a loop of its own over the same samples.

Only three things are taken from the code under test: the initial weights, the decoding of files, and for augmented
runs the random numbers; order, batches, averages, BatchNorm and updates are written out here.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cluster.gang import LocalGang
from cluster.messages import Job
from cluster.ray_gang import RayGang
from learner.data.augment import crop_flip, draws
from learner.data.files import Labelled
from learner.data.loader import Dataset, collate_readable
from learner.data.mix import MixConfig


class Net(nn.Module):
    "The chapter's network in torch's modules."

    def __init__(self, norm: bool) -> None:
        super().__init__()
        widths = [3, 16, 32, 64, 128]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1, bias=not norm) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) if norm else nn.Identity() for b in widths[1:])
        self.head = nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms):
            x = norm(conv(x)).relu()
        return self.head(x.mean((2, 3)))

    def by_our_names(self) -> dict[str, Tensor]:
        "The tensors under the names that they have in our model."
        names = {f"convs.{n}": f"{n}" for n in range(4)} | {f"norms.{n}": f"{n}.norm" for n in range(4)}
        names["head"] = "5"
        tensors = {key: value for key, value in self.state_dict().items() if "num_batches" not in key}
        return {f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": t for key, t in tensors.items()}


def readable(labelled: Labelled, numbers: Any) -> list[int]:
    "Those of the numbers whose file is an image."
    return [i for i in numbers if not labelled.files[i].endswith("bad.JPEG")]


def batch_of(job: Job, labelled: Labelled, numbers: list[int], random: Tensor | None) -> tuple[Tensor, Tensor]:
    "What the model sees of these samples."
    pixels = collate_readable(Dataset(labelled, job.presize), numbers).inputs
    margin = (job.presize - job.size) // 2
    pixels = (
        pixels[:, margin : margin + job.size, margin : margin + job.size]
        if random is None
        else crop_flip(pixels, random, job.size)
    )
    return (pixels.float() / 255 - 0.5).div(0.25).permute(0, 3, 1, 2), torch.tensor(labelled.targets)[numbers]


def plain_torch(job: Job, start: Mapping[str, np.ndarray], epochs: int) -> tuple[list[float], float, Net]:
    "The loss of each step, the validation's sum of losses after the last epoch, and the network."
    net = Net("bn" in job.arch)
    for name, tensor in net.by_our_names().items():
        tensor.copy_(torch.tensor(start[name]))
    flat = [p for p in net.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": [p for p in net.parameters() if p.dim() > 1]}, {"params": flat}]
    if job.decay_weights_only:
        groups[1]["weight_decay"] = 0.0
    optimizer = torch.optim.SGD(groups, 0.1, job.momentum or 0.0, weight_decay=job.weight_decay or 0.0)
    weight = torch.tensor(job.class_weights) if job.class_weights else None
    losses = []
    for epoch in range(epochs):
        net.train()
        order = np.random.default_rng([job.seed, epoch]).permutation(len(job.train)).tolist()
        for first in range(0, len(order), job.batch_size):
            here = order[first : first + job.batch_size]
            numbers = readable(job.train, here)
            rows = [here.index(i) for i in numbers]
            random = draws(job.seed, len(losses), len(here), 3)[rows] if job.presize > job.size else None
            x, y = batch_of(job, job.train, numbers, random)
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (1 + len(losses) % 5)
            logits, options = net(x), {"weight": weight, "label_smoothing": job.label_smoothing}
            loss = nn.functional.cross_entropy(logits, y, **options)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(nn.functional.cross_entropy(logits, y, reduction="sum", **options).item() / len(y))
    net.eval()
    with torch.no_grad():
        x, y = batch_of(job, job.valid, readable(job.valid, range(len(job.valid))), None)
        return losses, nn.functional.cross_entropy(net(x), y, reduction="sum").item(), net


def compare(gang: RayGang, drive: Callable[..., Any], job: Job, world_size: int) -> Any:
    "Train both for an epoch, and hold one against the other."
    gang.start(job, world_size)
    losses, valid, net = plain_torch(job, gang.call_first("state"), epochs=1)
    ours = drive(gang, job, epochs=1)
    np.testing.assert_allclose(ours.losses, losses, rtol=1e-4)
    np.testing.assert_allclose(ours.valid["loss"][0], valid, rtol=1e-4)
    for name, tensor in net.by_our_names().items():
        np.testing.assert_allclose(ours.states[0][name], tensor, rtol=1e-3, atol=2e-5, err_msg=name)
    return ours


@pytest.mark.parametrize(
    "recipe",
    [
        {"arch": "simple_cnn"},
        {"arch": "simple_cnn", "momentum": 0.9, "weight_decay": 1e-2, "augment": "crop", "presize": 27},
        {"arch": "simple_cnn_bn", "momentum": 0.9, "augment": "crop", "presize": 27},
        {
            "arch": "simple_cnn_bn",
            "class_weights": (0.02, 0.2, 2.0, 0.5),
            "label_smoothing": 0.1,
            "decay_weights_only": True,
            "weight_decay": 0.1,
        },
    ],
)
def test_two_workers_are_plain_torch(
    ray_gang: RayGang, drive: Callable[..., Any], job: Job, recipe: dict[str, Any]
) -> None:
    compare(ray_gang, drive, replace(job, **recipe), 2)


@pytest.fixture(scope="module")
def with_bad(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Job:
    "The job with four unreadable files among those to train on and two among the others, to be skipped."
    folder = tmp_path_factory.mktemp("bad")
    good = Path(job.train.files[0]).read_bytes()
    contents = {"empty": b"", "text": b"no image at all", "truncated": good[: len(good) // 2], "cut": good[:30]}
    for name, content in contents.items():
        (folder / f"{name}.bad.JPEG").write_bytes(content)
    bad = [str(folder / f"{name}.bad.JPEG") for name in contents]

    def mixed(labelled: Labelled, bad: list[str]) -> Labelled:
        files, targets = list(labelled.files), list(labelled.targets)
        for number, file in enumerate(bad):
            files.insert(7 * number, file)
            targets.insert(7 * number, 0)
        return Labelled(tuple(files), tuple(targets))

    return replace(job, train=mixed(job.train, bad), valid=mixed(job.valid, bad[:2]), skip_bad_images=True,
                   arch="simple_cnn_bn", augment="crop", presize=27)  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_skipped_images_are_as_if_they_were_not_there(
    ray_gang: RayGang, drive: Callable[..., Any], with_bad: Job, job: Job, world_size: int
) -> None:
    ours = compare(ray_gang, drive, with_bad, world_size)
    assert ours.trained["loss"][1] == len(job.train)
    assert ours.valid["loss"][1] == len(job.valid)
    named = [Path(file).name.split(".")[0] for file, _ in ours.bad]
    assert sorted(named) == sorted(["empty", "text", "truncated", "cut", "empty", "text"]), "each named by one rank"
    assert len(set(ours.prints)) == 1


@pytest.mark.parametrize("extra", [{"mix": MixConfig(mixup=0.4)}, {"accumulate": 3}], ids=["mixed", "accumulated"])
def test_skipped_images_change_nothing_between_one_worker_and_three(
    ray_gang: RayGang,
    local_gang: Callable[[Job], LocalGang],
    drive: Callable[..., Any],
    with_bad: Job,
    extra: dict[str, Any],
) -> None:
    mine = replace(with_bad, **extra)
    ray_gang.start(mine, 3)
    one, many = drive(local_gang(mine), mine, epochs=1), drive(ray_gang, mine, epochs=1)
    assert many.counts == one.counts and sorted(many.bad) == sorted(one.bad)
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-4)
    np.testing.assert_allclose(many.valid["loss"][0], one.valid["loss"][0], rtol=1e-4)
