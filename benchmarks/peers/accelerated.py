"Accelerate: torchrun --nproc-per-node 2 -m benchmarks.peers.accelerated ROOT SIZE EPOCHS."

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from benchmarks.peers.common import LR, Clock, Task, loader, model


def main() -> None:
    "Train."
    task, clock = Task.of_command_line(), Clock()
    accelerator = Accelerator(cpu=True)
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), LR)
    net, optimizer, batches = accelerator.prepare(net, optimizer, loader(task, shuffle=True))
    for _ in range(task.epochs):
        clock.start()
        for x, y in batches:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(net(x), y))
            optimizer.step()
        clock.stop()
    if accelerator.is_main_process:
        clock.report()
    accelerator.end_training()


if __name__ == "__main__":
    main()
