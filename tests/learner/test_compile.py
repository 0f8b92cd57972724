"Training through torch.compile: the same training, told apart only by its last digits and its speed."

from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from torch import Tensor

from learner.batchnorm import batchnorms
from learner.callbacks import Compile, MixedPrecision, SetupLearner
from learner.callbacks.compile import LIMIT
from learner.data.loader import DataLoaders
from learner.data.normalize import Normalize
from learner.dropout import Dropout
from learner.layers import Activation, AdaptivePool, ConvLayer, Linear
from learner.learner import Callback, Learner
from learner.losses import cross_entropy
from learner.module import Module, Sequential
from tests.pretend_gpu import pretended

Graphs = list[Any]


def model() -> Module:
    "BatchNorm, whose statistics a step changes, and Dropout, whose masks a step decides."
    torch.manual_seed(0)
    return Sequential(ConvLayer(3, 8, 2, norm=True), AdaptivePool(), Dropout(0.3), Linear(8, 4))


def batches(*counts: int, size: int = 12) -> list[tuple[Tensor, Tensor]]:
    "Batches of so many pictures."
    stream = torch.Generator().manual_seed(1)
    pictures = [torch.randint(256, (n, size, size, 3), dtype=torch.uint8, generator=stream) for n in counts]
    return [(x, torch.randint(4, (len(x),), generator=stream)) for x in pictures]


def fitted(data: list[tuple[Tensor, Tensor]], *cbs: Callback, net: Module | None = None, epochs: int = 2) -> Module:
    "A model after some epochs."
    net = net or model()
    setup = SetupLearner("cpu", Normalize((0.5,) * 3, (0.25,) * 3))
    Learner(net, DataLoaders(data, data), cbs=[setup, *cbs]).fit(epochs)
    return net


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    "What was compiled, by a compiler that runs the graphs as they are: bit for bit what runs without."
    made: Graphs = []

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        made.append(graph)
        return graph.forward

    with patch.object(Compile, "backend", staticmethod(backend)):
        yield made


def same(one: Module, other: Module) -> bool:
    "Whether two models are equal bit for bit."
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_what_is_captured_is_all_of_the_model_and_the_loss(graphs: Graphs) -> None:
    told: list[str] = []
    assert same(fitted(batches(8, 8, 8), Compile(told.append)), fitted(batches(8, 8, 8)))
    assert len(graphs) == 2, "one for the model, one for the loss, for all epochs"
    assert not told


@pytest.mark.slow
def test_each_kind_of_batch_is_compiled_once(graphs: Graphs) -> None:
    data = [*batches(8, 5, 8, 5), *batches(8, 8, size=16)]
    assert same(fitted(data, Compile()), fitted(data))
    # the loss of the larger pictures is computed by the code that was there
    assert len(graphs) == 2 * 2 + 1


@pytest.mark.slow
def test_there_may_be_more_kinds_than_torch_keeps(graphs: Graphs) -> None:
    told: list[str] = []
    data = batches(*range(2, LIMIT + 6))
    assert same(fitted(data, Compile(told.append), epochs=1), fitted(data, epochs=1))
    assert len(graphs) == 2 * len(data)
    assert not told


def test_what_is_not_worth_it_goes_as_it_is(graphs: Graphs) -> None:
    never = Compile()
    never.worth = False
    assert same(fitted(batches(8), never), fitted(batches(8)))
    assert not graphs


