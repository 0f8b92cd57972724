"Fit: what `launch` does with a session: find the rate if asked, train, and save the last epoch or the best."

from __future__ import annotations

import dataclasses
from typing import Any

from orchestrator.best import Best
from orchestrator.driver import train
from orchestrator.lr_finder import range_test, suggestion
from orchestrator.session import Session


def fit(session: Session) -> dict[str, Any]:
    "Train as the session's configuration says; the row of the epoch whose model was saved."
    config, plan = session.config, session.plan
    session.show_samples()
    if config.lr == "auto":
        plan = dataclasses.replace(plan, lr=find_rate(session))
    best = Best(config.early_stop)

    def on_epoch(row: dict[str, Any]) -> bool:
        if best.note(row) and config.save_best:
            session.save_model()
        return not best.exhausted

    last = train(plan, session.gang, session.tracker, on_epoch)
    if config.save_best and best.row is not None:
        return best.row
    session.save_model()
    return last


def find_rate(session: Session) -> float:
    "The rate that the LR finder suggests; its curve goes into TensorBoard."
    test = range_test(session.plan, session.gang)
    rate = suggestion(test)
    print(f"LR finder: {len(test.losses)} steps, suggestion {rate:.3g}; training goes on at that rate\n", flush=True)
    session.show_range_test(test, rate)
    return rate
