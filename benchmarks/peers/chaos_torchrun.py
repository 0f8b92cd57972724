"torchrun --nproc-per-node 3 --max-restarts 3 -m benchmarks.peers.chaos_torchrun FOLDER."

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.faulty import model, optimizer_of, train


def main() -> None:
    "Train from the checkpoint, if there is one, as torchrun's documentation has it."
    folder = sys.argv[1]
    file = Path(folder, "checkpoint.pt")
    dist.init_process_group("gloo")
    net = DistributedDataParallel(model())
    optimizer, first = optimizer_of(net), 0
    if file.exists():
        state = torch.load(file)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"] + 1

    def save(epoch: int) -> None:
        if dist.get_rank() == 0:
            aside = file.with_suffix(".new")
            torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, aside)
            os.replace(aside, file)

    train(net, optimizer, folder, dist.get_rank(), first, save)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
