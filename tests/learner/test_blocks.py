"Activations, pools, blocks and the convolution itself against independent computations in float64."

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from learner.batchnorm import BatchNorm
from learner.errors import UsageError
from learner.layers import (
    ACTIVATIONS,
    Activation,
    AdaptivePool,
    AvgPool,
    BlurPool,
    Conv,
    ConvLayer,
    Flatten,
    Lambda,
    MaxPool,
)
from learner.module import Module
from learner.xresnet import ResBlock, SqueezeExcitation

seeds = st.integers(0, 2**31)
sides = st.integers(1, 9)


def pictures(seed: int, *shape: int) -> Tensor:
    "Random numbers in float64, channels last."
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.to(memory_format=torch.channels_last) if len(shape) == 4 else x


def gradients(module: Module | nn.Module, x: Tensor) -> list[Tensor]:
    "Output, and the gradients of the sum of its squares by the input and each parameter."
    x = x.clone().requires_grad_()
    for p in module.parameters():
        p.grad = None
    y = module(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def unfolded(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    "A convolution as one matrix product with all patches of the picture: the oracle."
    n, _, height, width = x.shape
    n_out, _, *ks = weight.shape
    patches = F.unfold(x, ks, padding=padding, stride=stride)  # (n, n_in * ks * ks, places)
    y = weight.flatten(1) @ patches
    size = [(side + 2 * padding - k) // stride + 1 for side, k in zip((height, width), ks)]
    return (y if bias is None else y + bias[:, None]).view(n, n_out, *size)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 3, 5]), st.sampled_from([1, 2, 3]),
       st.booleans(), sides, sides, seeds)  # fmt: skip
