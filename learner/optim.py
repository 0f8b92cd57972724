"""The optimizers that have names, and the parts they are composed of: stats keep state, steppers update parameters.

A part is called with a parameter, its gradient, that parameter's state and, by name, the hyperparameters that its
keyword-only arguments declare. What it returns, unless None, is the gradient for the parts behind it. What is written
here for one parameter gets many of them side by side in a flat one, which is the same to all that goes element by
element; a part that looks at a parameter as a whole, at its norm or its shape, is marked `@per_tensor`. It is called
with several parameters of one shape, stacked, (k, *shape), and their gradients, without state. A state is of tensors:
such as the parameter, or one number, such as a count.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from learner.errors import UsageError, UserError, did_you_mean
from learner.optimizer import Groups, Optimizer, Rate, Reduce
from learner.orthogonal import orthogonalized
from learner.spans import Part, State

SomePart = TypeVar("SomePart", bound=Callable[..., Tensor | None])


def per_tensor(part: SomePart) -> SomePart:
    "Mark a part that looks at parameters as a whole; it either updates them, or returns other gradients."
    part.per_tensor = True  # type: ignore[attr-defined]
    return part


def _kept(state: State, name: str, like: Tensor) -> Tensor:
    if name not in state:
        state[name] = torch.zeros_like(like, requires_grad=False)
    return state[name]


# Stats


def l2(p: Tensor, grad: Tensor, state: State, *, weight_decay: float = 0.0) -> Tensor:
    "Add the gradient of weight_decay/2 * |p|^2, before any average is taken, as torch's SGD and Adam do."
    return grad.add(p, alpha=weight_decay) if weight_decay else grad


def average_grad(p: Tensor, grad: Tensor, state: State, *, momentum: float = 0.9, dampening: float = 0.0) -> Tensor:
    "grad_avg = momentum * grad_avg + (1 - dampening) * grad, from the first gradient on: Polyak's heavy ball."
    if "grad_avg" in state:
        return state["grad_avg"].mul_(momentum).add_(grad, alpha=1 - dampening)
    state["grad_avg"] = grad.clone()
    return state["grad_avg"]


def nesterov_grad(p: Tensor, grad: Tensor, state: State, *, momentum: float = 0.9) -> Tensor:
    "The gradient looked up one momentum step ahead: Sutskever et al., 2013."
    return grad.add(average_grad(p, grad, state, momentum=momentum), alpha=momentum)


def mean_grad(p: Tensor, grad: Tensor, state: State, *, momentum: float = 0.9) -> None:
    "Keep a moving mean of gradients, from zero (Adam's first moment; `momentum` is its beta1)."
    _kept(state, "grad_mean", p).lerp_(grad, 1 - momentum)


def mean_square(p: Tensor, grad: Tensor, state: State, *, sqr_momentum: float = 0.99) -> None:
    "Keep a moving mean of squared gradients, from zero (Adam's second moment; `sqr_momentum` is its beta2)."
    _kept(state, "sqr_mean", p).mul_(sqr_momentum).addcmul_(grad, grad, value=1 - sqr_momentum)


def step_count(p: Tensor, grad: Tensor, state: State) -> None:
    "Count the steps, in a tensor that stays on the CPU."
    state["steps"] = state["steps"] + 1 if "steps" in state else torch.ones((), dtype=torch.int64)


# Steppers


def decay(p: Tensor, grad: Tensor, state: State, *, lr: float, weight_decay: float = 0.0) -> None:
    "Shrink the parameter, apart from its gradient: Loshchilov and Hutter (https://arxiv.org/abs/1711.05101)."
    if weight_decay:
        p.mul_(1 - lr * weight_decay)


def sgd_step(p: Tensor, grad: Tensor, state: State, *, lr: float) -> None:
    "Go down the gradient."
    p.add_(grad, alpha=-lr)


def rms_grad(p: Tensor, grad: Tensor, state: State, *, eps: float = 1e-8) -> Tensor:
    "The gradient over the root of its mean square: Hinton's RMSProp."
    return grad / (state["sqr_mean"].sqrt() + eps)


def adam_grad(
    p: Tensor, grad: Tensor, state: State, *, momentum: float = 0.9, sqr_momentum: float = 0.999, eps: float = 1e-8
) -> Tensor:
    "The debiased mean over the root of the debiased mean square: Kingma and Ba (https://arxiv.org/abs/1412.6980)."
    steps = int(state["steps"])
    root = (state["sqr_mean"] / (1 - sqr_momentum**steps)).sqrt_().add_(eps)
    return (state["grad_mean"] / (1 - momentum**steps)).div_(root)


@per_tensor
def lamb_step(p: Tensor, grad: Tensor, *, lr: float, weight_decay: float = 0.0) -> None:
    """Go down the gradient and the decay by a length in proportion to the layer's weights.

    You et al. (https://arxiv.org/abs/1904.00962); where either norm is 0 the ratio is 1. The norms stay on the device.
    """
    update = grad.add(p, alpha=weight_decay)
    each = tuple(range(1, p.dim() + 1))  # all dimensions but the first; a number has none, so it gets one
    size, length = (torch.linalg.vector_norm(x.unsqueeze(-1), dim=each, keepdim=True).squeeze(-1) for x in (p, update))
    ratio = torch.where((size > 0) & (length > 0), size / length, torch.ones_like(size))
    p.sub_(update.mul_(ratio * lr))


@per_tensor
def muon_grad(p: Tensor, grad: Tensor) -> Tensor:
    """The gradients, orthogonalized as matrices of a row for each output; a vector's length becomes 1.

    The root of its mean square is then at most 0.2, as Adam's is about, so that rate and decay that suit AdamW do here
    too: Liu et al., 2025 (https://arxiv.org/abs/2502.16982).
    """
    matrices = grad.flatten(2) if grad.dim() > 2 else grad.reshape(len(grad), -1, 1)
    return orthogonalized(matrices).reshape(grad.shape).mul(0.2 * max(matrices.shape[1:]) ** 0.5)


# Each named optimizer is a choice of these for the one Optimizer.


def SGD(
    params: Groups,
    lr: Rate,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    reduce: Reduce = None,
) -> Optimizer:
    """Stochastic gradient descent with torch's momentum and L2; without momentum it keeps no state.

    UserError for `nesterov` without momentum, or with dampening: it would be something else.
    """
    if nesterov and (not momentum or dampening):
        raise UserError(
            f"momentum {momentum:g} with dampening {dampening:g} is none of Nesterov's: above 0, without dampening"
        )
    hypers: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if not momentum:
        return Optimizer(params, [sgd_step], [l2], reduce, **hypers)
    if nesterov:
        return Optimizer(params, [sgd_step], [l2, nesterov_grad], reduce, momentum=momentum, **hypers)
    return Optimizer(params, [sgd_step], [l2, average_grad], reduce, momentum=momentum, dampening=dampening, **hypers)


def RMSProp(
    params: Groups, lr: Rate, alpha: float = 0.99, eps: float = 1e-8, weight_decay: float = 0.0, momentum: float = 0.0,
    reduce: Reduce = None,
) -> Optimizer:  # fmt: skip
    "Gradients over the root of their mean square (Hinton), with L2 and momentum as torch has them."
    steppers: list[Part] = [rms_grad, average_grad, sgd_step] if momentum else [rms_grad, sgd_step]
    hypers: dict[str, Any] = {"sqr_momentum": alpha, "eps": eps, "weight_decay": weight_decay}
    hypers |= {"momentum": momentum} if momentum else {}
    return Optimizer(params, steppers, [l2, mean_square], reduce, lr=lr, **hypers)


def Adam(
    params: Groups, lr: Rate = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    weight_decay: float = 0.0, reduce: Reduce = None,
) -> Optimizer:  # fmt: skip
    "Debiased first over root of second moment (https://arxiv.org/abs/1412.6980), with L2; betas are (sqr_)momentum."
    stats = [l2, mean_grad, mean_square, step_count]
    return _adaptive(params, [adam_grad, sgd_step], stats, reduce, lr, betas, eps, weight_decay)


def AdamW(
    params: Groups, lr: Rate = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
    weight_decay: float = 1e-2, reduce: Reduce = None,
) -> Optimizer:  # fmt: skip
    "Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101)."
    stats = [mean_grad, mean_square, step_count]
    return _adaptive(params, [decay, adam_grad, sgd_step], stats, reduce, lr, betas, eps, weight_decay)


def LAMB(
    params: Groups, lr: Rate = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
    weight_decay: float = 0.0, reduce: Reduce = None,
) -> Optimizer:  # fmt: skip
    "Adam whose steps are in proportion to each layer's weights, for large batches (https://arxiv.org/abs/1904.00962)."
    stats = [mean_grad, mean_square, step_count]
    return _adaptive(params, [adam_grad, lamb_step], stats, reduce, lr, betas, eps, weight_decay)


def Muon(
    params: Groups, lr: Rate = 1e-3, momentum: float = 0.95, weight_decay: float = 0.1, reduce: Reduce = None
) -> Optimizer:
    "Steps that are orthogonal matrices, with Nesterov's momentum: https://kellerjordan.github.io/posts/muon."
    hypers = {"momentum": momentum, "weight_decay": weight_decay}
    return Optimizer(params, [decay, muon_grad, sgd_step], [nesterov_grad], reduce, lr=lr, **hypers)


def _adaptive(
    params: Groups, steppers: Any, stats: Any, reduce: Reduce, lr: Rate, betas: Any, *more: float
) -> Optimizer:
    hypers = dict(zip(("momentum", "sqr_momentum", "eps", "weight_decay"), (*betas, *more), strict=True))
    return Optimizer(params, steppers, stats, reduce, lr=lr, **hypers)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": SGD,
    "nesterov": partial(SGD, momentum=0.9, nesterov=True),
    "rmsprop": RMSProp,
    "adam": Adam,
    "adamw": AdamW,
    "lamb": LAMB,
    "muon": Muon,
}


def make_optimizer(
    name: str, params: Groups, momentum: float | None, weight_decay: float | None, reduce: Reduce
) -> Optimizer:
    """The optimizer of that name at rate 0, for a schedule to set.

    `momentum` is beta1 where moments are two; None leaves it, or the weight decay, at the optimizer's own default.
    Raises UsageError, with the names there are, for an unknown one.
    """
    check_optimizer(name)
    options: dict[str, Any] = {} if weight_decay is None else {"weight_decay": weight_decay}
    if momentum is not None:
        options |= {"betas": (momentum, 0.999)} if name in ("adam", "adamw", "lamb") else {"momentum": momentum}
    return OPTIMIZERS[name](params, lr=0.0, reduce=reduce, **options)


def check_optimizer(name: str) -> None:
    "Raise UsageError, with the names there are, if `name` is no optimizer."
    if name not in OPTIMIZERS:
        hint = did_you_mean(name, OPTIMIZERS)
        raise UsageError(f"optimizer {name!r} is unknown{hint}; known are {', '.join(OPTIMIZERS)}")
