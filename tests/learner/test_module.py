"Module: what assignment registers, its hooks, and what walks the tree."

from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.errors import UserError
from learner.module import Buffer, Module, Parameter, Sequential


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


MAKE = {
    "parameter": lambda: Parameter(torch.zeros(1)),
    "buffer": lambda: Buffer(torch.zeros(1)),
    "module": Module,
    "plain": lambda: torch.zeros(1),
    "none": lambda: None,
}


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([*MAKE, "delete"])), max_size=12))
def test_names_are_those_of_the_attributes_whatever_is_assigned_and_deleted(steps: list[tuple[str, str]]) -> None:
    module, expected = Module(), {}
    for name, kind in steps:
        if kind != "delete":
            expected[name] = kind
            setattr(module, name, MAKE[kind]())
        elif expected.pop(name, None):
            delattr(module, name)
    for kind, found in (
        ("parameter", module.named_parameters()),
        ("buffer", module.named_buffers()),
        ("module", list(module.named_modules())[1:]),
    ):
        assert {name: id(value) for name, value in found} == {
            name: id(getattr(module, name)) for name in expected if expected[name] == kind
        }


def test_what_takes_the_place_of_a_layer_runs_in_its_place() -> None:
    model = Sequential(Affine(), Affine(), Affine())
    new = Affine()
    setattr(model, "0", new)
    assert model[0] is new and next(iter(model.state_dict())) == "0.weight" and len(model) == 3
    x = torch.rand(3)
    assert torch.equal(model(x), model[2](model[1](new(x))))


def test_deleting_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError):
        del Affine().nothing


def test_a_shared_tensor_or_module_counts_once() -> None:
    tree = Tree()
    assert [name for name, _ in tree.named_modules()] == ["", "first", "second"]
    assert list(tree.modules()) == [tree, tree.first, tree.second]
    assert [name for name, _ in tree.named_parameters()] == ["first.weight", "first.bias", "second.weight"]
    assert [id(p) for p in tree.parameters()] == [id(tree.first.weight), id(tree.first.bias), id(tree.second.weight)]
    assert [name for name, _ in tree.named_buffers()] == ["first.count", "first.scale", "second.count", "second.scale"]
    assert tree.children == [tree.first, tree.second, tree.first]


def test_training_reaches_the_whole_tree() -> None:
    tree = Tree()
    assert all(module.training for module in tree.modules())
    assert tree.eval() is tree and not any(module.training for module in tree.modules())
    tree.training = True
    assert all(module.training for module in tree.modules())
    tree.second.train(False)
    assert tree.training and tree.first.training and not tree.second.training


def test_a_module_without_forward_says_its_name() -> None:
    class Hollow(Module):
        pass

    with pytest.raises(TypeError, match="Hollow"):
        Hollow()(1)


def test_hooks_run_in_order_and_each_sees_what_the_one_before_made_of_the_output() -> None:
    module, seen = Affine(), []
    x = torch.rand(3)
    plain = module(x)
    module.register_forward_hook(lambda m, args, out: seen.append((m, args, out)))
    module.register_forward_hook(lambda m, args, out: out + 1)
    last = module.register_forward_hook(lambda m, args, out: out * 2)
    assert torch.equal(module(x), (plain + 1) * 2)
    owner, args, output = seen[0]
    assert owner is module and args == (x,) and torch.equal(output, plain)
    last.remove()
    last.remove()
    assert torch.equal(module(x), plain + 1)


def test_a_hook_may_remove_itself_during_a_call_without_hiding_the_next() -> None:
    module, calls = Affine(), []

    def once(m: Module, args: tuple, out: Tensor) -> None:
        calls.append("once")
        hook.remove()

    hook = module.register_forward_hook(once)
    module.register_forward_hook(lambda m, args, out: calls.append("always"))
    module(torch.rand(3))
    module(torch.rand(3))
    assert calls == ["once", "always", "always"]


