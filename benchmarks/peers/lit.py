"Lightning: python -m benchmarks.peers.lit ROOT SIZE EPOCHS."

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F

from benchmarks.peers.common import LR, WORKERS, Clock, Task, loader, model


class Classifier(L.LightningModule):
    "simple_cnn."

    def __init__(self) -> None:
        super().__init__()
        self.net = model()

    def training_step(self, batch, number):
        "The loss."
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        "SGD."
        return torch.optim.SGD(self.parameters(), LR)


class Timing(L.Callback):
    "Runs the clock."

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_epoch_start(self, *_):
        "An epoch begins."
        self.clock.start()

    def on_train_epoch_end(self, *_):
        "It ended."
        self.clock.stop()


def main() -> None:
    "Train."
    task, clock = Task.of_command_line(), Clock()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(
        accelerator="cpu", devices=WORKERS, strategy="ddp", max_epochs=task.epochs, callbacks=[Timing(clock)], **quiet
    )
    trainer.fit(Classifier(), loader(task, shuffle=True))
    if trainer.is_global_zero:
        clock.report()


if __name__ == "__main__":
    main()
