"Accumulation, clipping, averaged weights and mixed precision, each against a plain computation of the same."

import copy
from contextlib import suppress

import pytest
import torch
from torch.testing import assert_close

from learner.callbacks import (
    EMA,
    Accumulate,
    ClipGradients,
    FineTune,
    LRFinder,
    MixedPrecision,
    OneCycle,
    TrackResults,
    fine_tune,
    lr_find,
)
from learner.data.loader import DataLoaders
from learner.errors import UserError
from learner.groups import body_and_head, head_names, no_decay_groups, replace_head
from learner.layers import BatchNorm, Linear
from learner.learner import CANCELS, Callback, Learner
from learner.losses import cross_entropy
from learner.module import Module, Sequential
from learner.optim import SGD, AdamW
from learner.schedule import cosine, one_cycle, one_cycle_momentum


def batches(sizes, dtype=torch.float64, seed=0):
    "Random inputs (n, 6) and targets in 4 classes, in batches of these sizes."
    torch.manual_seed(seed)
    return [(torch.randn(n, 6, dtype=dtype), torch.randint(4, (n,))) for n in sizes]


def model(norm=False, dtype=torch.float64, seed=1) -> Module:
    torch.manual_seed(seed)
    layers = [Linear(6, 5), BatchNorm(5), Linear(5, 4)] if norm else [Linear(6, 5), Linear(5, 4)]
    return Sequential(*layers).to(dtype=dtype)


def fit(net, train, epochs=3, cbs=(), opt=SGD, lr=0.1, valid=None) -> Learner:
    learner = Learner(net, DataLoaders(train, valid), cross_entropy, lr, cbs=list(cbs), opt_func=opt)
    learner.fit(epochs)
    return learner


@pytest.mark.parametrize("opt", [SGD, AdamW])
def test_accumulated_batches_are_the_larger_batch(opt) -> None:
    parts = batches([3, 5, 4, 2, 6])
    whole = [tuple(map(torch.cat, zip(*group))) for group in (parts[:2], parts[2:4], parts[4:])]
    ours, theirs = model(), model()
    tracked = TrackResults()
    fit(ours, parts, cbs=[Accumulate(2), tracked], opt=opt)
    fit(theirs, whole, opt=opt)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert all(row["train_loss"] > 0 for row in tracked.history) and len(tracked.history) == 3


@pytest.mark.parametrize(("event", "at", "error"), [
    ("before_batch", 1, CANCELS["batch"]), ("after_backward", 1, CANCELS["batch"]),
    ("after_loss", 0, CANCELS["batch"]), ("after_backward", 0, CANCELS["batch"]),
    ("before_batch", 1, CANCELS["epoch"]), ("after_backward", 0, CANCELS["epoch"]),
    ("after_backward", 0, CANCELS["fit"]), ("after_loss", 1, KeyboardInterrupt),
])  # fmt: skip
def test_of_a_step_that_came_to_no_end_no_part_goes_into_the_next(event, at, error) -> None:
    "Of two batches, which are to make one step."

    class Once(Callback):
        order, thrown = -99 if event == "before_batch" and at else 99, False

        def react(self) -> None:
            if self.num == at and not Once.thrown:
                Once.thrown = True
                raise error

    setattr(Once, event, Once.react)
    ours, theirs, parts = model(), model(), batches([3, 5])
    learn = Learner(ours, DataLoaders(parts), lr=0.1, cbs=[Accumulate(2), Once()])
    with suppress(KeyboardInterrupt):
        learn.fit(1)
    if error is CANCELS["batch"] and at == 0:  # what is left of the step is taken
        fit(theirs, parts[1:], epochs=1)
    assert Once.thrown
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-10, atol=1e-12)
    learn.fit(1)
    fit(theirs, parts, cbs=[Accumulate(2)], epochs=1)
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cb", [OneCycle(0.1), Accumulate(2), ClipGradients(1.0), FineTune(), LRFinder()])
def test_an_optimizer_of_another_make_is_refused_where_its_rate_or_step_is_changed(cb) -> None:
    def sgd(groups, lr) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": group} for group in groups] if isinstance(groups[0], list) else groups, lr)

    fit(model(), batches([3]), opt=sgd)
    with pytest.raises(UserError, match=r"torch.optim.sgd.SGD can't be set: use one of learner.optim"):
        fit(model(), batches([3]), opt=sgd, cbs=[cb])