def test_a_hook_as_context_manager_leaves_also_after_an_error() -> None:
    module = Affine()
    x = torch.rand(3)
    plain = module(x)
    with pytest.raises(ZeroDivisionError), module.register_forward_hook(lambda m, args, out: out * 0):
        assert not module(x).any()
        raise ZeroDivisionError
    assert torch.equal(module(x), plain)


@pytest.mark.parametrize("kind", [Parameter, Buffer])
def test_operations_give_plain_tensors_and_skip_torch_function(kind: type) -> None:
    tensor = kind(torch.ones(2, 3))
    results = [tensor * 2, 2 / tensor, tensor[0], tensor @ tensor.T, torch.stack([tensor]), tensor.clone(), tensor.data]
    assert {type(result) for result in [*results, tensor.detach()]} == {Tensor}
    assert not torch.overrides.has_torch_function((tensor,))
    with torch.no_grad():
        assert tensor.mul_(3) is tensor
    assert torch.equal(tensor, torch.full((2, 3), 3.0))


def test_only_parameters_get_gradients_and_these_are_plain() -> None:
    module = Affine()
    module.frozen = Parameter(torch.ones(3), requires_grad=False)
    (module(torch.ones(3)) * module.frozen).sum().backward()
    assert type(module.weight.grad) is Tensor and torch.equal(module.weight.grad, torch.ones(3))
    assert module.scale.grad is None and module.frozen.grad is None


def test_repr_shows_the_tree() -> None:
    text = repr(Sequential(Affine(2), Sequential(Affine(5))))
    assert "0: Affine(weight=(2,)" in text and "\n    0: Affine(weight=(5,)" in text


class Holder(Module):
    "Has one thing."

    def __init__(self, thing: object) -> None:
        self.thing = thing


@pytest.mark.parametrize("kept", [
    lambda: [Affine()], lambda: (None, Affine()), lambda: {"a": Affine()}, lambda: [Parameter(torch.zeros(1))],
    lambda: torch.nn.Linear(2, 2), lambda: torch.nn.Parameter(torch.zeros(1)),
    lambda: torch.nn.Sequential(torch.nn.Linear(1, 1)), lambda: [torch.nn.Linear(1, 1)],
])  # fmt: skip
def test_what_would_never_be_trained_is_refused(kept) -> None:
    with pytest.raises(UserError, match=r"Holder.thing is .* trained: "):
        Holder(kept())
    holder = Holder(Affine())
    before = holder.state_dict().keys()
    with pytest.raises(UserError):
        holder.thing = kept()
    assert holder.state_dict().keys() == before, "nothing has changed"


@pytest.mark.parametrize("kept", [(1, 2), {"a": torch.float32}, Mock, 3, [None]])
def test_the_compiler_can_follow_what_is_kept_in_a_forward(kept) -> None:
    class Keeps(Affine):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = kept
            self.seen = [x]
            return super().forward(x)

    model, x = Keeps(), torch.rand(2, 3)
    torch.compiler.reset()
    assert torch.equal(torch.compile(lambda x: model(x), fullgraph=True, backend="eager")(x), model(x))


def test_layers_that_are_found_may_be_in_a_list_too() -> None:
    holder = Holder(Affine())
    holder.weight = Parameter(torch.zeros(1))
    holder.both = [holder.thing, holder.weight]
    teacher = torch.nn.Linear(1, 1).requires_grad_(False)
    holder.teacher = teacher
    assert holder.teacher is teacher and holder.both[1] is holder.weight


@pytest.mark.parametrize(
    "kept", [[1, 2], (torch.zeros(1),), {"a": 1}, torch.nn.ReLU(), torch.nn.Linear, "text", Mock()]
)
def test_what_has_nothing_to_train_is_kept(kept) -> None:
    assert Holder(kept).thing is kept and not Holder(kept).parameters()


@pytest.mark.parametrize("layer", [torch.relu, torch.nn.ReLU(), None])
def test_a_layer_that_is_no_module_is_refused(layer) -> None:
    with pytest.raises(UserError, match=r"layer 1 of a Sequential is .*Lambda"):
        Sequential(Affine(), layer)
