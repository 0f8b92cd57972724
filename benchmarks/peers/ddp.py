"DataLoader and DistributedDataParallel: torchrun --nproc-per-node 2 -m benchmarks.peers.ddp ROOT SIZE EPOCHS."

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data.distributed import DistributedSampler

from benchmarks.peers.common import LR, Clock, Pictures, Task, loader, model, train


def main() -> None:
    "Train."
    task, clock = Task.of_command_line(), Clock()
    dist.init_process_group("gloo")
    sampler: DistributedSampler = DistributedSampler(Pictures(task))
    batches = loader(task, sampler=sampler)
    net = DistributedDataParallel(model())
    optimizer = torch.optim.SGD(net.parameters(), LR)
    for epoch in range(task.epochs):
        sampler.set_epoch(epoch)
        clock.start()
        train(net, batches, optimizer)
        clock.stop()
    if dist.get_rank() == 0:
        clock.report()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
