"Models whose BatchNorms share their batch, compiled in pieces: the same numbers, asked for in the same order."

from typing import Any

import pytest
import torch
from torch import Tensor

from learner.batchnorm import BatchNorm
from learner.layers import AdaptivePool, Linear
from learner.module import Module, Sequential
from learner.pieces import in_pieces
from learner.xresnet import ResBlock


def model() -> Module:
    "With branches, both of which ask."
    torch.manual_seed(0)
    net = Sequential(ResBlock(3, 8, 2), AdaptivePool(), Linear(8, 4))
    for parameter in net.parameters():
        parameter.data.add_(torch.rand_like(parameter), alpha=0.1)  # the branches' last weights are zero
    return net


def norms(net: Module) -> list[BatchNorm]:
    return [module for module in net.modules() if isinstance(module, BatchNorm)]


def run(net: Module, x: Tensor, compiled: bool, backend: str = "aot_eager") -> tuple[list[Tensor], list[Tensor]]:
    "What was asked, as if another device had the same numbers; and output, gradients and statistics."
    asked: list[Tensor] = []

    def sum_(tensor: Tensor) -> None:
        asked.append(tensor.clone())
        tensor.mul_(2)

    for number, norm in enumerate(norms(net)):
        norm.sum_, norm.number = sum_, number
    forward: Any = net
    if compiled:
        compiler = in_pieces(torch._dynamo.lookup_backend(backend), norms(net))
        forward = torch.compile(lambda x: net(x), backend=compiler, dynamic=False, fullgraph=True)
    out = forward(x)
    grads = torch.autograd.grad(out.square().sum(), net.parameters())
    return asked, [out.detach(), *grads, *net.buffers()]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_all_is_asked_as_without(dtype: torch.dtype) -> None:
    x = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        (asked, found), (plain_asked, plain) = (run(model(), x, compiled) for compiled in (True, False))
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.5}
    assert len(asked) == 2 * 3
    torch.testing.assert_close(asked, plain_asked, **close)
    torch.testing.assert_close(found, plain, **close)


def test_in_evaluation_and_without_a_compiler_nothing_changes() -> None:
    net, x = model(), torch.randn(6, 3, 12, 12)
    expected = net.eval()(x)
    for number, norm in enumerate(norms(net)):
        norm.number = number
    assert torch.equal(torch.compile(lambda x: net(x), backend="eager", fullgraph=True)(x), expected)
