"Saver: checkpoints written in the background, one at a time, while training goes on."

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from cluster.checkpoint import Checkpoints, spoiled


class Saver:
    """Writes what it is given, unless a number in it is not finite: nobody could go on from there.

    Then, and where the disk refuses, `warn` is told in one sentence, and training goes on.
    """

    def __init__(self, checkpoints: Checkpoints, warn: Callable[[str], object]) -> None:
        self.checkpoints, self.warn = checkpoints, warn
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._last: Future[bool] | None = None

    def save(self, step: int, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        "Begin to write the checkpoint of `step`, once the one before is written; the arrays are not to change."
        self.finish()
        self._last = self._thread.submit(self._write, step, tensors, meta)

    def finish(self) -> bool:
        "Wait until all is written; whether the last checkpoint was."
        return self._last is None or self._last.result()

    def close(self) -> None:
        "Write what is left to write."
        self._thread.shutdown()

    def _write(self, step: int, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> bool:
        if name := spoiled(tensors):
            self.warn(f"warning: no checkpoint of step {step} is written: {name} is not finite; older ones are kept")
            return False
        try:
            self.checkpoints.save(step, tensors, meta)
            return True
        except OSError as error:
            self.warn(f"warning: no checkpoint of step {step} could be written: {error}")
            return False
