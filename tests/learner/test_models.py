"The models that a name chooses: their size, their shapes, and that all of each is trained."

import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from learner.batchnorm import BatchNorm
from learner.errors import UsageError
from learner.layers import BlurPool, ConvLayer
from learner.models import MODELS, build, named, simple_cnn, simple_cnn_bn
from learner.xresnet import ResBlock, SqueezeExcitation, xresnet18, xresnet50


@pytest.mark.parametrize("name", [*MODELS, "xresnet18_silu_se_blur"])
@pytest.mark.parametrize(("n_in", "n_out", "height", "width"), [(1, 2, 32, 32), (3, 7, 40, 33), (3, 10, 64, 128)])
def test_pictures_of_any_size_give_one_logit_a_class_and_reach_every_parameter(name, n_in, n_out, height, width):
    model = build(name, n_in, n_out)
    for p in model.parameters():
        p.data += 0.1 * torch.rand_like(p)  # away from starts at zero, behind which nothing gets a gradient
    logits = model(torch.randn(4, n_in, height, width))
    assert logits.shape == (4, n_out)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_simple_cnn_has_the_chapters_size() -> None:
    widths, n_out = [3, 16, 32, 64, 128], 10
    convs = sum(9 * a * b + b for a, b in pairwise(widths))
    assert sum(p.numel() for p in simple_cnn().parameters()) == convs + 128 * n_out + n_out


def test_only_simple_cnn_bn_normalises_and_after_each_convolution() -> None:
    def count(model) -> int:
        return sum(isinstance(module, BatchNorm) for module in model.modules())

    assert count(simple_cnn()) == 0 and count(simple_cnn_bn()) == 4


@pytest.mark.parametrize("refuse", [named, lambda name: build(name, 3, 10)])
def test_an_unknown_name_gets_the_nearest_and_the_list(refuse) -> None:
    with pytest.raises(UsageError) as caught:
        refuse("simple_cn")
    for part in ("'simple_cn'", "did you mean simple_cnn?", *MODELS, "_mish or _silu, _se", "_blur behind"):
        assert part in str(caught.value)
    assert named("simple_cnn") == (simple_cnn, {})


def test_an_xresnets_name_says_its_options() -> None:
    for name in ("xresnet18_mish_se_blur", "xresnet18_blur_mish_se"):
        assert named(name) == (xresnet18, {"act": "mish", "excite": True, "blur": True})
    assert named("xresnet50_silu") == (xresnet50, {"act": "silu"})
    model = build("xresnet18_mish_se_blur", 3, 10)
    kinds = [type(module) for module in model.modules()]
    assert BlurPool in kinds and SqueezeExcitation in kinds
    acts = {module.act for module in model.modules() if isinstance(module, ConvLayer | ResBlock)}
    assert acts == {"mish", False}, "False where a sum follows"


@pytest.mark.parametrize("name", ["xresnet18_", "xresnet18_mish_silu", "xresnet18_se_se", "resnet18_mish", "_mish",
                                  "simple_cnn_mish", "xresnet18_gelu", "xresnet", ""])  # fmt: skip
def test_options_that_there_are_not_are_refused(name) -> None:
    with pytest.raises(UsageError, match="is unknown"):
        build(name, 3, 10)


def test_on_meta_a_model_is_made_without_torchs_compiler() -> None:
    "Which takes a second to load, whenever a run's model is looked at, and leaves a folder in /tmp."
    code = "import sys, torch; from learner.models import MODELS, build; torch.set_default_device('meta')"
    code += "; [build(name, 3, 10) for name in MODELS]; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
