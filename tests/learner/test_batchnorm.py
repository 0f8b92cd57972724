"BatchNorm against torch's, on one device and on a batch that is spread over simulated ones."

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from learner.batchnorm import BatchNorm, _backward, _backward_on_gpu, shared_statistics

seeds = st.integers(0, 2**31)
pictures = st.sampled_from([(), (1, 1), (2, 3), (4, 4)])


class SharedSum:
    "Sums a tensor over threads, each of which holds a part of the batch."

    def __init__(self, n: int) -> None:
        self.barrier, self.parts = Barrier(n, timeout=20), [torch.empty(0)] * n

    def of(self, rank: int):
        def sum_(tensor: Tensor) -> None:
            self.parts[rank] = tensor.clone()
            self.barrier.wait()
            total = torch.stack(self.parts).sum(0)
            self.barrier.wait()  # nobody may bring the next part before all have read this one
            tensor.copy_(total)

        return sum_


def on_devices(run, n: int) -> list:
    "What `run(rank, sum_)` gives on each of n threads that share a sum."
    shared = SharedSum(n)
    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(lambda rank: run(rank, shared.of(rank)), range(n)))


def pair(channels: int, picture: tuple[int, ...], seed: int, **options: float) -> tuple[BatchNorm, nn.Module]:
    "Ours and torch's in float64, with the same random weights and statistics."
    stream = torch.Generator().manual_seed(seed)
    ours = BatchNorm(channels, **options).double()
    for tensor in ours.state_dict().values():
        tensor.copy_(torch.rand(channels, generator=stream) + 0.5)
    theirs = (nn.BatchNorm2d if picture else nn.BatchNorm1d)(channels, **options).double()
    theirs.load_state_dict({**ours.state_dict(), "num_batches_tracked": torch.tensor(0)})
    return ours, theirs


def batch(seed: int, *shape: int) -> Tensor:
    "Random numbers in float64 whose channels differ in mean and spread."
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    channel = torch.arange(shape[1], dtype=torch.float64).view(-1, *[1] * (len(shape) - 2))
    return x * (channel + 1) + 3 * channel


def run(layer, x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    "Output, and the gradients of its weighted sum: by input, weight and bias."
    x = x.clone().requires_grad_()
    layer.weight.grad = layer.bias.grad = None
    y = layer(x)
    (y * weights).sum().backward()
    return y.detach(), x.grad, layer.weight.grad, layer.bias.grad


def running(layer) -> tuple[Tensor, Tensor]:
    return layer.running_mean.data, layer.running_var.data


@given(st.integers(2, 6), st.integers(1, 4), pictures, seeds, st.sampled_from([0.1, 0.5]), st.sampled_from([1e-5, 0.1]))
def test_one_device_equals_torch(n, channels, picture, seed, momentum, eps) -> None:
    ours, theirs = pair(channels, picture, seed, momentum=momentum, eps=eps)
    for step in range(3):
        x, weights = (batch(seed + 2 * step + i, n, channels, *picture) for i in range(2))
        assert_close(run(ours, x, weights), run(theirs, x, weights))
        assert_close(running(ours), running(theirs))
    ours.eval()
    theirs.eval()
    assert_close(run(ours, x, weights), run(theirs, x, weights))
    assert_close(running(ours), running(theirs))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.integers(1, 3), pictures, seeds)
def test_a_spread_batch_equals_torch_on_the_whole(sizes, channels, picture, seed) -> None:
    assume(sum(sizes) > 1)
    ours, theirs = pair(channels, picture, seed)
    x, weights = (batch(seed + i, sum(sizes), channels, *picture) for i in range(2))
    parts, part_weights = x.split(sizes), weights.split(sizes)
    layers = [copy.deepcopy(ours) for _ in sizes]

    def on_one(rank: int, sum_) -> tuple[Tensor, ...]:
        layers[rank].sum_ = sum_
        return run(layers[rank], parts[rank], part_weights[rank])

    outputs, x_grads, weight_grads, bias_grads = zip(*on_devices(on_one, len(sizes)))
    found = torch.cat(outputs), torch.cat(x_grads), sum(weight_grads), sum(bias_grads)
    assert_close(found, run(theirs, x, weights), atol=1e-9, rtol=1e-9)
    for layer in layers:
        assert_close(running(layer), running(theirs))
        assert torch.equal(layer.running_var, layers[0].running_var)


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
def test_a_large_mean_in_float32_does_not_hide_the_variance(ratio: float) -> None:
    x = (batch(0, 64, 2, 8, 8) + ratio).float()
    parts = x.split([40, 0, 24])
    mean, var, count = on_devices(lambda rank, sum_: shared_statistics(parts[rank], sum_), 3)[0]
    exact = torch.var_mean(x.double(), [0, 2, 3], correction=0)
    assert_close(var, exact[0], rtol=1e-3, atol=0)
    assert_close(mean, exact[1], rtol=1e-6, atol=0)
    assert count.item() == 64 * 8 * 8


