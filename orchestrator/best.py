"Best: which epoch was the best so far, and whether to go on: a pure decision."

from __future__ import annotations

from typing import Any


class Best:
    "Follows an accuracy over epochs; `patience` epochs without a new best end the run (0: none do)."

    def __init__(self, patience: int = 0) -> None:
        self.patience = patience
        self.row: dict[str, Any] | None = None
        self.waited = 0

    def note(self, row: dict[str, Any]) -> bool:
        "Take an epoch's row; whether its accuracy is above all before it (the first always is)."
        if self.row is None or row["accuracy"] > self.row["accuracy"]:
            self.row, self.waited = row, 0
            return True
        self.waited += 1
        return False

    @property
    def exhausted(self) -> bool:
        "Whether patience has run out."
        return 0 < self.patience <= self.waited
