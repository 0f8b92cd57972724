"Ray Train's TorchTrainer with FailureConfig(max_failures=3): python -m benchmarks.peers.chaos_ray_train FOLDER."

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.torch import TorchTrainer

from benchmarks.peers.faulty import RANKS, model, optimizer_of, train


def train_loop(config: dict[str, Any]) -> None:
    "What each worker runs: Ray Train's documentation on checkpoints and fault tolerance."
    net = ray.train.torch.prepare_model(model())
    optimizer, first, rank = optimizer_of(net), 0, ray.train.get_context().get_world_rank()
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder, "state.pt"))
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"] + 1

    def save(epoch: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
            if rank == 0:
                torch.save(state, Path(folder, "state.pt"))
            kept = ray.train.Checkpoint.from_directory(folder) if rank == 0 else None
            ray.train.report({"epoch": epoch}, checkpoint=kept)

    train(net, optimizer, config["folder"], rank, first, save)


def main() -> None:
    "Train."
    ray.init(num_cpus=RANKS + 1, log_to_driver=False, include_dashboard=False)
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"folder": sys.argv[1]},
        scaling_config=ray.train.ScalingConfig(num_workers=RANKS, use_gpu=False),
        run_config=ray.train.RunConfig(
            storage_path=sys.argv[1], failure_config=ray.train.FailureConfig(max_failures=3)
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