def test_a_large_mean_in_float32_is_normalised_away() -> None:
    x = (batch(0, 64, 2, 8, 8) + 1e3).float()
    layer = BatchNorm(2)
    layer.sum_ = lambda tensor: None
    y = layer(x).double()
    assert_close(y.std([0, 2, 3], correction=0), torch.ones(2, dtype=torch.float64), rtol=1e-3, atol=0)
    assert_close(layer.running_var.double(), 0.9 + 0.1 * x.double().var([0, 2, 3]), rtol=1e-3, atol=0)


def test_a_single_value_leaves_finite_statistics() -> None:
    layer = BatchNorm(2)
    layer.sum_ = lambda tensor: None
    y, *grads = run(layer, torch.tensor([[3.0, 4.0]]), torch.ones(1, 2))
    assert not y.any() and all(grad.isfinite().all() for grad in grads)
    assert_close(running(layer), (torch.tensor([0.3, 0.4]), torch.tensor([0.9, 0.9])))


@pytest.mark.parametrize("sum_", [None, lambda total: None])
def test_a_batch_without_samples_moves_nothing(sum_) -> None:
    norm = BatchNorm(3)
    norm.sum_ = sum_
    norm(torch.zeros(0, 3, 4, 4)).sum().backward()
    assert torch.equal(norm.running_mean, torch.zeros(3)) and torch.equal(norm.running_var, torch.ones(3))
    assert not norm.weight.grad.any() and not norm.bias.grad.any()


def test_evaluation_never_communicates() -> None:
    def refuse(tensor: Tensor) -> None:
        raise AssertionError("summed in evaluation")

    layer, plain = BatchNorm(3), BatchNorm(3)
    layer.sum_ = refuse
    x = batch(0, 4, 3).float()
    assert torch.equal(layer.eval()(x), plain.eval()(x))
    assert not layer.running_mean.any()
    with pytest.raises(AssertionError):
        layer.train()(x)


def test_frozen_weights_still_let_the_gradient_through() -> None:
    ours, theirs = pair(3, (2, 2), 0)
    for layer in (ours, theirs):
        layer.weight.requires_grad = layer.bias.requires_grad = False
    ours.sum_ = lambda tensor: None
    x, weights = batch(1, 4, 3, 2, 2), batch(2, 4, 3, 2, 2)
    (_, ours_grad, *none), (_, theirs_grad, *_) = run(ours, x, weights), run(theirs, x, weights)
    assert_close(ours_grad, theirs_grad)
    assert none == [None, None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_summed_up_in_more(dtype: torch.dtype) -> None:
    "As torch's own BatchNorm does; only what is as large as the batch has 16 bits."
    stream = torch.Generator().manual_seed(0)
    x, grad = ((300 * torch.randn(4, 3, 8, 8, generator=stream) + 100).to(dtype) for _ in range(2))

    def one(norm, x: Tensor, grad: Tensor) -> list[Tensor]:
        x.requires_grad_()
        norm(x).backward(grad)
        return [x.grad.float(), norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]

    whole = one(nn.BatchNorm2d(3), x.float(), grad.float())

    def half(rank: int, sum_) -> list[Tensor]:
        norm = BatchNorm(3)
        norm.sum_ = sum_
        rows = slice(2 * rank, 2 * rank + 2)
        return one(norm, x[rows].clone(), grad[rows].clone())

    (x0, *first), (x1, *second) = on_devices(half, 2)
    assert_close(torch.cat([x0, x1]), whole[0], rtol=2 * torch.finfo(dtype).eps, atol=1e-2)
    for ours, other, wanted in zip(first[:2], second[:2], whole[1:3]):
        assert_close(ours + other, wanted, rtol=1e-4, atol=1e-2)
    for ours, wanted in zip(first[2:], whole[3:]):
        assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def reduce_as_torch_does(grad, x, mean, scale, weight, *wanted: bool) -> tuple[Tensor, ...]:
    "What torch's kernel for GPUs gives: sums of gradients, and of gradients times what is above the mean."
    total, product = (t.sum((0, 2, 3)) for t in (grad, grad * (x - mean[:, None, None])))
    return total, product, product * scale, total


def elements_as_torch_does(grad, x, mean, scale, weight, total, product, count) -> Tensor:
    "What torch's other kernel gives, from these sums over all devices."
    mean, scale, weight, total, product = (t[:, None, None] for t in (mean, scale, weight, total, product))
    return (grad - total / count - (x - mean) * scale**2 * product / count) * scale * weight


def test_the_way_of_gpus_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    "Its two kernels are there on GPUs only: `tests/gpu` has them."
    monkeypatch.setattr(torch, "batch_norm_backward_reduce", reduce_as_torch_does)
    monkeypatch.setattr(torch, "batch_norm_backward_elemt", elements_as_torch_does)
    x, grad, weight = batch(0, 4, 3, 5, 5), batch(1, 4, 3, 5, 5), torch.rand(3, dtype=torch.float64)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    parts = (x, grad, weight, mean, (var + 1e-5).rsqrt(), torch.tensor([100.0]))

    def doubled(tensor: Tensor) -> None:
        tensor.mul_(2)

    for ours, wanted in zip(_backward_on_gpu(*parts, doubled), _backward(*parts, doubled)):
        assert_close(ours, wanted)
