"model_summary against published parameter and multiply-add counts, and against what the layers really are."

import pytest
import torch

from learner.batchnorm import BatchNorm
from learner.layers import AdaptivePool, ConvLayer, Linear
from learner.models import build
from learner.module import Module, Sequential
from learner.summary import model_summary

PUBLISHED = [("resnet18", 11_689_512, 1.814), ("resnet34", 21_797_672, 3.664), ("resnet50", 25_557_032, 4.089)]


@pytest.mark.parametrize(("name", "parameters", "giga"), PUBLISHED)
def test_resnets_cost_what_torchvision_says(name, parameters, giga) -> None:
    summary = model_summary(build(name, 3, 1000), (3, 224, 224))
    assert summary.parameters == summary.trainable == parameters
    assert summary.flops / 1e9 == pytest.approx(giga, abs=0.0006)


def test_rows_say_what_the_layers_are() -> None:
    model = Sequential(ConvLayer(3, 4, 2), ConvLayer(4, 8, norm=True), AdaptivePool(), Linear(8, 5))
    model[3].requires_grad_(False)
    rows = {row.name: row for row in model_summary(model, (3, 9, 7)).rows}
    assert list(rows) == ["0", "1", "1.norm", "2", "3"]
    assert [row.kind for row in rows.values()] == ["ConvLayer", "ConvLayer", "BatchNorm", "AdaptivePool", "Linear"]
    assert [row.shape for row in rows.values()] == [(4, 5, 4), (8, 5, 4), (8, 5, 4), (8,), (5,)]
    assert [row.parameters for row in rows.values()] == [4 * 27 + 4, 8 * 36, 16, 0, 45]
    assert [row.trainable for row in rows.values()] == [4 * 27 + 4, 8 * 36, 16, 0, 0]
    assert [row.flops for row in rows.values()] == [20 * 4 * 27, 20 * 8 * 36, 0, 0, 40]


def test_the_table_has_a_line_a_layer_and_the_totals() -> None:
    model = Sequential(ConvLayer(3, 8, norm=True), AdaptivePool(), Linear(8, 5))
    summary = model_summary(model, (3, 10, 10))
    head, rule, *lines, rule2, total = str(summary).splitlines()
    assert head.split() == ["layer", "kind", "output", "parameters", "trainable", "multiply-adds"]
    assert set(rule) == set(rule2) == {"-"} and len(lines) == len(summary.rows)
    assert lines[0].split() == ["0", "ConvLayer", "8", "x", "10", "x", "10", "216", "216", "21,600"]
    assert total.split() == ["total", "277", "277", "21,640"]
    assert len({len(line) for line in (rule, *lines, total)}) == 1


class Shares(Module):
    "One layer used twice, its weight in another layer too, and one that is never called."

    def __init__(self) -> None:
        self.first, self.second, self.idle = Linear(4, 4), Linear(4, 4), Linear(4, 1)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.first(x)))


def test_shared_parameters_count_once_and_work_at_each_use() -> None:
    model = Shares()
    summary = model_summary(model, (4,))
    assert [row.parameters for row in summary.rows] == [20, 4, 5]
    assert [row.flops for row in summary.rows] == [32, 16, 0]
    assert summary.parameters == sum(p.numel() for p in model.parameters())
    assert summary.rows[2].shape is None and "not called" in str(summary)


def test_the_model_is_left_as_it_was() -> None:
    model = build("xresnet18", 1, 3).double()
    model[4].training = False
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    model_summary(model, (1, 40, 40))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._hooks for module in model.modules())


def test_a_single_layer_and_a_model_without_parameters() -> None:
    assert model_summary(BatchNorm(3), (3, 2, 2)).parameters == 6
    assert model_summary(Sequential(AdaptivePool()), (3, 2, 2)).rows[0].shape == (3,)
