"From a configuration to what it describes: the devices, the job of the workers, the plan, the gang."

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from cluster.faults import Tolerance
from cluster.gang import Gang, LocalGang
from cluster.messages import Job
from cluster.worker import refuse_bad
from learner.data.block import DataBlock, make_block
from learner.data.files import Split
from learner.data.images import is_grey
from learner.data.loader import Dataset, Readable, collate_readable, epoch_order
from learner.data.mix import MixConfig
from learner.data.normalize import Normalize
from learner.data.sources import resolve
from learner.data.store import Store, prune, store_bytes, store_name
from learner.data.warp import AugmentConfig
from learner.errors import UsageError, UserError
from learner.losses import balanced
from learner.reading import expanded
from orchestrator.config import Config
from orchestrator.devices import Devices, choose
from orchestrator.driver import Plan
from orchestrator.terminal import download_bar

ENOUGH_IMAGES = 64


def visible_devices(config: Config) -> Devices:
    """Decide on the devices, and hide the GPUs that were not chosen from this process and all it starts.

    Ids are numbers of what could be seen in the beginning, also where a run begins again in this process.
    """
    visible = seen_at_first()
    devices = choose(config, len(visible))
    if devices.ids is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[i] for i in devices.ids)
    return devices


@cache
def seen_at_first() -> list[str]:
    "The GPUs that this process could see before any was hidden, by the names that CUDA_VISIBLE_DEVICES has for them."
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def check_batch_size(config: Config, devices: Devices) -> None:
    "Every worker needs at least one sample of a full global batch."
    if config.batch_size < devices.count:
        raise UsageError(
            f"--batch-size {config.batch_size} is global and smaller than the {devices.count} workers: "
            f"some would have nothing to do; use {devices.count} or more"
        )


def open_data(config: Config) -> tuple[Path, DataBlock]:
    "The folder that the data is in, fetched or made if need be, and how it is to be listed, split and labelled."
    root = resolve(config.data, expanded(config.data_dir), download_bar())
    return root, make_block(root, config.split, config.label_regex, config.labels_csv, config.seed)


def make_store(config: Config, split: Split, channels: int = 3) -> str | None:
    """The folder of the store of decoded images, made here so that a lack of room shows before workers start.

    With --cache auto a run goes on without one where it has no room, saying so; None then, and with --cache off.
    """
    if config.cache == "off":
        return None
    if not config.cache.strip():
        raise UsageError("--cache is empty: it must be auto, device, off, or a folder")
    automatic = config.cache in ("auto", "device")
    parent = expanded(config.data_dir) / "stores" if automatic else expanded(config.cache)
    files = [*split.train.files, *split.valid.files]
    shape = config.presize, channels
    size, name = store_bytes(len(files), *shape), store_name(files, *shape)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        known = (parent / name).exists()
        prune(parent, room=0 if known else size, keep=[name])
        if automatic and not known and size > shutil.disk_usage(parent).free / 2:
            raise UserError(f"{size / 2**20:.0f} MiB would take more than half of what is free in {parent}")
        print(f"decoded images are kept: {size / 2**20:.0f} MiB in {parent / name}, ", end="", flush=True)
        outcome = "which can't be"
        try:
            outcome = f"{Store(parent / name, len(files), *shape).filled} of {len(files)} are there\n"
        finally:
            print(outcome, flush=True)
    except (OSError, UserError) as error:
        told = f"{error}"
        if isinstance(error, OSError):
            told = f"{error.filename}: {error.strerror}; name a folder that can be written with --cache DIR"
        if not automatic:
            raise UsageError(f"--cache {config.cache} is not possible: {told}") from error
        print(f"images are decoded in every epoch: {told}", flush=True)
        return None
    if config.cache == "device":
        print(f"and in the memory of each worker's device: another {size / 2**20:.0f} MiB\n")
    return str((parent / name).absolute())


