"LSUV: orthonormal weights, unit variance in front of each activation, and nothing else touched."

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from learner.dropout import Dropout
from learner.errors import UserError
from learner.layers import AdaptivePool, Conv, ConvLayer, Linear
from learner.lsuv import lsuv, orthonormal
from learner.models import build
from learner.module import Module, Sequential
from learner.xresnet import xresnet18


def batch(n: int = 8, n_in: int = 3, side: int = 32) -> torch.Tensor:
    "Random pictures, far from mean 0 and variance 1."
    return 5 * torch.randn(n, n_in, side, side, generator=torch.Generator().manual_seed(0)) + 3


def small() -> Sequential:
    torch.manual_seed(0)
    convs = [ConvLayer(a, b, stride=2) for a, b in [(3, 8), (8, 16), (16, 16)]]
    return Sequential(*convs, AdaptivePool(), Dropout(0.5), Linear(16, 4))


@given(st.integers(1, 6), st.sampled_from([(3,), (8,), (2, 3, 3), (1, 1, 1)]), st.integers(0, 2**31))
def test_orthonormal_rows_or_columns(n_out, rest, seed) -> None:
    torch.manual_seed(seed)
    weight = orthonormal(torch.empty(n_out, *rest, dtype=torch.float64))
    assert weight.shape == (n_out, *rest)
    flat = weight.flatten(1)
    flat = flat if n_out <= flat.shape[1] else flat.T
    assert_close(flat @ flat.T, torch.eye(len(flat), dtype=torch.float64))


def test_no_rotation_is_favoured() -> None:
    torch.manual_seed(0)
    assert {orthonormal(torch.empty(1, 1)).item() for _ in range(20)} == {-1, 1}


def test_each_layer_gives_variance_one_before_its_activation() -> None:
    model, x = small(), batch()
    reported = lsuv(model, x)
    model.eval()
    for number in (0, 1, 2):  # the reference runs the layers one by one, without hooks
        before = torch.nn.functional.conv2d(x, model[number].weight, model[number].bias, 2, 1)
        assert before.var(correction=0).item() == pytest.approx(1, abs=0.01)
        assert reported[str(number)] == pytest.approx(before.var(correction=0).item(), rel=1e-4)
        x = before.relu()
    assert model(batch()).var(correction=0).item() == pytest.approx(1, abs=0.01)
    assert list(reported) == ["0", "1", "2", "5"]
    flat = model[1].weight.flatten(1)
    assert_close(flat @ flat.T / flat[0].square().sum(), torch.eye(16), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["simple_cnn_bn", "simple_net", "resnet18", "xresnet18"])
def test_whole_models_are_initialised_layer_by_layer(name) -> None:
    torch.manual_seed(0)
    model, x = build(name, 3, 5), batch(4)
    layers = [path for path, module in model.named_modules() if isinstance(module, Conv | Linear)]
    reported = lsuv(model, x)
    assert sorted(reported) == sorted(layers)
    assert all(variance == pytest.approx(1, abs=0.01) for variance in reported.values())
    assert model(x).isfinite().all()


def test_gates_that_see_zeros_are_left_as_they_are() -> None:
    model = build("xresnet18_mish_se_blur", 3, 5)
    gates = {name: t.clone() for name, t in model.state_dict().items() if ".reduce." in name or ".expand." in name}
    assert len(gates) == 4 * 8 and not any(f"{name}.weight" in gates for name in lsuv(model, batch(4)))
    assert_close({name: model.state_dict()[name] for name in gates}, gates, rtol=0, atol=0)


def test_statistics_modes_hooks_and_biases_are_left_alone() -> None:
    model = xresnet18(3, 5)
    model[1].training = False
    rest = {name: t.clone() for name, t in model.state_dict().items() if "norm" in name or "bias" in name}
    modes = [module.training for module in model.modules()]
    lsuv(model, batch(2))
    assert_close({name: model.state_dict()[name] for name in rest}, rest, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes and False in modes
    assert not any(module._hooks for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_bias_is_part_of_what_is_measured() -> None:
    layer = Linear(4, 3).double()
    layer.bias.data += torch.tensor([0.0, 0.5, 1.0])
    x = torch.randn(100, 4, dtype=torch.float64)
    assert lsuv(Sequential(layer), x)["0"] == pytest.approx(1, abs=0.01)
    assert layer(x).var(correction=0).item() == pytest.approx(1, abs=0.01)


def test_a_layer_used_twice_is_settled_at_its_first_use() -> None:
    class Twice(Module):
        def __init__(self) -> None:
            self.layer = Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    model, x = Twice(), 3 * torch.randn(50, 4)
    lsuv(model, x)
    assert model.layer(x).var(correction=0).item() == pytest.approx(1, abs=0.01)


def test_constant_and_empty_batches_are_refused_and_hooks_are_gone() -> None:
    model = small()
    with pytest.raises(UserError, match=r"layer 0 has variance 0\.0"):
        lsuv(model, torch.zeros(4, 3, 32, 32))
    assert not any(module._hooks for module in model.modules()) and model.training
    with pytest.raises(UserError, match="empty"):
        lsuv(model, batch(0))
