"Which devices a run uses: a pure decision from what was asked for and what is visible."

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from learner.errors import UsageError
from orchestrator.config import RANGE, Config


@dataclass(frozen=True)
class Devices:
    """`count` workers; each has `gpus_each` of a GPU (0: a CPU slot) and talks by `backend`.

    `ids` are the GPUs to make visible (None: leave that as it is). `in_process`: the one worker needs no Ray.
    A run begins, and goes on, with `at_least` so many; with None it begins with all.
    """

    count: int
    gpus_each: float
    backend: str
    ids: tuple[int, ...] | None = None
    in_process: bool = False
    at_least: int | None = None

    def __str__(self) -> str:
        kind = "CPU" if not self.gpus_each else "GPU" if self.gpus_each == 1 else f"{self.gpus_each:.3g} GPU"
        place = "in this process" if self.in_process else f"over {self.backend}"
        fewer = f"{self.at_least} to " if self.at_least not in (None, self.count) else ""
        return f"{fewer}{self.count} {kind} worker{'s' if self.count > 1 else ''}, {place}"


def choose(config: Config, visible: int) -> Devices:
    """The devices for `config` where `visible` GPUs can be seen.

    Raises UsageError where they don't suffice or the request contradicts itself.
    """
    devices = _choose(config, visible)
    if config.min_workers > devices.count:
        raise UsageError(f"--min-workers {config.min_workers} is more than there are to be: {devices.count}")
    if config.spares and config.local:
        raise UsageError(f"--spares {config.spares}: --local is one worker in this process; drop one of the two")
    at_least = devices.at_least and max(devices.at_least, config.min_workers)
    return replace(devices, at_least=at_least, in_process=devices.in_process and not config.spares)


def _choose(config: Config, visible: int) -> Devices:
    if config.gpus is not None and config.cpus is not None:
        raise UsageError(f"--gpus {config.gpus} and --cpus {config.cpus} exclude each other: give one of them")
    if config.cpus is not None and config.backend == "nccl":
        raise UsageError("--backend nccl needs GPUs; CPU workers talk by gloo: leave the flag out")
    if config.address is not None:
        return _remote(config)
    if config.cpus is not None or (config.gpus is None and not visible):
        return _cpu_workers(config)
    if config.gpus is not None and ":" in config.gpus:
        low, high = _range("gpus", config.gpus)
        if visible < low:
            raise UsageError(f"--gpus {config.gpus}: {visible} GPUs are visible, fewer than {low}")
        count = min(high, visible)
        _check_local(config, count)
        _check_spares(config, count, visible)
        return Devices(count, 1.0, config.backend or "nccl", None, count == 1, low)
    count, ids = _gpu_request(config, visible)
    shared = config.backend == "gloo"
    if count > visible and not (shared and visible):
        hint = ", or share what there is with --backend gloo" if visible else ""
        raise UsageError(f"--gpus {config.gpus}: {visible} GPUs are visible; train on CPUs with --cpus {count}{hint}")
    _check_local(config, count)
    if config.spares and ids:
        raise UsageError(
            f"--spares {config.spares}: --gpus {config.gpus} is a worker on each, and leaves none for a spare; give a "
            "count, --gpus N, and name those that it may use in CUDA_VISIBLE_DEVICES"
        )
    _check_spares(config, count, visible)
    return Devices(count, share(count, visible), config.backend or "nccl", ids, count == 1)


def _range(name: str, text: str) -> tuple[int, int]:
    "The MIN and MAX of --gpus or --cpus MIN:MAX."
    found = RANGE.fullmatch(text)
    low, high = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= low <= high:
        raise UsageError(f"--{name} {text}: a range is MIN:MAX, such as 2:8")
    return low, high


def _cpu_count(config: Config) -> tuple[int | None, int]:
    "Of --cpus N or MIN:MAX: how few will do, where that is said, and how many there are to be."
    return _range("cpus", config.cpus) if isinstance(config.cpus, str) else (None, config.cpus or 1)


def share(workers: int, gpus: int) -> float:
    "How much of a GPU each worker gets where some must share: all the same, rounded down as far as Ray counts."
    on_one = -(-workers // gpus)
    return 10_000 // on_one / 10_000


def _cpu_workers(config: Config) -> Devices:
    low, count = _cpu_count(config)
    if config.backend == "nccl":
        raise UsageError("--backend nccl needs GPUs, and none is visible: leave the flag out to train on CPUs")
    _check_local(config, count)
    return Devices(count, 0.0, "gloo", None, count == 1, low)


def _check_local(config: Config, count: int) -> None:
    if config.local and count > 1:
        raise UsageError(f"--local is one worker in this process, but {count} were asked for; drop one of the two")


def _check_spares(config: Config, count: int, gpus: int) -> None:
    if config.spares and count + config.spares > gpus:
        raise UsageError(
            f"--spares {config.spares}: each needs a GPU of its own beside the {count} workers', and there are {gpus}"
        )


def _remote(config: Config) -> Devices:
    if config.local:
        raise UsageError("--local is one worker in this process; it can't join the cluster at --address")
    if config.cpus is not None:
        low, high = _cpu_count(config)
        return Devices(high, 0.0, "gloo", at_least=low)
    if config.gpus is not None and ":" in config.gpus:
        low, high = _range("gpus", config.gpus)
        return Devices(high, 1.0, config.backend or "nccl", at_least=low)
    if config.gpus is None or not config.gpus.isdigit() or int(config.gpus) < 1:
        raise UsageError(f"--address {config.address} needs a count of workers: --gpus N or --cpus N")
    return Devices(int(config.gpus), 1.0, config.backend or "nccl")


def _gpu_request(config: Config, visible: int) -> tuple[int, tuple[int, ...] | None]:
    "How many GPU workers, and the ids of their GPUs if the user named them."
    if config.gpus is None or config.gpus == "all":
        count = 1 if config.local else visible
        if not count:
            raise UsageError("--gpus all: no GPU is visible; train on CPUs with --cpus 1")
        return count, None
    if re.fullmatch(r"\d+", config.gpus):
        if int(config.gpus) < 1:
            raise UsageError(f"--gpus {config.gpus}: ask for 1 or more, or train on CPUs with --cpus N")
        return int(config.gpus), None
    if not re.fullmatch(r"\d+(,\d+)*,?", config.gpus):
        raise UsageError(f"--gpus {config.gpus} is neither a count (4), nor ids (0,2), nor all")
    ids = tuple(int(number) for number in config.gpus.strip(",").split(","))
    if not visible:
        raise UsageError(f"--gpus {config.gpus}: no GPU is visible; train on CPUs with --cpus {len(ids)}")
    if len(set(ids)) < len(ids) or max(ids) >= visible:
        raise UsageError(f"--gpus {config.gpus}: ids must differ and be below {visible}, the number of visible GPUs")
    return len(ids), ids
