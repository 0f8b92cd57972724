"Our ResNets against the same nets of plain torch.nn, named as torchvision names them; and the other models' structure."

import copy
import functools

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from learner.batchnorm import BatchNorm
from learner.dropout import Dropout
from learner.errors import UserError
from learner.layers import BlurPool, Conv, ConvLayer
from learner.models import MODELS, build
from learner.resnet import load_torchvision, resnet18, resnet34, resnet50
from learner.xresnet import ResBlock, SqueezeExcitation, xresnet18, xresnet34, xresnet50

RESNETS = {resnet18: (2, 2, 2, 2), resnet34: (3, 4, 6, 3), resnet50: (3, 4, 6, 3)}


class TwinBlock(nn.Module):
    "torchvision's BasicBlock (two convolutions) or Bottleneck (three)."

    def __init__(self, shapes: list[tuple[int, int, int, int]], down: nn.Module | None) -> None:
        super().__init__()
        for i, (a, b, ks, stride) in enumerate(shapes, 1):
            setattr(self, f"conv{i}", nn.Conv2d(a, b, ks, stride, ks // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
        self.n, self.downsample = len(shapes), down

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.n + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = y.relu() if i < self.n else y
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


def twin_layer(n_in: int, width: int, depth: int, stride: int, deep: bool) -> nn.Sequential:
    n_out, blocks = width * (4 if deep else 1), []
    for number in range(depth):
        a, s = (n_in, stride) if number == 0 else (n_out, 1)
        basic = [(a, width, 3, s), (width, width, 3, 1)]
        shapes = [(a, width, 1, 1), (width, width, 3, s), (width, n_out, 1, 1)] if deep else basic
        fit = nn.Sequential(nn.Conv2d(a, n_out, 1, s, bias=False), nn.BatchNorm2d(n_out))
        blocks.append(TwinBlock(shapes, fit if s != 1 or a != n_out else None))
    return nn.Sequential(*blocks)


class Twin(nn.Module):
    "torchvision's ResNet."

    def __init__(self, depths: tuple[int, ...], deep: bool, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.maxpool, channels = nn.MaxPool2d(3, 2, 1), 64
        for i, (width, depth) in enumerate(zip((64, 128, 256, 512), depths), 1):
            setattr(self, f"layer{i}", twin_layer(channels, width, depth, 1 if i == 1 else 2, deep))
            channels = width * (4 if deep else 1)
        self.fc = nn.Linear(channels, n_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        return self.fc(x.mean([2, 3]))


@functools.cache
def twin_of(make, n_in: int = 3, n_out: int = 5) -> Twin:
    "A twin of `make`'s net in float64, with weights and statistics as if it had been trained."
    torch.manual_seed(1)
    twin = Twin(RESNETS[make], make is resnet50, n_in, n_out).double()
    for name, tensor in twin.state_dict().items():
        if "running" in name or ("bn" in name and "weight" in name):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return twin


def run(model, x: Tensor) -> dict[str, Tensor]:
    "Logits, gradients by name, and the input's."
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    return {"logits": y.detach(), "input": x.grad, **grads}


def images(n: int = 3, n_in: int = 3, side: int = 48) -> Tensor:
    "Random pictures in float64, channels last."
    x = torch.randn(n, n_in, side, side - 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("make", RESNETS)
def test_a_torchvision_state_dict_gives_the_same_outputs_and_gradients(make) -> None:
    twin, x = twin_of(make), images()
    ours = load_torchvision(make(3, 5).double(), twin.state_dict())
    for mode in (False, True):
        ours.train(mode)
        twin.train(mode)
        found, expected = run(ours, x), run(twin, x)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():  # relative to the tensor's scale: gradients of 0 are rounding
            assert (found[name] - tensor).abs().max() <= 1e-9 * max(1, tensor.abs().max()), name
    left = {name: t for name, t in twin.state_dict().items() if "num_batches_tracked" not in name}
    assert_close(ours.state_dict(), left, rtol=1e-9, atol=1e-9)  # running statistics moved alike


@pytest.mark.parametrize(("make", "count"), [(resnet18, 11_689_512), (resnet34, 21_797_672), (resnet50, 25_557_032)])
def test_parameter_counts_are_torchvisions(make, count) -> None:
    assert sum(p.numel() for p in make().parameters()) == count


def test_convolutions_start_as_torchvisions() -> None:
    torch.manual_seed(0)
    weight = resnet18().layer2[0].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)


def test_a_safetensors_file_loads(tmp_path) -> None:
    twin = copy.deepcopy(twin_of(resnet18)).float()
    save_file(twin.state_dict(), tmp_path / "weights.safetensors")
    ours = resnet18(3, 5)
    assert load_torchvision(ours, tmp_path / "weights.safetensors") is ours
    assert_close(ours.eval().double()(images()), twin.double().eval()(images()))


def test_without_its_head_a_state_serves_other_classes() -> None:
    twin, ours = twin_of(resnet18), resnet18(3, 7).double()
    own = ours.fc.weight.clone()
    load_torchvision(ours, twin.state_dict(), head=False)
    assert torch.equal(ours.fc.weight, own) and torch.equal(ours.conv1.weight, twin.conv1.weight)


def test_a_state_that_does_not_fit_is_refused_with_every_reason() -> None:
    state = dict(twin_of(resnet18).state_dict())
    state["module.x"] = state.pop("conv1.weight")
    ours = resnet18(3, 7).double()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_torchvision(ours, state)
    for part in (
        "missing: conv1.weight",
        "unexpected: module.x",
        "fc.weight has shape (5, 512), the model's is (7, 512)",
    ):
        assert part in str(caught.value)
    assert_close(ours.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", [*(name for name in MODELS if "34" not in name), "xresnet18_se_blur"])
@pytest.mark.parametrize("shared", [False, True])
def test_every_model_takes_an_empty_part_of_a_batch(name, shared) -> None:
    model = build(name, 3, 4)
    for module in model.modules():
        if isinstance(module, BatchNorm) and shared:
            module.sum_ = lambda tensor: tensor.add_(1)  # as if other ranks had samples
    y = model(torch.zeros(0, 3, 32, 32).to(memory_format=torch.channels_last))
    assert y.shape == (0, 4)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize("name", ["resnet18", "xresnet18", "xresnet50", "conv_net"])
def test_channels_last_goes_through_to_the_mean(name) -> None:
    formats = []

    def note(module, inputs, output) -> None:
        formats.append(output.is_contiguous(memory_format=torch.channels_last))

    model = build(name, 3, 4)
    for module in model.modules():
        if isinstance(module, Conv | ResBlock):
            module.register_forward_hook(note)
    model(images().float())
    assert len(formats) > 6 and all(formats)


def test_conv_nets_widths_follow_the_channels() -> None:
    def widths(n_in: int) -> list[int]:
        return [layer.weight.shape[0] for layer in build("conv_net", n_in, 2).modules() if isinstance(layer, ConvLayer)]

    assert widths(1) == [8, 16, 32, 64, 64, 128, 256]
    assert widths(3) == [16, 32, 64, 64, 64, 128, 256]
    assert widths(4) == [32, 64, 128, 64, 64, 128, 256]
    convs = [layer for layer in build("conv_net", 3, 2).modules() if isinstance(layer, ConvLayer)]
    assert [layer.stride for layer in convs] == [1] + [2] * 6 and all(layer.norm is not None for layer in convs)


@pytest.mark.parametrize("name", ["linear", "simple_net"])
def test_the_digit_chapters_models_see_28_by_28_pixels_themselves(name) -> None:
    model, x = build(name, 1, 2), images(2, 1, 28)[..., :1].expand(2, 1, 28, 28).float() + torch.arange(28)
    weights = model.parameters()
    y = x.reshape(2, 784) @ weights[0].T + weights[1]
    assert_close(model(x), y if name == "linear" else y.clamp(min=0) @ weights[2].T + weights[3])
    assert len(weights[1]) == (2 if name == "linear" else 30)
    larger = x.repeat_interleave(3, 2).repeat_interleave(3, 3)
    assert_close(model(larger), model(x))


@pytest.mark.parametrize(("make", "depths", "convs"), [(xresnet18, (2, 2, 2, 2), 2), (xresnet34, (3, 4, 6, 3), 2),
                                                       (xresnet50, (3, 4, 6, 3), 3)])  # fmt: skip
def test_xresnets_have_the_depth_of_their_names_and_all_tricks(make, depths, convs) -> None:
    model = make(4, 10)
    blocks = [module for module in model.modules() if isinstance(module, ResBlock)]
    assert len(blocks) == sum(depths)
    assert [layer.weight.shape[0] for layer in model.children[:3]] == [32, 32, 64]
    assert [layer.stride for layer in model.children[:3]] == [2, 1, 1]
    assert all(layer.weight.shape[2:] == (3, 3) for layer in model.children[:3])
    assert 1 + sum(depths) * convs + 1 == int(make.__name__.removeprefix("xresnet"))  # the stem counts as one
    for block in blocks:
        norms = [module for module in block.branch.modules() if isinstance(module, BatchNorm)]
        assert [bool(norm.weight.any()) for norm in norms] == [True] * (convs - 1) + [False]
        for layer in block.shortcut.modules():
            assert not isinstance(layer, Conv) or (layer.stride == 1 and layer.weight.shape[2:] == (1, 1))


def test_xresnet_options() -> None:
    model = xresnet18(3, 5, act="mish", blur=True, excite=True, dropout=0.2).double()
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(BlurPool) == 1 + 1 + 2 * 3 and kinds.count(SqueezeExcitation) == 8
    assert [module.p for module in model.modules() if isinstance(module, Dropout)] == [0.2]
    assert all(module.stride == 1 for module in model.modules() if isinstance(module, Conv))
    x = images()
    assert model(x).shape == (3, 5)
    plain = {name: tuple(t.shape) for name, t in xresnet18(3, 5).state_dict().items()}
    dropping = {name: tuple(t.shape) for name, t in xresnet18(3, 5, dropout=0.2).state_dict().items()}
    assert plain == dropping