def test_a_test_of_rates_that_a_callback_ends_suggests_nothing() -> None:
    class Ends(Callback):
        def before_batch(self) -> None:
            if self.epoch == 7:
                raise CANCELS["fit"]

    learn = Learner(model(), DataLoaders(batches([4])), lr=0.1, cbs=[Ends()])
    with pytest.raises(UserError, match="after 7 of 100 steps"):
        lr_find(learn)
    assert learn.n_epochs == learn.global_step == 0, "as before"


def test_a_test_of_rates_that_never_begins_suggests_nothing() -> None:
    class Ends(Callback):
        def before_fit(self) -> None:
            raise CANCELS["fit"]

    with pytest.raises(UserError, match="after 0 of 100 steps"):
        lr_find(Learner(model(), DataLoaders(batches([4])), lr=0.1, cbs=[Ends()]))


def test_the_finder_sees_the_larger_batch_and_leaves_no_samples_behind() -> None:
    parts = batches([3, 5, 4, 2, 6])
    whole = [tuple(map(torch.cat, zip(*group))) for group in (parts[:2], parts[2:4], parts[4:])]
    ours, theirs = (Learner(model(), DataLoaders(part), lr=0.1, cbs=cbs)
                    for part, cbs in ((parts, [Accumulate(2)]), (whole, [])))  # fmt: skip
    found, expected = lr_find(ours, 1e-3, 1.0, 10), lr_find(theirs, 1e-3, 1.0, 10)
    assert found.losses == pytest.approx(expected.losses, rel=1e-9) and len(found.losses) == 10
    assert found.suggestions == pytest.approx(expected.suggestions)
    for learn in (ours, theirs):
        learn.fit(1)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters()):
        assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_clipping_bounds_the_norm_of_all_gradients_and_leaves_small_ones() -> None:
    for bound in (0.05, 100.0):
        ours, theirs = model(), model()
        fit(ours, batches([8, 8]), cbs=[ClipGradients(bound)])
        opt = torch.optim.SGD(theirs.parameters(), 0.1)
        for _ in range(3):
            for x, y in batches([8, 8]):
                cross_entropy(theirs(x), y).backward()
                torch.nn.utils.clip_grad_norm_(theirs.parameters(), bound)
                opt.step()
                opt.zero_grad()
        for a, b in zip(ours.parameters(), theirs.parameters()):
            assert_close(a.detach(), b.detach(), rtol=1e-10, atol=1e-12)


class Watch(Callback):
    "Keeps the weights after each step, and those that each validation sees."

    order = 99

    def before_fit(self) -> None:
        self.steps, self.validated = [copy.deepcopy(self.model.state_dict())], []

    def after_step(self) -> None:
        self.steps.append({name: t.clone() for name, t in self.model.state_dict().items()})

    def before_epoch(self) -> None:
        if not self.model.training:
            self.validated.append({name: t.clone() for name, t in self.model.state_dict().items()})


