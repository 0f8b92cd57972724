"Ray Train's TorchTrainer: python -m benchmarks.peers.ray_train ROOT SIZE EPOCHS."

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train.torch import TorchTrainer

from benchmarks.peers.common import LR, WORKERS, Clock, Task, loader, model, train


def train_loop(config: dict[str, Any]) -> None:
    "What each worker runs."
    torch.set_num_threads(1)
    task, clock = config["task"], Clock()
    net = ray.train.torch.prepare_model(model())
    batches = ray.train.torch.prepare_data_loader(loader(task, shuffle=True))
    optimizer = torch.optim.SGD(net.parameters(), LR)
    for epoch in range(task.epochs):
        batches.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        clock.start()
        train(net, batches, optimizer)
        clock.stop()
    if ray.train.get_context().get_world_rank() == 0:
        Path(config["answer"]).write_text(json.dumps(clock.seconds))  # metrics come back with a checkpoint only


def main() -> None:
    "Train."
    task = Task.of_command_line()
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            train_loop,
            train_loop_config={"task": task, "answer": f"{folder}/seconds.json"},
            scaling_config=ray.train.ScalingConfig(num_workers=WORKERS, use_gpu=False),
            run_config=ray.train.RunConfig(storage_path=folder),
        )
        trainer.fit()
        Clock(json.loads(Path(folder, "seconds.json").read_text())).report()


if __name__ == "__main__":
    main()
