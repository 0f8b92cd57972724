"Module's state: saved and loaded, copied, pickled, moved and converted."

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from learner.errors import UserError
from learner.module import Buffer, Module, Parameter
from learner.optim import SGD


class Affine(Module):
    "x * weight + bias, with a count of its own."

    def __init__(self, n: int = 3) -> None:
        self.weight, self.bias = Parameter(torch.rand(n)), Parameter(torch.rand(n))
        self.count, self.scale = Buffer(torch.tensor(7)), Buffer(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * self.scale + self.bias


class Tree(Module):
    "Two Affines, one used under two names, and a parameter that two modules hold."

    def __init__(self) -> None:
        self.first, self.second = Affine(), Affine()
        self.again = self.first
        self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.second(self.first(x)))


def test_state_goes_from_one_tree_to_another() -> None:
    source, target = Tree(), Tree()
    target.first.count.zero_()
    parameters = target.parameters()
    assert target.load_state_dict(source.state_dict()) is target
    x = torch.rand(3)
    assert torch.equal(source(x), target(x)) and target.first.count == 7
    assert [id(p) for p in target.parameters()] == [id(p) for p in parameters]
    source.first.weight.data.add_(1)
    assert not torch.equal(source(x), target(x))


def test_state_dict_is_live_and_plain() -> None:
    module = Affine()
    state = module.state_dict()
    state["weight"].zero_()
    assert not module.weight.any()
    assert {type(tensor) for tensor in state.values()} == {Tensor}
    assert not any(tensor.requires_grad for tensor in state.values())


def test_a_state_that_does_not_fit_is_refused_whole_and_every_fault_named() -> None:
    module = Affine()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = {"weight": torch.zeros(3), "bias": torch.zeros(4), "scale": torch.zeros(3), "stray": torch.zeros(1)}
    with pytest.raises(UserError) as caught:
        module.load_state_dict(state)
    for part in ("Affine", "missing: count", "unexpected: stray", "bias has shape (4,), the model's is (3,)"):
        assert part in str(caught.value)
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in before)


def assert_independent_equal(one: Module, other: Module) -> None:
    "Same values and structure, no shared memory, and the copy's names mean the copy's tensors."
    x = torch.rand(3)
    assert torch.equal(one(x), other(x))
    assert [name for name, _ in one.named_parameters()] == [name for name, _ in other.named_parameters()]
    assert [p.requires_grad for p in one.parameters()] == [p.requires_grad for p in other.parameters()]
    assert [m.training for m in one.modules()] == [m.training for m in other.modules()]
    assert not {p.data_ptr() for p in one.parameters()} & {p.data_ptr() for p in other.parameters()}
    other.first.weight.data.add_(1)
    assert torch.equal(other.state_dict()["first.weight"], one.first.weight + 1)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda tree: pickle.loads(pickle.dumps(tree))])
def test_copies_are_independent_and_keep_what_is_shared_shared(duplicate) -> None:
    tree = Tree()
    tree.second.weight.requires_grad = False
    tree.second.eval()
    tree(torch.rand(3)).sum().backward()
    double = duplicate(tree)
    assert double.second.bias is double.first.bias and double.again is double.first
    assert type(double.first.weight) is Parameter and type(double.first.count) is Buffer
    assert_independent_equal(tree, double)


def test_a_deepcopy_takes_its_hooks_along() -> None:
    module = Affine()
    module.register_forward_hook(lambda m, args, out: out * 0)
    double = copy.deepcopy(module)
    module._hooks[0].remove()
    assert module(torch.ones(3)).all() and not double(torch.ones(3)).any()
    double._hooks[0].remove()
    assert double(torch.ones(3)).all()


def test_a_saved_state_loads_without_pickled_code(tmp_path: Path) -> None:
    source, target = Tree(), Tree()
    torch.save(source.state_dict(), tmp_path / "state.pt")
    target.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    x = torch.rand(3)
    assert torch.equal(source(x), target(x))


def test_to_converts_floats_in_place_and_leaves_integers() -> None:
    module = Affine()
    opt = SGD(module.parameters(), lr=0.5)
    module(torch.ones(3)).sum().backward()
    identities = [id(p) for p in module.parameters()]
    assert module.to(dtype=torch.float64) is module
    assert [id(p) for p in module.parameters()] == identities
    assert {p.dtype for p in module.parameters()} | {p.grad.dtype for p in module.parameters()} == {torch.float64}
    assert module.count.dtype is torch.int64 and module.scale.dtype is torch.float64 and module.count == 7
    assert module.to("cpu").weight.dtype is torch.float64
    before = module.bias.detach().clone()
    opt.zero_grad()
    module(torch.ones(3, dtype=torch.float64)).sum().backward()
    opt.step()
    assert torch.equal(module.bias, before - 0.5)
