"ActivationStats against numbers computed from the outputs themselves, step by step, and added up over parts."

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from learner.callbacks.activations import ActivationStats, activation_sums, layer_stats
from learner.layers import ConvLayer
from learner.learner import Callback, CancelFitException, Learner
from learner.models import simple_cnn


class Keep(Callback):
    "Keeps what the layers gave in each training batch."

    order = 4

    def before_fit(self) -> None:
        self.outputs: dict[str, list[torch.Tensor]] = {}
        for name, module in self.model.named_modules():
            if name:
                module.register_forward_hook(self.keep(name))

    def keep(self, name: str):
        def hook(module, inputs, output) -> None:
            if module.training:
                self.outputs.setdefault(name, []).append(output.detach().clone())

        return hook


def learner(*cbs: Callback, batches: int = 3) -> Learner:
    "A small net on noise, with a validation."
    torch.manual_seed(0)
    data = [(3 * torch.randn(6, 3, 16, 16), torch.arange(6) % 3) for _ in range(batches)]
    return Learner(simple_cnn(3, 3), SimpleNamespace(train=data, valid=data[:1]), lr=0.1, cbs=cbs)


def test_numbers_are_those_of_the_outputs_at_each_training_step() -> None:
    kept, found = Keep(), ActivationStats(near=0.1, limit=2.0, bins=8)
    learner(found, kept).fit(2)
    assert set(found.sums) == {"0", "1", "2", "3", "4", "5"} == set(kept.outputs)
    for name, outputs in kept.outputs.items():
        assert list(found.sums[name]) == [0, 1, 2, 3, 4, 5]
        stats = found.stats(name)
        for step, x in enumerate(output.double() for output in outputs):
            assert_close(stats.mean[step], x.mean())
            assert_close(stats.std[step], x.std(correction=0))
            assert_close(stats.near_zero[step], (x.abs() < 0.1).double().mean())
            counts, _ = np.histogram(x.clamp(-2, 2).numpy(), 8, (-2, 2))
            assert stats.histogram[step].tolist() == counts.tolist()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.sampled_from([torch.float32, torch.bfloat16]))
def test_sums_of_parts_add_up_to_those_of_the_whole(sizes, dtype) -> None:
    x = torch.randn(sum(sizes), 2, 3).to(dtype)
    whole = activation_sums(x, 0.05, 3.0, 10)
    assert_close(torch.stack([activation_sums(part, 0.05, 3.0, 10) for part in x.split(sizes)]).sum(0), whole)
    assert whole[0] == whole[4:].sum() == x.numel()


def test_a_large_mean_does_not_hide_the_spread() -> None:
    x = torch.randn(1000, dtype=torch.float64) + 1e5
    stats = layer_stats(activation_sums(x, 0.1, 1.0, 4)[None])
    assert_close(stats.std[0], x.std(correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_shows(bad) -> None:
    stats = layer_stats(activation_sums(torch.tensor([1.0, bad]), 0.1, 1.0, 4)[None])
    assert not stats.mean.isfinite() and not stats.std.isfinite()


def test_every_chooses_steps_and_choose_layers() -> None:
    found = ActivationStats(lambda name, module: isinstance(module, ConvLayer), every=2)
    learner(found).fit(1)
    assert {name: list(steps) for name, steps in found.sums.items()} == {str(i): [0, 2] for i in range(4)}


def test_the_parts_of_a_step_add_up() -> None:
    found = ActivationStats()
    learn = learner(found)
    learn.step = lambda: None  # type: ignore[method-assign]
    learn.fit(1)  # the step counter stands: as in gradient accumulation, all batches belong to one step
    assert list(found.sums["5"]) == [0]
    assert found.sums["5"][0][0] == 3 * 6 * 3


class StopAt(Callback):
    def after_step(self) -> None:
        raise CancelFitException


def test_hooks_go_with_the_fit_however_it_ends_and_a_new_fit_starts_afresh() -> None:
    found = ActivationStats()
    learn = learner(found, StopAt())
    learn.fit(1)
    assert not any(module._hooks for module in learn.model.modules())
    assert list(found.sums["0"]) == [0]
    learn.cbs.remove(learn.cbs[0] if isinstance(learn.cbs[0], StopAt) else learn.cbs[1])
    learn.fit(1)
    assert list(found.sums["0"]) == [0, 1, 2]


def test_training_is_the_same_with_and_without() -> None:
    learns = learner(ActivationStats()), learner()
    for learn in learns:
        learn.fit(1)
    assert_close(*(learn.model.state_dict() for learn in learns), rtol=0, atol=0)
