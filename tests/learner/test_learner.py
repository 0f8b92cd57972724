"The loop: the order of its events, what cancels them, and its arithmetic against the same loop written with torch."

import copy
from contextlib import suppress
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from learner.data.loader import DataLoaders
from learner.learner import CANCELS, EVENTS, Callback, Learner
from learner.losses import cross_entropy
from learner.models import simple_cnn_bn
from learner.module import Module, Parameter
from learner.optim import SGD

STEP = ["before_batch", "after_predict", "after_loss", "after_backward", "after_step", "after_batch", "cleanup_batch"]
LOOK = ["before_batch", "after_predict", "after_loss", "after_batch", "cleanup_batch"]


class Line(Module):
    "One weight an input."

    def __init__(self) -> None:
        self.weight = Parameter(torch.ones(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def batches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    stream = torch.Generator().manual_seed(n)
    return [(torch.randn(3, 2, generator=stream), torch.tensor([0, 1, 0])) for _ in range(n)]


def learner(*cbs: Callback, train: int = 2, valid: int | None = 1) -> Learner:
    return Learner(Line(), DataLoaders(batches(train), None if valid is None else batches(valid)), cbs=cbs)


def on_events(react, order: int = 0) -> Callback:
    "A callback that calls `react(callback, event)` at each event."

    def hook(event: str):
        return lambda self: react(self, event)

    one = type("Anywhere", (Callback,), {event: hook(event) for event in EVENTS})()
    one.order = order
    return one


def recorder(trace: list[str]) -> Callback:
    return on_events(lambda self, event: trace.append(event), order=-5)


def thrower(at: str, error: type[Exception]) -> Callback:
    "Raises `error` the first time that `at` happens."
    thrown = []

    def react(self: Callback, event: str) -> None:
        if event == at and not thrown:
            thrown.append(event)
            raise error

    return on_events(react)


def epoch(batches: list[str]) -> list[str]:
    return ["before_epoch", *batches, "after_epoch", "cleanup_epoch"]


def test_events_come_in_order() -> None:
    trace: list[str] = []
    learner(recorder(trace)).fit(2)
    once = epoch(STEP * 2) + epoch(LOOK)
    assert trace == ["before_fit", "after_opt", *once, *once, "after_fit", "cleanup_fit"]


def test_without_a_validation_set_there_is_only_training() -> None:
    trace: list[str] = []
    learner(recorder(trace), valid=None).fit(1)
    assert trace == ["before_fit", "after_opt", *epoch(STEP * 2), "after_fit", "cleanup_fit"]


def running_at(event: str) -> list[str]:
    "The phases that the event lies in, inmost first: a phase is over when its cleanup begins."
    phases = list(CANCELS)
    when, _, what = event.partition("_")
    inmost = phases.index({"opt": "fit"}.get(what, what if what in phases else "batch"))
    return phases[inmost + (when == "cleanup") :]


# What the loop begins after each phase that was left early.
NEXT = {"batch": {"before_batch", "after_epoch"}, "epoch": {"before_epoch", "after_fit"}, "fit": {None}}


@pytest.mark.parametrize("cancelled", CANCELS)
@pytest.mark.parametrize("event", EVENTS)
def test_a_cancel_ends_its_phase_and_each_phase_in_it_with_cleanup_only(event: str, cancelled: str) -> None:
    trace: list[str] = []
    fit = learner(recorder(trace), thrower(event, CANCELS[cancelled])).fit
    running = running_at(event)
    if cancelled in running:
        left = running[: running.index(cancelled) + 1]
        fit(2)
    else:  # nothing of that name is running: an error like any other
        left = running
        with pytest.raises(CANCELS[cancelled]):
            fit(2)
    then = trace[trace.index(event) + 1 :]
    assert then[: len(left)] == [f"cleanup_{phase}" for phase in left]
    following = then[len(left)] if len(then) > len(left) else None
    assert following in (NEXT[cancelled] if cancelled in running else {None})
    assert trace.count("before_fit") == trace.count("cleanup_fit") == 1
    for phase in CANCELS:
        assert trace.count(f"before_{phase}") == trace.count(f"cleanup_{phase}")


@pytest.mark.parametrize("event", EVENTS)
def test_another_error_reaches_the_caller_after_all_cleanups(event: str) -> None:
    trace: list[str] = []
    with pytest.raises(ZeroDivisionError):
        learner(recorder(trace), thrower(event, ZeroDivisionError)).fit(1)
    then = trace[trace.index(event) + 1 :]
    assert then == [f"cleanup_{phase}" for phase in running_at(event)]


def test_a_cancelled_batch_takes_no_step_and_the_epoch_goes_on() -> None:
    one = learner(thrower("after_loss", CANCELS["batch"]), train=3)
    one.fit(1)
    assert one.global_step == 2


@pytest.mark.parametrize("event", ["after_predict", "after_loss", "after_backward", "after_step"])
def test_of_a_cancelled_batch_nothing_goes_into_the_next_step(event: str) -> None:
    one, other = learner(thrower(event, CANCELS["batch"]), train=1), learner(train=1)
    one.fit(2)
    other.fit(2 if event == "after_step" else 1)
    assert torch.equal(one.model.weight, other.model.weight)


@pytest.mark.parametrize("error", [KeyboardInterrupt, CANCELS["fit"], CANCELS["epoch"]])
def test_of_a_fit_that_was_cut_short_nothing_goes_into_the_next(error: type[BaseException]) -> None:
    one, other = learner(thrower("after_backward", error)), learner()
    with suppress(KeyboardInterrupt):
        one.fit(1)
    one.fit(1)
    other.fit(1)
    assert torch.equal(one.model.weight, other.model.weight)


def test_callbacks_belong_to_the_learner_that_is_fitting() -> None:
    seen: list[Learner] = []
    shared = on_events(lambda self, event: seen.append(self.learner))
    first, second = learner(shared), learner(shared)
    first.fit(1)
    assert set(seen) == {first}
    second.fit(1)
    assert set(seen) == {first, second}


@pytest.mark.parametrize("name", ["before_batches", "after_losses", "cleanup_step", "after_pred"])
def test_a_misspelt_hook_is_refused_when_its_class_is_made(name: str) -> None:
    with pytest.raises(TypeError, match=f"Wrong.*{name}.*before_fit"):
        type("Wrong", (Callback,), {name: lambda self: None})


def test_callbacks_read_the_learner_as_their_own_and_write_through_it() -> None:
    class Doubling(Callback):
        def before_batch(self) -> None:
            x, y = self.batch
            self.learner.batch = x * 2, y

        def after_predict(self) -> None:
            assert torch.equal(self.preds, self.learner.preds) and self.model is self.learner.model
            seen.append((self.epoch, self.num, self.global_step, self.batch[0]))

    seen: list = []
    one = learner(Doubling(), valid=None)
    one.fit(2)
    assert [entry[:3] for entry in seen] == [(0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 3)]
    assert all(torch.equal(entry[3], x * 2) for entry, (x, _) in zip(seen, batches(2) * 2))
    with pytest.raises(AttributeError, match="nothing"):
        _ = one.cbs[0].nothing
    with pytest.raises(AttributeError, match="learner"):
        _ = Doubling().model


def test_lower_orders_go_first_and_equals_as_given() -> None:
    calls: list[int] = []
    cbs = [on_events(lambda self, event, n=n: calls.append(n), order) for n, order in enumerate([5, 0, -5, 0])]
    learner(*cbs)("before_fit")
    assert calls == [2, 1, 3, 0]


def test_an_added_callback_takes_part() -> None:
    trace: list[str] = []
    one = learner(train=1, valid=None)
    one.add_cb(recorder(trace))
    one.fit(1)
    assert trace.count("after_step") == 1


def test_a_single_callback_may_be_given_a_hook_of_its_own() -> None:
    cb, seen = Callback(), list[str]()
    cb.after_epoch = lambda: seen.append("epoch")
    learner(cb, valid=None).fit(2)
    assert seen == ["epoch"] * 2


def test_a_second_fit_goes_on_from_the_weights_with_a_new_optimizer_and_count() -> None:
    one = learner(train=2, valid=None)
    one.opt_func = lambda params, lr: SGD(params, lr, momentum=0.9)
    one.fit(3)
    first, after_first = one.opt, one.model.weight.detach().clone()
    trained = copy.deepcopy(one.model)
    one.fit(1)
    assert one.opt is not first and one.global_step == 2 and one.n_epochs == 1
    other = Learner(trained, one.dls, opt_func=one.opt_func)
    other.fit(1)
    assert torch.equal(one.model.weight, other.model.weight) and not torch.equal(one.model.weight, after_first)


def test_another_model_can_be_put_in_its_place() -> None:
    one, twice = learner(), learner()
    one.fit(1)
    one.model = Line()
    one.fit(1)
    twice.fit(1)
    assert torch.equal(one.model.weight, twice.model.weight)


def test_validation_has_no_gradients_and_changes_nothing() -> None:
    seen: list[tuple[bool, bool, bool]] = []

    def look(self: Callback, event: str) -> None:
        if event == "after_loss":
            seen.append((self.model.training, torch.is_grad_enabled(), self.loss.requires_grad))
        if event == "before_epoch":
            weights.append(self.model.weight.detach().clone())

    weights: list[torch.Tensor] = []
    one = learner(on_events(look), train=1, valid=2)
    one.fit(1)
    assert seen == [(True, True, True), (False, False, False), (False, False, False)]
    assert torch.equal(weights[1], one.model.weight) and not torch.equal(weights[0], weights[1])
    assert torch.is_grad_enabled()


def torch_twin(ours: Module, n_out: int) -> nn.Sequential:
    "simple_cnn_bn of torch.nn, with the weights of ours."
    widths, layers = [3, 16, 32, 64, 128], []
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    theirs = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, n_out)).double()
    with torch.no_grad():
        for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
            p.copy_(q)
    return theirs


def test_training_equals_the_same_loop_of_torch() -> None:
    torch.manual_seed(3)
    data = [(torch.randn(6, 3, 20, 20, dtype=torch.float64), torch.randint(4, (6,))) for _ in range(3)]
    ours = simple_cnn_bn(3, 4).double()
    theirs = torch_twin(ours, 4)
    Learner(ours, DataLoaders(data), cross_entropy, 0.05, opt_func=lambda ps, lr: SGD(ps, lr, 0.9, 1e-3)).fit(3)
    opt = torch.optim.SGD(theirs.parameters(), 0.05, 0.9, weight_decay=1e-3)
    for x, y in data * 3:
        opt.zero_grad()
        nn.functional.cross_entropy(theirs(x), y).backward()
        opt.step()
    trained = [tensor for tensor in theirs.state_dict().values() if tensor.is_floating_point()]
    assert_close([*ours.state_dict().values()], trained, rtol=1e-10, atol=1e-10)
    x = data[0][0]
    assert_close(ours.eval()(x).detach(), theirs.eval()(x).detach(), rtol=1e-10, atol=1e-10)