def first_images(config: Config, split: Split) -> Readable:
    """The first training images, which speak for all: are they in colour, and how bright?

    They are the first batch, or more where it is small: Imagenette is in colour, but each fiftieth image is not.
    """
    first = epoch_order(len(split.train), config.seed, 0)[: max(config.batch_size, ENOUGH_IMAGES)]
    channels = 3 if isinstance(config.channels, str) else config.channels
    batch = collate_readable(Dataset(split.train, config.presize, channels), first)
    refuse_bad(batch.bad, skip=config.bad_images == "skip" and len(batch.rows) > 0)
    if config.channels == "auto" and is_grey(batch.inputs):
        return dataclasses.replace(batch, inputs=batch.inputs[..., :1])
    return batch


def make_job(config: Config, split: Split) -> Job:
    "What all workers are told; the first images decide on the channels and on how all are normalised."
    images = first_images(config, split).inputs
    return Job(
        train=split.train,
        valid=split.valid,
        n_classes=len(split.vocab),
        arch=config.arch,
        size=config.sizes.last,
        presize=config.presize,
        batch_size=config.batch_size,
        seed=config.seed,
        optimizer=config.optimizer,
        momentum=config.momentums[0] if config.momentums else config.own_momentum,
        weight_decay=config.weight_decay,
        label_smoothing=config.label_smoothing,
        clip=config.clip_grad,
        ema=config.ema,
        accumulate=config.accumulate,
        precision=config.precision,
        channels=images.shape[-1],
        normalize=Normalize.of(images),
        augment=config.augment,
        augmentation=AugmentConfig.read(config.magnitudes),
        mix=MixConfig(mixup=config.mixup, cutmix=config.cutmix),
        fine_tune=config.fine_tune > 0,
        body_apart=config.body_lr != 1,
        decay_weights_only=config.decay_weights_only,
        class_weights=balanced(split.train.targets, len(split.vocab)) if config.balance_classes else (),
        lsuv=config.lsuv,
        activations=config.activations,
        progressive=len(config.sizes.sides) > 1,
        sync_batchnorm=config.sync_batchnorm,
        skip_bad_images=config.bad_images == "skip",
        on_nan=config.on_nan,
        compile=config.compile,
        on_device=config.cache == "device",
    )


def make_plan(config: Config, split: Split) -> Plan:
    "The run's clock; a rate that is still to be found is 0."
    return Plan(
        n_train=len(split.train),
        n_valid=len(split.valid),
        batch_size=config.batch_size,
        epochs=config.fine_tune + config.epochs,
        frozen_epochs=config.fine_tune,
        schedule=config.schedule,
        lr=0.0 if isinstance(config.lr, str) else config.lr,
        momentum=config.own_momentum or 0.0,
        body_share=config.body_lr,
        momentums=config.momentums,
        sizes=config.sizes,
        skips_nan=config.on_nan == "skip",
    )


def make_gang(
    job: Job,
    devices: Devices,
    config: Config,
    logs: Path,
    notice: Callable[[str], object] = print,
    done: Callable[[str], object] = lambda part: None,
    again: bool = False,
) -> Gang:
    """One worker in this process, or Ray actors; each writes its log into `logs`.

    `notice` hears of their faults, `done` of the parts of their start. A run that begins `again` does so with as few as
    might have gone on, once there is room for them.
    """
    if devices.in_process:
        local = LocalGang(job, "cuda" if devices.gpus_each else "cpu", logs)
        done("model")
        return local
    from cluster.crew import PLACEMENT_TIMEOUT, Workers
    from cluster.ray_gang import RayGang

    tolerated = tolerance(config, devices.at_least)
    workers = Workers(devices.count, devices.gpus_each, devices.backend, config.address, devices.at_least)
    if again:
        patience = max(PLACEMENT_TIMEOUT, tolerated.wait)
        workers = dataclasses.replace(workers, at_least=tolerated.min_workers, patience=patience)
    gang = RayGang(job, workers, logs, tolerated, notice, done)
    for warning in gang.cluster.warnings:
        print(f"warning: {warning}", flush=True)
    if gang.world_size < devices.count:
        print(f"{gang.world_size} of {devices.count} workers begin; others join at an epoch's start\n", flush=True)
    return gang


def tolerance(config: Config, at_least: int | None = None) -> Tolerance:
    "What the run is to put up with."
    return Tolerance(
        max_restarts=config.max_restarts,
        min_workers=max(config.min_workers, at_least or 1),
        spares=config.spares,
        wait=config.wait_for_workers,
        hang_after=config.hang_after,
    )