def test_the_average_is_what_is_validated_and_training_goes_on_with_the_weights() -> None:
    watch, average, net = Watch(), EMA(0.8), model(norm=True)
    fit(net, batches([8, 8]), epochs=2, cbs=[average, watch], valid=batches([4]))
    plain = model(norm=True)
    fit(plain, batches([8, 8]), epochs=2)
    for a, b in zip(net.parameters(), plain.parameters()):
        assert torch.equal(a, b)
    expected = {name: t.clone() for name, t in watch.steps[0].items()}
    for number, state in enumerate(watch.steps[1:], 1):
        decay = min(0.8, (1 + number) / (10 + number))
        expected = {name: decay * expected[name] + (1 - decay) * state[name] for name in expected}
        if number in (2, 4):
            for name, tensor in watch.validated[number // 2 - 1].items():
                assert_close(tensor, expected[name])
    for name, tensor in average.average.items():
        assert_close(tensor, expected[name])


def test_an_averages_state_survives_its_dictionary() -> None:
    first, second = EMA(0.8), EMA(0.8)
    fit(model(), batches([8, 8]), cbs=[first])
    fit(model(seed=5), batches([8]), cbs=[second])
    second.load_state_dict({name: t.clone() for name, t in first.state_dict().items()})
    assert all(torch.equal(first.average[name], second.average[name]) for name in first.average)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.01)])
def test_mixed_precision_trains_nearly_as_full(precision, tolerance) -> None:
    kinds = []

    class See(Callback):
        def after_loss(self) -> None:
            kinds.append((self.preds.dtype, self.loss.dtype))

    train = batches([16, 16], torch.float32)
    ours, theirs = model(dtype=torch.float32), model(dtype=torch.float32)
    mixing = MixedPrecision(precision)
    mixed = fit(ours, train, cbs=[mixing, See()])
    fit(theirs, train)
    assert set(kinds) == {(torch.float32, torch.float32)}
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert a.dtype is torch.float32 and not torch.equal(a, b)
        assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert mixing.scale == (2.0**16 if precision == "fp16" else 1.0)
    assert mixed.loss_scale == 1, "what trains without it later has none"
    lr_find(mixed, n_steps=4)
    assert mixed.loss_scale == 1


def test_finding_a_rate_leaves_the_average_as_it_was() -> None:
    ema = EMA(0.9)
    learner = fit(model(), batches([8, 8]), cbs=[ema])
    before = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    assert not all(torch.equal(tensor, before[name]) for name, tensor in learner.model.state_dict().items())
    lr_find(learner, n_steps=8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ema.state_dict().items())

    def interrupted(_: Callback) -> None:
        raise KeyboardInterrupt

    ema.after_loss = interrupted.__get__(ema)  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        lr_find(learner, n_steps=8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ema.state_dict().items())


def test_a_step_whose_gradients_overflow_is_skipped_and_the_scale_halved() -> None:
    net, scaler = model(dtype=torch.float32), MixedPrecision("fp16", patience=3)
    learner = Learner(net, DataLoaders(batches([8] * 5, torch.float32)), cross_entropy, 0.1, [scaler])
    seen = []

    class Overflow(Callback):
        order = 99

        def after_backward(self) -> None:
            if self.num == 0:
                net.parameters()[0].grad[0, 0] = torch.inf
            self.before = [p.clone() for p in net.parameters()]

        def after_step(self) -> None:
            moved = any(not torch.equal(a, b) for a, b in zip(self.before, net.parameters()))
            seen.append((self.num, moved, scaler.scale))

    learner.add_cb(Overflow())
    learner.fit(1)
    small, large = 2.0**15, 2.0**16
    assert seen == [(0, False, small), (1, True, small), (2, True, small), (3, True, large), (4, True, large)]
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(number: int, value: float) -> None:
    net, scaler = model(dtype=torch.float32), MixedPrecision("fp16")

    class Spoil(Callback):
        order = 99

        def after_backward(self) -> None:
            if self.num in (0, 2):  # before the optimizer has laid all side by side, and after
                net.parameters()[number].grad.view(-1)[-1] = value

    fit(net, batches([8] * 4, torch.float32), epochs=1, cbs=[scaler, Spoil()])
    assert (scaler.scale, scaler.good_steps) == (2.0**14, 1)
    assert all(p.isfinite().all() for p in net.parameters())


def test_an_average_that_was_loaded_lies_in_memory_as_the_weights_do() -> None:
    average = EMA(0.8)
    average.average = {"weight": torch.zeros(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)}
    given = torch.rand(4, 3, 2, 2)
    average.load_state_dict({"weight": given})
    assert torch.equal(average.average["weight"], given)
    assert average.average["weight"].is_contiguous(memory_format=torch.channels_last)


