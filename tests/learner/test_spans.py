"Flat updates against updates of one parameter at a time, whatever is frozen, without gradient, moved or loaded."

import copy
import pickle
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import learner.spans
from learner.flat import views
from learner.layers import Linear
from learner.module import Module, Parameter
from learner.optim import LAMB, SGD, Adam, AdamW, Muon, Optimizer, RMSProp, per_tensor, sgd_step

SHAPES = [(3, 2), (4,), (), (2, 3, 2, 2), (1,)]
MAKERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: SGD(p, 0.1, weight_decay=0.01),
    "momentum": lambda p: SGD(p, 0.1, 0.9, 0.01),
    "rmsprop": lambda p: RMSProp(p, 0.01, momentum=0.9),
    "adamw": lambda p: AdamW(p, 0.01),
    "lamb": lambda p: LAMB(p, 0.01, weight_decay=0.1),
    "muon": lambda p: Muon(p, 0.01),
}
OFF, FROZEN, FREE = range(3)
days = st.lists(st.lists(st.sampled_from([OFF, FROZEN, FREE, FREE]), min_size=5, max_size=5), min_size=1, max_size=8)


def params() -> list[Parameter]:
    stream = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, dtype=torch.float64, generator=stream) for shape in SHAPES]
    made[3] = made[3].contiguous(memory_format=torch.channels_last)
    return [Parameter(t) for t in made]


def prepare(p: Parameter, number: int, day: int, mode: int) -> None:
    "Give a gradient or none, thaw or freeze."
    stream = torch.Generator().manual_seed(100 * day + number)
    p.grad = None if mode == OFF else torch.randn(p.shape, dtype=p.dtype, generator=stream)
    p.requires_grad_(mode == FREE)


@pytest.mark.parametrize("name", MAKERS)
@given(days)
def test_together_is_as_one_by_one(name: str, days: Sequence[Sequence[int]]) -> None:
    ours, alone = params(), params()
    whole, singles = MAKERS[name](ours), [MAKERS[name]([p]) for p in alone]
    for day, modes in enumerate(days):
        for number, mode in enumerate(modes):
            prepare(ours[number], number, day, mode)
            prepare(alone[number], number, day, mode)
        whole.step()
        for single in singles:
            single.step()
    assert_close([p.detach() for p in ours], [p.detach() for p in alone], rtol=1e-12, atol=1e-14)
    expected = {f"{n}{k[1:]}": t for n, single in enumerate(singles) for k, t in single.state_dict().items()}
    assert list(whole.state_dict()) == list(expected)
    for key, tensor in whole.state_dict().items():
        assert tensor.shape == expected[key].shape and tensor.dtype == expected[key].dtype, key
        assert_close(tensor, expected[key], rtol=1e-12, atol=1e-14, msg=key)


@given(days, st.integers(0, 7), st.sampled_from(["momentum", "adamw", "lamb", "muon"]))
def test_a_resumed_run_has_the_same_bits(days: Sequence[Sequence[int]], stop: int, name: str) -> None:
    straight, first, second = params(), params(), params()
    opt, before, after = MAKERS[name](straight), MAKERS[name](first), MAKERS[name](second)
    for day, modes in enumerate(days):
        if day == stop:
            for p, old in zip(second, first):
                p.data.copy_(old.data)
            after.load_state_dict(before.state_dict())
        for tensors, optimizer in ((straight, opt), (first, before) if day < stop else (second, after)):
            for number, mode in enumerate(modes):
                prepare(tensors[number], number, day, mode)
            optimizer.step()
    reached = first if stop >= len(days) else second
    assert all(torch.equal(a, b) for a, b in zip(straight, reached))


def calls(record: list[Tensor]) -> Callable[..., None]:
    "A part that notes what it is called with."
    return lambda p, grad, state: record.append(p)


def test_a_part_runs_once_for_all_and_on_the_parameters_own_memory() -> None:
    seen: list[Tensor] = []
    tensors = params()
    for p in tensors:
        p.grad = torch.ones_like(p)
    opt = Optimizer(tensors, [calls(seen)])
    opt.step()
    places = [p.data_ptr() for p in tensors]
    opt.step()
    assert len(seen) == 2 and seen[0].dim() == 1
    assert [p.data_ptr() for p in tensors] == places
    seen[1].zero_()
    assert not any(p.any() for p in tensors)


def test_blocks_change_nothing(monkeypatch) -> None:
    calls = Counter[int]()

    def replacing(p, grad, state, *, lr) -> Tensor:
        calls[block] += 1
        state["mean"] = 0.9 * state["mean"] + grad if "mean" in state else grad.clone()
        if "steps" in state:
            state["steps"].add_(1)
            state.setdefault("late", torch.zeros_like(grad)).add_(state["steps"])
        state.setdefault("steps", torch.ones(()))
        return state["mean"] / state["steps"]

    results = []
    for block in (7, 10**6):
        monkeypatch.setattr("learner.spans.BLOCK", block)
        for make in (MAKERS["momentum"], MAKERS["adamw"], lambda p: Optimizer(p, [replacing, sgd_step], lr=0.1)):
            tensors = params()
            opt = make(tensors)
            for day in range(4):
                for number, p in enumerate(tensors):
                    prepare(p, number, day, FREE)
                opt.step()
            results.append([*(p.detach() for p in tensors), *opt.state_dict().values()])
    assert calls[7] > 2 * calls[10**6]
    for cut, whole in zip(results[:3], results[3:]):
        assert_close(cut, whole, rtol=1e-14, atol=1e-15)


