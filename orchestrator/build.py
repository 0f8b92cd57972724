"From a configuration to what it describes: the devices, the job of the workers, the plan, the gang."

from __future__ import annotations

import os

import torch

from cluster.gang import Gang, LocalGang
from cluster.worker import Job, refuse_bad
from learner.data.files import Split
from learner.data.loader import Dataset, collate_readable, epoch_order
from learner.data.normalize import Normalize
from learner.errors import UsageError
from orchestrator.config import Config
from orchestrator.devices import Devices, choose
from orchestrator.driver import Plan
from orchestrator.run_folder import RunFolder


def visible_devices(config: Config) -> Devices:
    "Decide on the devices, and hide the GPUs that were not chosen from this process and all it starts."
    devices = choose(config, torch.cuda.device_count())
    if devices.ids is not None:
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        known = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(known[i] for i in devices.ids)
    return devices


def check_batch_size(config: Config, devices: Devices) -> None:
    "Every worker needs at least one sample of a full global batch."
    if config.batch_size < devices.count:
        raise UsageError(
            f"--batch-size {config.batch_size} is global and smaller than the {devices.count} workers: "
            f"some would have nothing to do; use {devices.count} or more"
        )


def make_job(config: Config, split: Split) -> Job:
    "What all workers are told; looks into the first batch for the statistics that normalise all images."
    first = epoch_order(len(split.train), config.seed, 0)[: config.batch_size]
    batch = collate_readable(Dataset(split.train, config.presize), first)
    refuse_bad(batch.bad, skip=config.bad_images == "skip" and len(batch.rows) > 0)
    return Job(
        train=split.train,
        valid=split.valid,
        n_classes=len(split.vocab),
        arch=config.arch,
        size=config.size,
        presize=config.presize,
        batch_size=config.batch_size,
        seed=config.seed,
        optimizer=config.optimizer,
        momentum=config.momentums[0] if config.momentums else config.momentum,
        weight_decay=config.weight_decay,
        label_smoothing=config.label_smoothing,
        clip=config.clip_grad,
        ema=config.ema,
        accumulate=config.accumulate,
        precision=config.precision,
        normalize=Normalize.of(batch.inputs),
        augment=config.augment,
        sync_batchnorm=config.sync_batchnorm,
        skip_bad_images=config.bad_images == "skip",
    )


def make_plan(config: Config, split: Split) -> Plan:
    "The run's clock; a rate that is still to be found is 0."
    return Plan(
        n_train=len(split.train),
        n_valid=len(split.valid),
        batch_size=config.batch_size,
        epochs=config.epochs,
        schedule=config.schedule,
        lr=0.0 if isinstance(config.lr, str) else config.lr,
        momentum=config.momentum or 0.0,
        momentums=config.momentums,
    )


def make_gang(job: Job, devices: Devices, config: Config, folder: RunFolder) -> Gang:
    "One worker in this process, or Ray actors."
    if devices.in_process:
        return LocalGang(job, "cuda" if devices.gpus_each else "cpu", folder.logs)
    from cluster.ray_gang import RayGang, Workers

    gang = RayGang(job, Workers(devices.count, devices.gpus_each, devices.backend, config.address), folder.logs)
    for warning in gang.cluster.warnings:
        print(f"warning: {warning}", flush=True)
    return gang
