"""One GPU: images/s of ours against an equal torch.nn model, from bytes to updated weights; how much of a step is not
kernels. How long it takes to the leaderboard's accuracy is for imagenette.py.

All have the pictures on the device, cropped and mirrored there, bf16, channels_last, SGD with momentum.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType

from benchmarks import torch_models
from benchmarks.timing import interleaved, quotients, shown
from cluster.gang import LocalGang
from cluster.messages import Chunk, Job
from learner.data.augment import crop_flip
from learner.data.feed import KeepingFeed
from learner.data.files import Labelled
from learner.data.normalize import Normalize
from learner.models import build

CLASSES = 10
CASES = (("simple_cnn", 128, 256, 100), ("xresnet50", 128, 128, 30))  # model, size, batch, steps a round: an epoch
ROUNDS, WARM_UP = 15, 10
AIM = (
    "The aim: no slower than the compiled torch.nn loop, data included, and the leaderboard's\n5-epoch accuracy within "
    "20 seconds of training on one H100 (imagenette.py)."
)
BASELINE = "torch.nn, torch.compile (CUDA graphs)"
Steps = Callable[[], float | None]  # may tell the seconds that count


def ours(folder: Path, device: str, arch: str, size: int, batch: int, steps: int, compile: str) -> Steps:
    "A worker's chunk, as the driver asks for it; the pictures are noise and on the device before."
    n = batch * steps
    labelled = Labelled(("none.jpg",) * n, tuple(i % CLASSES for i in range(n)))
    job = Job(
        train=labelled, valid=Labelled((), ()), n_classes=CLASSES, arch=arch, size=size, presize=size * 9 // 8,
        batch_size=batch, seed=1, normalize=Normalize((0.5,) * 3, (0.25,) * 3), augment="crop", sync_batchnorm=True,
        skip_bad_images=False, momentum=0.9, precision="bf16", compile=compile, on_device=True,
    )  # fmt: skip
    worker = LocalGang(job, device, folder).worker
    feed = worker.data.feed
    assert isinstance(feed, KeepingFeed)
    feed.pixels.random_(256)
    feed.kept.fill_(True)
    at = 0

    def run() -> None:
        nonlocal at
        report = worker.run(Chunk(True, at, 0, at * steps, ({"lr": 1e-3},) * steps))
        assert not report.notes, report.notes
        at += 1

    return run


def theirs(device: str, arch: str, size: int, batch: int, steps: int, mode: str | None) -> Steps:
    "The loop that one would write: torch.nn, torch.optim fused, `mode` of torch.compile (none: without)."
    net: Any = getattr(torch_models, arch)().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, 0.9, fused=True)
    forward = net if mode is None else torch.compile(net, mode=mode)
    batches = fast_batches(device, size, batch, batch * steps)

    def run() -> None:
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()  # as ours does, and who has once done so must go on with it
            x, y = batches()
            with torch.autocast(device, torch.bfloat16):
                loss = F.cross_entropy(forward(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def fast_batches(device: str, size: int, batch: int, n: int) -> Callable[[], tuple[Tensor, Tensor]]:
    "Random batches of `n` pictures of noise that are on the device, cropped, mirrored and normalised there."
    side = size * 9 // 8
    pictures = torch.randint(256, (n, side, side, 3), dtype=torch.uint8, device=device)
    targets = torch.arange(n, device=device) % CLASSES

    def draw() -> tuple[Tensor, Tensor]:
        rows = torch.randint(n, (batch,), device=device)
        cropped = crop_flip(pictures[rows], torch.rand(batch, 3, device=device), size)
        return cropped.float().div_(127.5).sub_(1).permute(0, 3, 1, 2), targets[rows]

    return draw


def lightning(device: str, arch: str, size: int, batch: int, steps: int) -> Steps:
    "Lightning's Trainer over the same batches, as its documentation has it; what counts is the steps within a fit."
    import lightning as L

    class Classifier(L.LightningModule):
        "The model and its loss."

        def __init__(self) -> None:
            super().__init__()
            self.net: Any = getattr(torch_models, arch)().to(memory_format=torch.channels_last)

        def training_step(self, item: Any, number: int) -> Tensor:
            "The loss."
            x, y = draw()
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> Any:
            "SGD with momentum."
            return torch.optim.SGD(self.parameters(), 1e-3, 0.9, fused=True)

    class Stopwatch(L.Callback):
        "Seconds of the steps behind the first `WARM_UP`: setting up a fit and moving the model are no part of a step."

        def on_train_batch_start(self, trainer: Any, module: Any, item: Any, number: int) -> None:
            "Begin to count."
            if number == WARM_UP:
                wait_for(device)
                self.started = time.perf_counter()

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            "All is done."
            wait_for(device)
            self.seconds = time.perf_counter() - self.started

    draw, model = fast_batches(device, size, batch, batch * steps), Classifier()
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    accelerator = "gpu" if device == "cuda" else "cpu"

    def run() -> float:
        watch = Stopwatch()
        trainer = L.Trainer(
            accelerator=accelerator, devices=1, precision="bf16-mixed", max_epochs=1, callbacks=[watch], **quiet
        )
        loader: Any = torch.utils.data.DataLoader(range(WARM_UP + steps), batch_size=None)  # type: ignore[arg-type]
        with patch.object(torch.cuda, "empty_cache"):  # or who comes next has to ask the GPU for all memory anew
            trainer.fit(model, loader)
        return watch.seconds

    return run


def wait_for(device: str) -> None:
    "Until the device is done."
    if device == "cuda":
        torch.cuda.synchronize()


def awaited(run: Steps, device: str) -> Steps:
    "`run`, and until the device is done."

    def both() -> float | None:
        seconds = run()
        wait_for(device)
        return seconds

    return both


def not_kernels(run: Steps, seconds: float) -> str:
    """The share of the `seconds` that `run` takes unwatched in which the GPU does nothing, by torch's profiler.

    Unknown where not all counts.
    """
    from torch.profiler import ProfilerActivity, profile

    if run() is not None:
        return "?"
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    events = [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]  # others launch them
    busy = covered((event.time_range.start, event.time_range.end) for event in events if not event.is_user_annotation)
    return f"{max(0.0, 1 - busy / 1e6 / seconds):.0%}"


def covered(spans: Iterable[tuple[float, float]]) -> float:
    "How much is in any of these spans, which may overlap."
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def contest(device: str, arch: str, size: int, batch: int, steps: int, rounds: int = ROUNDS) -> list[str]:
    "A row for each alternative."
    case = arch, size, batch, steps
    with tempfile.TemporaryDirectory() as logs:
        alternatives: dict[str, Steps] = {
            "ours": ours(Path(logs), device, *case, compile="on"),
            "ours, --compile off": ours(Path(logs), device, *case, compile="off"),
            "torch.nn": theirs(device, *case, mode=None),
            "torch.nn, torch.compile": theirs(device, *case, mode="default"),
            BASELINE: theirs(device, *case, mode="reduce-overhead"),
        }
        if importlib.util.find_spec("lightning"):
            alternatives["Lightning"] = lightning(device, *case)
        alternatives = {name: awaited(run, device) for name, run in alternatives.items()}
        for run in alternatives.values():
            run()  # compiles
        seconds = interleaved(alternatives, rounds)
        rows = []
        for name, times in seconds.items():
            middle = median(times)
            idle = not_kernels(alternatives[name], middle) if device == "cuda" else "?"
            ratio = shown(quotients(seconds, name, BASELINE))
            rows.append(f"| {arch} | {name} | {batch * steps / middle:,.0f} | {ratio} | {idle} |")
            print(rows[-1], flush=True)  # a lent GPU is gone when the time is up
    return rows


def run() -> str:
    "Tables; without a GPU, a sentence that says so."
    if not torch.cuda.is_available():
        return f"There is no GPU here: nothing was measured. {AIM}"
    rows = [row for case in CASES for row in contest("cuda", *case)]
    cases = "; ".join(f"{arch}: {size} px, batches of {batch}, {steps} steps" for arch, size, batch, steps in CASES)
    count = {arch: sum(p.numel() for p in build(arch, 3, CLASSES).parameters()) / 1e6 for arch, *_ in CASES}
    return f"""\
{cases}; {ROUNDS} rounds, interleaved. Parameters: {", ".join(f"{arch} {n:.1f} M" for arch, n in count.items())}.
Medians (quartiles) of the time over that of {BASELINE}. {AIM}

| model | alternative | images/s | time over theirs | share of the time without a kernel |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}
"""
