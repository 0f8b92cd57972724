"Layer groups: who is frozen, who decays, and what the optimizer is given."

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.batchnorm import BatchNorm
from learner.errors import UserError
from learner.groups import (
    body_and_head,
    freeze_to,
    head_names,
    layer_groups,
    no_decay_groups,
    one_group,
    replace_head,
)
from learner.layers import ConvLayer, Flatten, Linear
from learner.learner import Learner
from learner.models import MODELS, build, simple_cnn_bn
from learner.module import Module, Parameter
from learner.optim import SGD, Adam


def by_child(model: Module) -> list[list[Parameter]]:
    "A splitter: a group for each child that has parameters."
    return [child.parameters() for child in model.children if child.parameters()]


def trained(model: Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def norms(model: Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if ".norm." in name}


@pytest.mark.parametrize("name", MODELS)
def test_body_and_head_cuts_before_the_last_layer(name) -> None:
    model = build(name, 3, 7)
    body, head = layer_groups(model, body_and_head)
    assert [p.shape[0] for p in head] == [7, 7]
    assert len(body) + 2 == len(model.parameters())


def test_a_model_without_a_linear_layer_has_no_head() -> None:
    with pytest.raises(UserError, match="ConvLayer has no Linear layer"):
        body_and_head(ConvLayer(3, 4))


def test_a_head_that_is_named_so_is_the_head() -> None:
    class Gated(Module):
        def __init__(self) -> None:
            self.head, self.gate = Linear(4, 3), Linear(4, 4)

    assert head_names(Gated()) == ["head.weight", "head.bias"]
    assert replace_head(model := Gated(), 7).head.weight.shape == (7, 4) and model.gate.weight.shape == (4, 4)


def test_a_splitter_that_forgets_or_repeats_a_parameter_is_refused() -> None:
    model = simple_cnn_bn()
    with pytest.raises(UserError, match=r"puts 0\.weight into 0 groups"):
        layer_groups(model, lambda model: by_child(model)[1:])
    with pytest.raises(UserError, match=r"puts 0\.weight into 2 groups"):
        layer_groups(model, lambda model: [*by_child(model), by_child(model)[0]])


@given(st.integers(-5, 4))
def test_freeze_to_trains_the_groups_from_n_on_and_batchnorm(n) -> None:
    model = simple_cnn_bn()
    freeze_to(model, by_child(model), n)
    numbers = {"0": 0, "1": 1, "2": 2, "3": 3, "5": 4}  # 4 is the pool
    later = {name for name, _ in model.named_parameters() if numbers[name[0]] >= range(5)[n]}
    assert trained(model) == later | norms(model)


@pytest.mark.parametrize("n", [5, -6])
def test_freezing_everything_is_refused(n) -> None:
    model = simple_cnn_bn()
    with pytest.raises(UserError, match=rf"freeze_to\({n}\) leaves nothing to train: there are 5 groups"):
        freeze_to(model, by_child(model), n)


def test_requires_grad_sets_the_tree() -> None:
    model = simple_cnn_bn()
    assert model.requires_grad_(False) is model and not trained(model)
    model[3].requires_grad_()
    assert trained(model) == {"3.weight", "3.norm.weight", "3.norm.bias"}


def learner(model: Module, **options) -> Learner:
    "Trains on two batches of noise."
    stream = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 3, 16, 16, generator=stream), torch.arange(8) % 3) for _ in range(2)]
    return Learner(model, SimpleNamespace(train=batches, valid=None), lr=0.1, **options)


def test_a_frozen_learner_changes_the_head_and_batchnorm_alone() -> None:
    model = simple_cnn_bn(3, 3)
    learn = learner(model, splitter=body_and_head, opt_func=lambda ps, lr: SGD(ps, lr, 0.9, weight_decay=0.1))
    for freeze, expected in [(learn.freeze, {"5.weight", "5.bias"} | norms(model)), (learn.unfreeze, trained(model)),
                             (lambda: learn.freeze_to(1), {"5.weight", "5.bias"} | norms(model))]:  # fmt: skip
        freeze()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        statistics = [buffer.clone() for buffer in model.buffers()]
        learn.fit(1)
        assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == expected
        assert all(not torch.equal(buffer, old) for buffer, old in zip(model.buffers(), statistics))


def test_freezing_the_only_group_is_refused() -> None:
    with pytest.raises(UserError, match="pass splitter=body_and_head"):
        learner(simple_cnn_bn(3, 3)).freeze()


def test_layer_groups_have_rates_of_their_own() -> None:
    learn = learner(simple_cnn_bn(3, 3), splitter=by_child)
    learn.lr = slice(1e-4, 1.0)
    learn.fit(1)
    assert [hypers["lr"] for _, hypers in learn.opt.groups] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])
    single = learner(simple_cnn_bn(3, 3))
    single.fit(1)
    assert len(single.opt.groups) == 1 and one_group(single.model) == [single.model.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_no_decay_groups_spare_biases_and_batchnorm(name) -> None:
    model = build(name, 3, 7)
    weights, spared = (set(group["params"]) for group in no_decay_groups(model))
    assert weights | spared == set(model.parameters()) and not weights & spared
    assert all(p.dim() > 1 for p in weights) and all(p.dim() == 1 for p in spared)
    norm_parameters = {p for m in model.modules() if isinstance(m, BatchNorm) for p in m.parameters()}
    assert norm_parameters <= spared


@pytest.mark.parametrize("optimizer", [SGD, Adam])
def test_an_optimizer_decays_the_weights_alone(optimizer) -> None:
    model = Module()
    model.flat, model.head = Flatten(), Linear(4, 2)
    model.head.bias.data += 1
    opt = optimizer(no_decay_groups(model), lr=0.1, weight_decay=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    changed = [not torch.equal(p, old) for p, old in zip(model.parameters(), before)]
    assert changed == [True, False]


def test_no_decay_groups_pair_up_within_layer_groups() -> None:
    model = simple_cnn_bn()
    groups = no_decay_groups(model, body_and_head)
    assert [len(group["params"]) for group in groups] == [4, 8, 1, 1]
    assert [group.get("weight_decay") for group in groups] == [None, 0.0, None, 0.0]


def test_a_rate_is_spread_over_layer_groups_not_over_their_pairs() -> None:
    model = simple_cnn_bn()
    opt = SGD(no_decay_groups(model, by_child), slice(1e-4, 1.0), weight_decay=0.1)
    rates = [hypers["lr"] for _, hypers in opt.groups]
    assert rates == pytest.approx([rate for rate in (1e-4, 1e-3, 1e-2, 1e-1, 1) for _ in range(2)])
    opt.lr = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [hypers["lr"] for _, hypers in opt.groups] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert [hypers["weight_decay"] for _, hypers in opt.groups] == [0.1, 0.0] * 5
    with pytest.raises(UserError, match=r"2 values .* 5 groups"):
        opt.lr = [1.0, 2.0]
