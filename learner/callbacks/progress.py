"Progress: fastprogress bars for epochs and batches; imported where one is drawn, since it brings a web server along."

from __future__ import annotations

from learner.learner import Callback


class Progress(Callback):
    "A bar for the epochs, one below it for the batches, and the table of TrackResults above them."

    order = -20

    def before_fit(self) -> None:
        "Open the bar of epochs, and take over the writing of rows."
        from fastprogress.fastprogress import master_bar

        self.bar = master_bar(range(self.n_epochs))
        self.bar.update(0)
        self.learner.write_row = lambda cells: self.bar.write(list(cells), table=True)  # type: ignore[attr-defined]

    def before_epoch(self) -> None:
        "Count the batches as they are drawn."
        from fastprogress.fastprogress import progress_bar

        self.learner.dl = progress_bar(self.dl, parent=self.bar, leave=False)

    def after_epoch(self) -> None:
        "Count the epoch once it is validated, or trained where there is no validation."
        if not self.model.training or self.dls.valid is None:
            self.bar.update(self.epoch + 1)

    def cleanup_fit(self) -> None:
        "Give the writing of rows back."
        vars(self.learner).pop("write_row", None)