def test_frozen_neighbours_part_a_span() -> None:
    seen: list[Tensor] = []
    tensors = params()
    for p in tensors:
        p.grad = torch.ones_like(p)
    tensors[2].requires_grad_(False)
    opt = Optimizer(tensors, [calls(seen)])
    opt.step()
    assert len(seen) == 2
    tensors[2].requires_grad_(True)
    opt.step()
    assert len(seen) == 3, "thawed, and with the same past: one span again"


def test_a_part_that_needs_whole_parameters_gets_them() -> None:
    shapes = []

    @per_tensor
    def look(p, grad, *, lr):
        shapes.append((p.shape, grad.shape))
        return torch.ones_like(grad)

    def step(p, grad, state, *, lr) -> None:
        state["seen"] = grad.clone()
        p.sub_(grad, alpha=lr)

    tensors = params()
    for p in tensors:
        p.grad = torch.zeros_like(p)
    opt = Optimizer(tensors, [look, step], lr=1.0)
    opt.step()
    opt.step()
    assert shapes == [(torch.Size([1, *shape]),) * 2 for shape in SHAPES] * 2
    assert_close([p.detach() for p in tensors], [p.detach() - 2 for p in params()])


def by_shape(params: Sequence[Parameter]) -> list[list[int]]:
    return [[n for n, p in enumerate(params) if p.shape == shape] for shape in dict.fromkeys(p.shape for p in params)]


def test_on_a_gpu_those_of_one_shape_go_at_once() -> None:
    shapes = []

    @per_tensor
    def look(p, grad):
        shapes.append(p.shape)
        return grad

    tensors = [Parameter(torch.empty(shape, device="meta")) for shape in SHAPES + SHAPES[::-1]]
    for p in tensors:
        p.grad = torch.empty_like(p)
    Optimizer(tensors, [look]).step()
    assert shapes == [torch.Size([2, *shape]) for shape in SHAPES]
    assert learner.spans._alike(tensors) == by_shape(tensors)


@pytest.mark.parametrize("name", ["lamb", "muon"])
def test_at_once_they_get_what_each_would_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stepped() -> list[Tensor]:
        tensors = [*params(), *params()[::-1]]
        opt = MAKERS[name](tensors)
        for day in range(3):
            for number, p in enumerate(tensors):
                prepare(p, number, day, FREE)
            opt.step()
        return [p.detach() for p in tensors]

    alone = stepped()
    monkeypatch.setattr(learner.spans, "_alike", by_shape)
    together = stepped()
    assert_close(together, alone, rtol=1e-12, atol=1e-14)
    assert [p.stride() for p in together] == [p.stride() for p in alone]


def test_autograd_fills_the_flat_gradient_and_zeroing_is_one_call() -> None:
    net = Linear(3, 2)
    opt = SGD(net.parameters(), 0.1)
    net(torch.ones(1, 3)).sum().backward()
    opt.step()
    opt.zero_grad()
    grads = [p.grad for p in net.parameters()]
    net(torch.ones(1, 3)).sum().backward()
    assert all(p.grad is grad and grad.all() for p, grad in zip(net.parameters(), grads))
    (span,) = opt.spans
    assert [grad is span.grad for grad in opt.grads] == [True]
    assert span.grad.untyped_storage().data_ptr() == grads[1].untyped_storage().data_ptr()
    opt.zero_grad()
    assert not any(grad.any() for grad in grads)


def test_a_model_that_is_moved_goes_on() -> None:
    moved, stayed = (Linear(3, 2).double() for _ in range(2))
    stayed.load_state_dict(moved.state_dict())
    optimizers = [Adam(net.parameters(), 0.1) for net in (moved, stayed)]
    for step in range(4):
        if step == 2:
            moved.to(dtype=torch.float32).to(dtype=torch.float64)
        for net, opt in zip((moved, stayed), optimizers):
            net(torch.ones(1, 3, dtype=torch.float64)).square().sum().backward()
            opt.step()
            opt.zero_grad()
    for a, b in zip(moved.parameters(), stayed.parameters()):
        assert_close(a.detach(), b.detach(), rtol=1e-6, atol=1e-7)


def test_a_copy_of_a_model_is_its_own() -> None:
    net: Module = Linear(100, 100)
    opt = SGD(net.parameters(), 0.1)
    net(torch.ones(1, 100)).sum().backward()
    opt.step()
    twin = copy.deepcopy(net)
    opt.step()
    assert not torch.equal(twin.parameters()[0], net.parameters()[0])
    assert len(pickle.dumps(net.parameters()[1])) < 2000, "not the whole buffer"


@pytest.mark.parametrize("make", [Muon, LAMB])
def test_what_looks_at_each_parameter_takes_a_time_in_proportion_to_their_number(make, monkeypatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr("learner.spans.views", lambda flat, like: seen.append(len(like)) or views(flat, like))
    made = []
    for n in (5, 50):
        tensors = [Parameter(torch.ones(3, 3)) for _ in range(n)]
        for p in tensors:
            p.grad = torch.ones_like(p)
        opt = make(tensors, lr=0.1)
        opt.step()
        seen.clear()
        opt.step()
        made.append(sum(seen))
    assert 0 < made[1] <= 10 * made[0]
