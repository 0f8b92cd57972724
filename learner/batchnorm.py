"BatchNorm over one device's batch, or over a batch that several devices share."

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from learner.module import Buffer, Module, Parameter

SumOverBatch = Callable[[Tensor], None]


class BatchNorm(Module):
    """Normalise each channel of (n, channels) or (n, channels, h, w) float by the batch's mean and variance.

    Ioffe and Szegedy, 2015 (https://arxiv.org/abs/1502.03167), with torch's conventions: biased variance for the
    batch, unbiased for the running one, which moves by `momentum` at each training batch and is used in evaluation.
    Where the batch is spread over several devices, `sum_` is set to a function that replaces a tensor by its sum over
    all of them; the statistics, and the gradients through them, are then those of the whole batch. A batch without a
    sample, such as a part of a small last one, changes no statistics.
    """

    sum_: SumOverBatch | None = None
    number: int | None = None  # of the model's, where the batch is shared and the model may be compiled: see pieces.py

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = Parameter(torch.ones(channels)), Parameter(torch.zeros(channels))
        self.running_mean, self.running_var = Buffer(torch.zeros(channels)), Buffer(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        "Same shape and dtype as `x`."
        if self.training and self.number is not None and torch.compiler.is_compiling():
            return self._traced(x, self.number)
        lone = x.numel() <= x.shape[1]  # F.batch_norm refuses one value per channel, which several devices may share
        if self.training and (self.sum_ is not None or lone):
            return self._normalise_shared(x, self.sum_ or _nobody_else)
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)

    def _normalise_shared(self, x: Tensor, sum_: SumOverBatch) -> Tensor:
        mean, var, count = shared_statistics(x, sum_)
        self._move(mean, var, count)
        return _Normalise.apply(x, self.weight, self.bias, mean, var, count, self.eps, sum_)

    @torch.no_grad()
    def _move(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        "The running statistics by the momentum towards those of a shared batch."
        unbiased = var * (count / (count - 1).clamp(min=1))
        momentum = (self.momentum * (count > 0)).to(mean.dtype)  # as a tensor: nobody waits for a GPU's count
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.lerp_(new.to(running.dtype), momentum.to(running.dtype))

    def _traced(self, x: Tensor, number: int) -> Tensor:
        """As `_normalise_shared`, with all that is as large as `x` in operations that a compiler puts together.

        What goes through `share` has weight and bias too: what comes back to them in backward is what is to be summed.
        The mean and variance of all are constants here, since `share` knows by those sums what is due to them.
        """
        wide = x.to(self.weight.dtype)
        var, mean = torch.var_mean(wide, _all_but_channels(x), correction=0)
        rows = torch.stack([mean, var, self.weight, self.bias])
        mean, var, weight, bias = stand_in(rows, x.numel() // x.shape[1], number).unbind()
        scale = (var.detach() + self.eps).rsqrt()
        normal = (wide - _per_channel(mean.detach(), wide)) * _per_channel(scale, wide)
        return (normal * _per_channel(weight, wide) + _per_channel(bias, wide)).to(x.dtype)

    def share(self, count: int, rows: Tensor) -> Tensor:
        "Own mean, own variance, weight and bias, of `count` values a channel: the same, but mean and variance of all."
        return _Share.apply(rows, count, self)


@torch.library.custom_op("orchestrator::share", mutates_args=())
def stand_in(rows: Tensor, count: int, number: int) -> Tensor:
    "In a captured graph, `share` of the BatchNorm of that number: see pieces.py, which puts it there."
    raise RuntimeError("a graph in which BatchNorm is shared runs in pieces only")


@stand_in.register_fake
def _alike(rows: Tensor, count: int, number: int) -> Tensor:
    return torch.empty_like(rows)


def batchnorms(model: Module) -> list[BatchNorm]:
    "The BatchNorms of `model`, in their order."
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


@contextmanager
def unshared(model: Module) -> Iterator[None]:
    "Within it, each BatchNorm of the model sees this device's samples alone."
    norms = batchnorms(model)
    sums = [norm.sum_ for norm in norms]
    try:
        for norm in norms:
            norm.sum_ = None
        yield
    finally:
        for norm, sum_ in zip(norms, sums):
            norm.sum_ = sum_


def _nobody_else(total: Tensor) -> None:
    "The sum over one device alone."


def _all_but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _channel_sum(x: Tensor) -> Tensor:
    return x.sum(_all_but_channels(x))


def _wide(x: Tensor) -> Tensor:
    "16 bits are enough for values, but not for what is summed up of them."
    return x.float() if x.element_size() < 4 else x


def _per_channel(stat: Tensor, x: Tensor) -> Tensor:
    return stat.view(1, -1, *[1] * (x.dim() - 2)).to(x.dtype)


@torch.no_grad()
def shared_statistics(x: Tensor, sum_: SumOverBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (channels,), biased variance (channels,) and number of values per channel (1,) of a shared batch, float64.

    Each device finds its own mean and variance by a stable method, in float32 at least; only these few numbers are
    summed as E[x] and E[x^2], in float64, where the difference of large sums loses nothing that float32 had.
    A device whose part of the batch is empty adds nothing.
    """
    channels = x.shape[1]
    count = x.numel() // channels
    var, mean = torch.zeros(2, channels, dtype=torch.float64, device=x.device)
    if count:
        local = torch.var_mean(_wide(x), _all_but_channels(x), correction=0)
        var, mean = (stat.double() for stat in local)
    return _of_all(mean, var, count, sum_)


def _of_all(mean: Tensor, var: Tensor, count: int, sum_: SumOverBatch) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.cat([mean, var + mean.square(), mean.new_ones(1)]).mul_(count)
    sum_(total)
    mean, square = (total[:-1] / total[-1].clamp(min=1)).chunk(2)
    return mean, (square - mean.square()).clamp_(min=0), total[-1:]


class _Normalise(torch.autograd.Function):
    "Normalisation by given statistics, with the gradient that also flows through those statistics."

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, count, eps, sum_):
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.sum_ = eps, sum_
        return F.batch_norm(x, mean.to(weight.dtype), var.to(weight.dtype), weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, mean, var, count = ctx.saved_tensors
        scale = (var + ctx.eps).rsqrt()
        backward = _backward_on_gpu if x.is_cuda and len(x) else _backward
        return *backward(x, grad, weight, mean, scale, count, ctx.sum_), None, None, None, None, None


Gradients = tuple[Tensor, Tensor, Tensor]  # of inputs, weight and bias


def _backward(x, grad, weight, mean, scale, count, sum_) -> Gradients:
    wide, grad = _wide(x), _wide(grad)
    normal = (wide - _per_channel(mean, wide)) * _per_channel(scale, wide)
    bias_grad, weight_grad = _channel_sum(grad), _channel_sum(grad * normal)
    total = torch.cat([bias_grad, weight_grad])
    sum_(total)
    grad_mean, product_mean = (total / count.clamp(min=1).to(total.dtype)).chunk(2)
    x_grad = grad - _per_channel(grad_mean, wide) - normal * _per_channel(product_mean, wide)
    x_grad = x_grad * _per_channel(scale.to(weight.dtype) * weight, wide)
    return x_grad.to(x.dtype), weight_grad, bias_grad


def _backward_on_gpu(x, grad, weight, mean, scale, count, sum_) -> Gradients:
    "The same by two kernels of torch's, made for this, instead of a dozen passes over the batch."
    lasting = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    x, grad = (each.contiguous(memory_format=lasting) for each in (x, grad))
    mean, scale = (stat.to(weight.dtype) for stat in (mean, scale))
    total, product, weight_grad, bias_grad = torch.batch_norm_backward_reduce(
        grad, x, mean, scale, weight, True, True, True
    )
    sums = torch.cat([total, product])
    sum_(sums)
    total, product = sums.chunk(2)
    count = count.clamp(min=1).to(torch.int32)
    x_grad = torch.batch_norm_backward_elemt(grad, x, mean, scale, weight, total, product, count)
    return x_grad, weight_grad, bias_grad


class _Share(torch.autograd.Function):
    """`BatchNorm.share`: sends what `_Normalise` and the statistics before it do, in the same order.

    For values x of this device, with m for mean, v for variance, s = 1 / sqrt(v + eps), G and P for the sums over all n
    values of gradients, and of gradients times normal values: to each value comes back, beside its own gradient,
    -w s (G + (x - m) s P) / n. As the gradient of the own m' and v' of the own n' values, which goes to each value as
    m'_grad / n' + 2 (x - m') v'_grad / n', that is v'_grad = -n' w s^2 P / 2n, and
    m'_grad = -n' w s G / n + 2 v'_grad (m' - m).
    """

    @staticmethod
    def forward(ctx, rows, count, norm):
        own_mean, own_var = rows[:2].double()
        mean, var, total = _of_all(own_mean, own_var, count, norm.sum_ or _nobody_else)
        norm._move(mean, var, total)
        ctx.save_for_backward(rows, mean, var, total)
        ctx.count, ctx.norm = count, norm
        return torch.cat([torch.stack([mean, var]).to(rows.dtype), rows[2:]])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, mean, var, count = ctx.saved_tensors
        own_mean, _, weight, _ = rows
        weight_grad, bias_grad = grad[2:]
        total = torch.cat([bias_grad, weight_grad])
        (ctx.norm.sum_ or _nobody_else)(total)
        scale = (var + ctx.norm.eps).rsqrt()
        grad_mean, product_mean = (total * (ctx.count / count.clamp(min=1))).chunk(2)
        var_grad = -weight * scale.square() * product_mean / 2
        mean_grad = 2 * var_grad * (own_mean - mean) - weight * scale * grad_mean
        return torch.cat([torch.stack([mean_grad, var_grad]).to(grad.dtype), grad[2:]]), None, None
