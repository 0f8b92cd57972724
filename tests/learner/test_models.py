"The models that a name chooses: their size, their shapes, and that all of each is trained."

from itertools import pairwise

import pytest
import torch

from learner.batchnorm import BatchNorm
from learner.errors import UsageError
from learner.models import MODELS, build, check_name, simple_cnn, simple_cnn_bn


@pytest.mark.parametrize("name", MODELS)
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


@pytest.mark.parametrize("refuse", [check_name, lambda name: build(name, 3, 10)])
def test_an_unknown_name_gets_the_nearest_and_the_list(refuse) -> None:
    with pytest.raises(UsageError) as caught:
        refuse("simple_cn")
    for part in ("'simple_cn'", "did you mean simple_cnn?", *MODELS):
        assert part in str(caught.value)
    check_name("simple_cnn")