def halved(preds: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(preds, targets) * 0.5


def test_a_loss_that_is_replaced_meanwhile_is_heeded(graphs: Graphs) -> None:
    class Milder(Callback):
        def before_epoch(self) -> None:
            if self.epoch == 1:
                self.learner.loss_func = halved

    data = batches(8, 8)
    assert same(fitted(data, Milder(), Compile(print), epochs=3), fitted(data, Milder(), epochs=3))
    assert len(graphs) == 4, "both anew"


@pytest.mark.parametrize("worth", [True, False])
def test_what_is_replaced_for_one_kind_of_batch_is_not_for_others(graphs: Graphs, worth: bool) -> None:
    class InTraining(Callback):
        seen: list[float]

        def before_batch(self) -> None:
            self.before = self.learner.loss_func
            if self.model.training:
                self.learner.loss_func = halved

        def after_loss(self) -> None:
            self.seen.append(self.learner.loss.item())

        def cleanup_batch(self) -> None:
            self.learner.loss_func = self.before

    data, losses = batches(8, 8), list[list[float]]()
    for cbs in ([Compile(print)], []):
        for one in cbs:
            one.worth = worth
        own = InTraining()
        own.seen = []
        losses.append(own.seen)
        fitted(data, own, *cbs)
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_frozen_layers_stay(graphs: Graphs) -> None:
    nets = [model(), model()]
    for net in nets:
        net.children[0].requires_grad_(False)
    assert same(fitted(batches(8, 8), Compile(), net=nets[0]), fitted(batches(8, 8), net=nets[1]))
    assert graphs


@pytest.mark.slow
def test_precision_is_kept(graphs: Graphs) -> None:
    assert same(fitted(batches(8, 8), Compile(), MixedPrecision("bf16")), fitted(batches(8, 8), MixedPrecision("bf16")))
    assert graphs


def test_hooks_are_seen_to(graphs: Graphs) -> None:
    net, told, seen = model(), list[str](), []
    with net.children[0].register_forward_hook(lambda *args: seen.append(1)):
        fitted(batches(8, 8), Compile(told.append), net=net, epochs=1)
    assert len(seen) == 4, "two batches of training, and of validation"
    assert len(told) == 1
    assert "hooks look at its layers" in told[0]
    assert not graphs


class Peculiar(Activation):
    "What no compiler can capture as one graph."

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.detach().sum()) > 0 else x


def fails(graph: Any, inputs: Any) -> Any:
    "A compiler that does not work."
    raise OSError("no compiler\nis here")


@pytest.mark.parametrize("what", ["compiler", "model"])
def test_what_can_not_be_compiled_trains_as_it_is(what: str, graphs: Graphs) -> None:
    told: list[str] = []
    nets = [Sequential(model(), Peculiar()) if what == "model" else model() for _ in range(2)]
    with patch.object(Compile, "backend", staticmethod(fails if what == "compiler" else Compile.backend)):
        compiled = fitted(batches(8, 8, 5), Compile(told.append), net=nets[0])
    assert same(compiled, fitted(batches(8, 8, 5), net=nets[1]))
    assert len(told) == 1
    assert told[0].startswith("the model trains uncompiled: ")
    assert "\n" not in told[0]
    assert what == "model" or told[0].endswith("no compiler")


@pytest.mark.slow
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_inductor_makes_the_same_training(precision: str | None) -> None:
    cbs = [MixedPrecision(precision)] if precision else []
    plain, *compiled = (fitted(batches(8, 8, 5), *cbs, *more) for more in ([], [Compile()], [Compile()]))
    assert same(*compiled)
    for a, b in zip(plain.state_dict().values(), compiled[0].state_dict().values(), strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-4 if precision is None else 2e-2, atol=1e-5 if precision is None else 2e-3
        )


@pytest.mark.slow
def test_inductor_drops_the_same_elements() -> None:
    layer, x = Dropout(0.3), torch.ones(5, 40)
    layer.keys = torch.arange(5) * 987654321987
    expected = layer(x)
    layer.calls = 0
    assert torch.equal(torch.compile(lambda x: layer(x), fullgraph=True)(x), expected)


def test_only_a_gpus_kernels_are_recorded_as_graphs() -> None:
    "Not where BatchNorm asks other devices in the midst: of the pieces, each would be a graph of its own."
    made = Mock(side_effect=lambda function, **options: function)
    with pretended(), patch.object(torch, "compile", made):
        for device in ("cpu", "cuda"):
            net, compiled = model().to(device), Compile()
            Learner(net, DataLoaders([]), cbs=[compiled])("before_fit")
            next(norm for norm in batchnorms(net)).sum_ = lambda total: total
            compiled._note_sharing()
    assert [call.kwargs["mode"] for call in made.call_args_list] == [None] * 4 + ["reduce-overhead"] * 2 + [None] * 2