def test_convolution_equals_unfold(n, n_in, n_out, ks, stride, bias, height, width, seed) -> None:
    conv = Conv(n_in, n_out, ks, stride, bias).double()
    if conv.bias is not None:
        conv.bias.data += torch.arange(n_out)
    oracle = Lambda(lambda x: unfolded(x, conv.weight, conv.bias, stride, ks // 2))
    oracle.conv = conv
    x = pictures(seed, n, n_in, height, width)
    found, expected = gradients(conv, x), gradients(oracle, x)
    assert found[0].shape == (n, n_out, math.ceil(height / stride), math.ceil(width / stride))
    assert_close(found, expected)


FORMULAS = {"relu": lambda x: x.clamp(min=0), "silu": lambda x: x / (1 + (-x).exp()),
            "mish": lambda x: x * (1 + x.exp()).log().tanh()}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_their_formulas_and_leave_the_input_alone(name) -> None:
    x = torch.linspace(-6, 6, 99, dtype=torch.float64)
    before = x.clone()
    assert_close(Activation(name)(x), FORMULAS[name](x))
    assert torch.equal(x, before)


def test_an_unknown_activation_names_the_known() -> None:
    with pytest.raises(UsageError, match="'swish' is unknown; choose one of relu, silu, mish"):
        Activation("swish")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_conv_layer_takes_an_activation_by_name(name) -> None:
    layer = ConvLayer(2, 3, act=name, norm=True).double()
    plain = ConvLayer(2, 3, act=False, norm=True).double()
    plain.load_state_dict(layer.state_dict())
    x = pictures(0, 4, 2, 5, 5)
    assert_close(layer(x), FORMULAS[name](plain(x)))


def patches(x: Tensor, ks: int, stride: int, outside: float) -> Tensor:
    "All ks x ks patches around every `stride`th pixel: (n, c, h, w, ks * ks), with `outside` beyond the edge."
    padded = F.pad(x, [ks // 2] * 4, value=outside)
    return padded.unfold(2, ks, stride).unfold(3, ks, stride).flatten(4)


@given(st.integers(1, 2), sides, sides, st.sampled_from([(3, 2), (3, 1), (5, 2)]), seeds)
def test_max_pool_is_the_largest_around(n, height, width, how, seed) -> None:
    x = pictures(seed, n, 2, height, width)
    assert torch.equal(MaxPool(*how)(x), patches(x, *how, outside=-math.inf).amax(-1))


@given(st.integers(1, 2), sides, sides, seeds)
def test_avg_pool_is_the_mean_of_what_each_square_holds(n, height, width, seed) -> None:
    x = pictures(seed, n, 2, height, width)
    padded = F.pad(x, [0, width % 2, 0, height % 2], value=math.nan)
    squares = padded.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    assert_close(AvgPool()(x), squares.nanmean(-1))


@given(st.integers(1, 2), sides, sides, seeds)
def test_blur_pool_is_the_binomial_filter_at_every_second_pixel(n, height, width, seed) -> None:
    x = pictures(seed, n, 2, height, width)
    filter1 = torch.tensor([1.0, 2, 1], dtype=torch.float64) / 4
    filters = torch.outer(filter1, filter1).expand(2, 1, 3, 3)
    expected = F.conv2d(F.pad(x, [1] * 4, mode="replicate"), filters, stride=2, groups=2)
    assert_close(BlurPool()(x), expected)
    assert_close(BlurPool()(torch.ones_like(x)), torch.ones_like(expected))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_adaptive_pool_averages_the_cells_of_a_grid(size) -> None:
    x = pictures(0, 2, 3, 4, 8)
    cells = x.reshape(2, 3, size, 4 // size, size, 8 // size).mean([3, 5])
    assert_close(AdaptivePool(size)(x), cells.flatten(1))


def test_flatten_and_lambda() -> None:
    x = pictures(0, 2, 3, 4, 5)
    assert torch.equal(Flatten()(x), x.reshape(2, 60))
    assert torch.equal(Lambda(torch.add)(x, x), 2 * x)


def test_squeeze_excitation_scales_channels_by_what_their_means_say() -> None:
    torch.manual_seed(0)
    block, x = SqueezeExcitation(8, reduction=4).double(), pictures(0, 3, 8, 5, 4)
    assert [tuple(p.shape) for p in block.parameters()] == [(2, 8), (2,), (8, 2), (8,)]
    for p in block.parameters():
        p.data += 0.1
    down, down_bias, up, up_bias = block.parameters()
    hidden = torch.einsum("nchw,kc->nk", x, down) / 20 + down_bias
    scale = 1 / (1 + (-(hidden.clamp(min=0) @ up.T + up_bias)).exp())
    assert_close(block(x), torch.einsum("nchw,nc->nchw", x, scale))


class TwinBlock(nn.Module):
    "A ResBlock of torch.nn."

    def __init__(self, n_in: int, n_out: int, stride: int, bottleneck: bool, act: str) -> None:
        super().__init__()
        inner = n_out // 4
        shapes = [(n_in, inner, 1, 1), (inner, inner, 3, stride), (inner, n_out, 1, 1)]
        shapes = shapes if bottleneck else [(n_in, n_out, 3, stride), (n_out, n_out, 3, 1)]
        self.act = {"relu": nn.ReLU, "silu": nn.SiLU, "mish": nn.Mish}[act]()
        parts: list[nn.Module] = []
        for a, b, ks, s in shapes:
            parts += [nn.Conv2d(a, b, ks, s, ks // 2, bias=False), nn.BatchNorm2d(b), self.act]
        self.branch = nn.Sequential(*parts[:-1])
        down = [nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)] if stride == 2 else []
        fit = [nn.Conv2d(n_in, n_out, 1, bias=False), nn.BatchNorm2d(n_out)] if n_in != n_out else []
        self.shortcut = nn.Sequential(*down, *fit)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.branch(x) + self.shortcut(x))


@given(st.sampled_from([4, 8]), st.sampled_from([4, 8]), st.sampled_from([1, 2]), st.booleans(),
       st.sampled_from(list(ACTIVATIONS)), st.integers(2, 7), st.integers(2, 7), seeds)  # fmt: skip
def test_res_block_equals_its_twin(n_in, n_out, stride, bottleneck, act, height, width, seed) -> None:
    torch.manual_seed(seed)
    ours = ResBlock(n_in, n_out, stride, bottleneck, act).double()
    twin = TwinBlock(n_in, n_out, stride, bottleneck, act).double()
    for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
        p.data += 0.3 * torch.rand_like(p)
        q.data.copy_(p)
    x = pictures(seed, 3, n_in, height, width)
    assert_close(gradients(ours, x), gradients(twin, x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("excite", [False, True])
def test_a_res_block_starts_as_its_shortcut(bottleneck, excite) -> None:
    x = pictures(1, 2, 8, 6, 6)
    block = ResBlock(8, 8, bottleneck=bottleneck, excite=excite).double()
    assert torch.equal(block(x), x.clamp(min=0))


@pytest.mark.parametrize("stride", [1, 2])
def test_blur_halves_branch_and_shortcut_behind_whole_convolutions(stride) -> None:
    block, x = ResBlock(4, 8, stride, blur=True).double(), pictures(0, 2, 4, 7, 6)
    blurs = [module for module in block.modules() if isinstance(module, BlurPool)]
    assert len(blurs) == (2 if stride == 2 else 0)
    assert all(module.stride == 1 for module in block.modules() if isinstance(module, Conv))
    assert not any(isinstance(module, AvgPool) for module in block.modules())
    assert block(x).shape == (2, 8, math.ceil(7 / stride), math.ceil(6 / stride))


KEEPING = [Activation("silu"), MaxPool(), AvgPool(), BlurPool(), SqueezeExcitation(4), ResBlock(4, 8)]
LAYERS = [*KEEPING, AdaptivePool(), AdaptivePool(3), Flatten(), ResBlock(4, 8, 2, blur=True, excite=True),
          ResBlock(4, 8, 2, bottleneck=True)]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("shared", [False, True])
def test_an_empty_batch_passes_forth_and_back(layer, shared) -> None:
    for module in layer.modules():
        if isinstance(module, BatchNorm):
            module.sum_ = (lambda tensor: tensor.add_(1)) if shared else None  # as if other ranks had samples
    x = torch.zeros(0, 4, 6, 5).to(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    assert y.shape[0] == 0 and y.shape[1:] == layer(torch.zeros(2, 4, 6, 5)).shape[1:]
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("layer", KEEPING, ids=lambda layer: type(layer).__name__)
def test_channels_last_stays_channels_last(layer) -> None:
    y = layer(pictures(0, 2, 4, 6, 6).float())
    assert y.is_contiguous(memory_format=torch.channels_last)
