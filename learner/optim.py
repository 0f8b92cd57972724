"The optimizers that have names: each is a choice of stats and steppers for the one Optimizer."

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from learner.errors import UsageError, did_you_mean
from learner.optimizer import Groups, Optimizer, Part, Rate, Reduce, hyperparameters
from learner.steppers import (
    adam_grad,
    average_grad,
    decay,
    l2,
    lamb_step,
    mean_grad,
    mean_square,
    nesterov_grad,
    rms_grad,
    sgd_step,
    step_count,
)

__all__ = ["LAMB", "SGD", "Adam", "AdamW", "Optimizer", "RMSProp", "average_grad", "hyperparameters", "l2", "sgd_step"]


def SGD(
    params: Groups,
    lr: Rate,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    reduce: Reduce = None,
) -> Optimizer:
    "Stochastic gradient descent with torch's momentum and L2; without momentum it keeps no state."
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


def _adaptive(
    params: Groups, steppers: Any, stats: Any, reduce: Reduce, lr: Rate, betas: Any, *more: float
) -> Optimizer:
    hypers = dict(zip(("momentum", "sqr_momentum", "eps", "weight_decay"), (*betas, *more), strict=True))
    return Optimizer(params, steppers, stats, reduce, lr=lr, **hypers)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": SGD,
    "nesterov": partial(SGD, nesterov=True),
    "rmsprop": RMSProp,
    "adam": Adam,
    "adamw": AdamW,
    "lamb": LAMB,
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