def test_one_cycle_gives_each_group_its_own_peak() -> None:
    net, cycle = model(), OneCycle(slice(1e-3, 1e-1))
    seen = []

    class See(Callback):
        order = 99

        def before_batch(self) -> None:
            seen.append([hypers["lr"] for _, hypers in self.opt.groups])

    learner = Learner(net, DataLoaders(batches([4] * 8)), cross_entropy, 0.1, [cycle, See()], splitter=body_and_head)
    learner.fit(1)
    assert seen[2] == pytest.approx([1e-3, 1e-1]) and len(seen) == 8
    assert all(body == pytest.approx(head / 100) for body, head in seen)
    assert cycle.lrs == [head for _, head in seen]


def test_one_cycle_moves_momentum_the_other_way_and_takes_fastais_shape() -> None:
    moms, shape = (0.95, 0.85, 0.9), {"anneal": cosine, "pct_start": 0.4, "div": 25.0, "div_final": 1e5}
    seen = []

    class Watch(Callback):
        order = 1

        def before_batch(self) -> None:
            seen.append((self.opt.lr, self.opt.momentum))

    fit(model(), batches([4] * 5), 2, [OneCycle(0.1, moms, **shape), Watch()], lambda ps, lr: SGD(ps, lr, momentum=0.9))
    wanted = [(one_cycle(n / 10, 0.1, **shape), one_cycle_momentum(n / 10, moms, cosine, 0.4)) for n in range(10)]
    assert seen == wanted and seen[4] == (0.1, 0.85)


class Rates(Callback):
    "Keeps each step's rates by parameter group, and how many parameters trained."

    order = 1

    def before_fit(self) -> None:
        self.seen: list[list[float]] = []
        self.trained: list[int] = []

    def before_batch(self) -> None:
        if self.model.training:
            self.seen.append([hypers["lr"] for _, hypers in self.opt.groups])
            self.trained.append(sum(p.requires_grad for p in self.model.parameters()))


def test_fine_tune_trains_the_head_and_then_all_at_fastais_rates() -> None:
    "Also where biases and BatchNorm are spared from decay: the rates are spread over layers, not over such pairs."
    net = model(norm=True)
    for opt_func in (SGD, lambda groups, lr: AdamW(no_decay_groups(net, body_and_head), lr, weight_decay=0.1)):
        rates = Rates()
        learn = Learner(net, DataLoaders(batches([4] * 5)), cbs=[rates], opt_func=opt_func, splitter=body_and_head)
        fine_tune(learn, 3, lr=0.02)
        body, head = ([row[place] for row in rates.seen] for place in (0, -1))
        assert all(set(row) == {row[0], row[-1]} for row in rates.seen)
        assert rates.trained == [4] * 5 + [6] * 15, "the head and BatchNorm, then all"
        assert head[0] == pytest.approx(0.02 / 25) and head[5] == pytest.approx(0.01 / 5)
        assert max(head[:5]) < 0.02 and max(head[5:]) == pytest.approx(0.01, rel=0.02)
        assert body[:5] == pytest.approx([rate / 10 for rate in head[:5]])
        assert body[5:] == pytest.approx([rate / 100 for rate in head[5:]])
        assert learn.cbs == [rates]
    with pytest.raises(UserError, match="splitter=body_and_head"):
        fine_tune(Learner(net, DataLoaders(batches([4]))), 1)


def test_a_replaced_head_is_all_that_is_new() -> None:
    net = model(norm=True)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert replace_head(net, 7) is net
    assert net(torch.zeros(2, 6, dtype=torch.float64)).shape == (2, 7)
    assert head_names(net) == ["2.weight", "2.bias"]
    kept = {name: tensor for name, tensor in net.state_dict().items() if name not in head_names(net)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.items() if "running" not in name)
