"The learning-rate range test across the gang: global batches, one global loss, one stop decision, and no trace left."

from __future__ import annotations

from collections.abc import Callable, Iterator

from cluster.gang import Gang
from cluster.messages import Chunk
from learner.errors import UserError
from learner.lr_range import RangeTest, suggest
from orchestrator.driver import Plan, fingerprint

CHUNK = 5  # steps between two looks at the loss


def range_test(plan: Plan, gang: Gang, on_step: Callable[[int], None] = lambda done: None) -> RangeTest:
    """Raise the rate over the plan's global batches until the loss diverges, saying how many steps are done.

    Afterwards every rank is as it was before; UserError where a fingerprint says otherwise.
    """
    test, before = RangeTest(), fingerprint(gang, "before the LR finder")
    kept, untold = gang.call_first("snapshot"), 0
    for reports in gang.stream(_chunks(plan, test)):
        for loss, n in zip(reports[0].losses, reports[0].counts):
            if not n and not test.losses:  # what is next to a batch without a readable image stands for it
                untold += 1
                continue
            for one in [loss] * (1 + untold) if n else test.losses[-1:]:
                if not test.finished:
                    test.add(one)
            untold = 0
        on_step(len(test.losses))
    gang.call("load", kept)
    after = fingerprint(gang, "after the LR finder")
    if after != before:
        raise UserError(f"the LR finder did not restore the workers: fingerprint {after}, before it {before}")
    return test


def _chunks(plan: Plan, test: RangeTest) -> Iterator[Chunk]:
    "The test's steps, through as many epochs as it takes, until it has seen enough."
    step = 0
    while step < len(test.planned) and not test.finished:
        epoch, first = divmod(step, plan.train_batches)
        length = min(CHUNK, plan.train_batches - first, len(test.planned) - step)
        rates = test.planned[step : step + length]
        hypers = tuple({**plan.hypers(0), **plan.rates(lr)} for lr in rates)
        yield Chunk(True, epoch, first, step, hypers, probe=True)
        step += length


def suggestion(test: RangeTest) -> float:
    "The rate to train at; UserError if the loss never fell."
    found = suggest(test)["minimum"]
    if found is None:
        raise UserError("the LR finder saw no falling loss at any rate; choose one with --lr RATE")
    return found
