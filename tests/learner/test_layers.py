"Layers against torch's own with the same weights, and the spread with which weights start."

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from learner.layers import AdaptivePool, ConvLayer, Linear
from learner.module import Module

seeds = st.integers(0, 2**31)


def gradients(module: Module | nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    "Output, and the gradients of the sum of its squares by the input and each parameter."
    x = x.clone().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def torch_conv(ours: ConvLayer, n_in: int, n_out: int, ks: int) -> nn.Sequential:
    "The same layer of torch.nn, with the same weights."
    conv = nn.Conv2d(n_in, n_out, ks, ours.stride, ks // 2, bias=ours.norm is None)
    layers = [conv] + [nn.BatchNorm2d(n_out)] * (ours.norm is not None) + [nn.ReLU()] * ours.act
    theirs = nn.Sequential(*layers).double()
    with torch.no_grad():
        for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
            p.copy_(q)
    return theirs


@given(
    st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 2]), st.sampled_from([1, 3, 5]),
    st.booleans(), st.booleans(), st.integers(2, 9), st.integers(2, 9), seeds,
)  # fmt: skip
def test_conv_layer_equals_torchs(n_in, n_out, stride, ks, act, norm, height, width, seed) -> None:
    torch.manual_seed(seed)
    ours = ConvLayer(n_in, n_out, stride, ks, act, norm).double()
    for p in ours.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x = torch.randn(3, n_in, height, width, dtype=torch.float64)
    found, expected = gradients(ours, x), gradients(torch_conv(ours, n_in, n_out, ks), x)
    assert found[0].shape == (3, n_out, math.ceil(height / stride), math.ceil(width / stride))
    assert_close(found, expected)


def test_a_single_pixel_gives_the_same_gradient_each_time_in_bf16() -> None:
    "Torch's kernel for stride 2, on CPUs with bf16, left in it what happened to be in memory."
    torch.manual_seed(0)
    layer, x, found = ConvLayer(64, 10, stride=2), torch.randn(64, 64, 1, 1), []
    for number in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(x).float().square().mean()
        found += torch.autograd.grad(loss, layer.weight)
        torch.full_like(layer.weight, number * 1e30)  # such as this
    assert all(torch.equal(found[0], other) for other in found)
    wanted = torch.autograd.grad(layer(x).square().mean(), layer.weight)[0]
    assert_close(found[0], wanted, atol=0.02 * float(wanted.abs().max()), rtol=0.02)


@given(st.lists(st.integers(0, 3), max_size=2), st.integers(1, 5), st.integers(1, 5), seeds)
def test_linear_equals_torchs(before, n_in, n_out, seed) -> None:
    torch.manual_seed(seed)
    theirs, ours = nn.Linear(n_in, n_out).double(), Linear(n_in, n_out).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(*before, n_in, dtype=torch.float64)
    assert_close(gradients(ours, x), gradients(theirs, x))


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7))
def test_adaptive_pool_is_the_mean_over_the_picture(n, channels, height, width) -> None:
    x = torch.randn(n, channels, height, width, dtype=torch.float64)
    assert_close(AdaptivePool()(x), x.mean([2, 3]))


def kaiming_std(fan_in: int, fan_out: int) -> float:
    return nn.init.calculate_gain("relu") / math.sqrt(fan_in)


def xavier_std(fan_in: int, fan_out: int) -> float:
    return nn.init.calculate_gain("linear") * math.sqrt(2 / (fan_in + fan_out))


@pytest.mark.parametrize("ks", [1, 3])
@pytest.mark.parametrize(("act", "std"), [(True, kaiming_std), (False, xavier_std)])
def test_convolutions_start_by_kaiming_before_an_activation_and_else_by_xavier(ks, act, std) -> None:
    torch.manual_seed(1)
    weight = ConvLayer(256, 64, ks=ks, act=act).weight
    assert weight.std().item() == pytest.approx(std(256 * ks**2, 64 * ks**2), rel=0.02)
    assert abs(weight.mean().item()) < 0.02 * weight.std().item()


def test_linear_starts_by_xavier() -> None:
    torch.manual_seed(1)
    weight = Linear(300, 100).weight
    assert weight.std().item() == pytest.approx(xavier_std(300, 100), rel=0.02)


@pytest.mark.parametrize("layer", [ConvLayer(2, 3), ConvLayer(2, 3, act=False), Linear(2, 3)])
def test_biases_start_at_zero(layer) -> None:
    assert torch.equal(layer.bias, torch.zeros(3))


def test_no_bias_before_a_batchnorm_which_would_take_it_out_again() -> None:
    layer = ConvLayer(2, 3, norm=True)
    assert layer.bias is None
    assert [name for name, _ in layer.named_parameters()] == ["weight", "norm.weight", "norm.bias"]
