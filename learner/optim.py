"One optimizer: small stats keep state, small steppers update parameters, and a step runs them over all parameters."

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from learner.errors import UserError
from learner.module import Parameter

State = dict[str, Tensor]
Part = Callable[..., Tensor | None]


# Stats and steppers: each is called with (parameter, gradient, that parameter's state, its hyperparameters by name).
# What it returns, unless None, is the gradient for the ones behind it. Keyword-only arguments are hyperparameters.


def l2(p: Tensor, grad: Tensor, state: State, *, weight_decay: float = 0.0) -> Tensor:
    "Weight decay as the gradient of weight_decay/2 * |p|^2, as torch's SGD has it."
    return grad.add(p, alpha=weight_decay) if weight_decay else grad


def average_grad(p: Tensor, grad: Tensor, state: State, *, momentum: float = 0.9) -> Tensor:
    "Keep grad_avg = momentum * grad_avg + grad, and go on with it (Polyak's heavy ball, as in torch)."
    if "grad_avg" not in state:
        state["grad_avg"] = torch.zeros_like(p, requires_grad=False)
    return state["grad_avg"].mul_(momentum).add_(grad)


def sgd_step(p: Tensor, grad: Tensor, state: State, *, lr: float) -> None:
    "Go down the gradient."
    p.add_(grad, alpha=-lr)


def hyperparameters(parts: Iterable[Part]) -> dict[str, Any]:
    "The hyperparameters that the signatures of `parts` declare, with their defaults (`inspect.Parameter.empty`: none)."
    declared = (inspect.signature(part).parameters.values() for part in parts)
    return {arg.name: arg.default for args in declared for arg in args if arg.kind is arg.KEYWORD_ONLY}


class Optimizer:
    """Run `stats`, then `steppers`, over every parameter at each `step()`.

    `params` is a list of Parameters, or of such lists: groups, each with hyperparameters of its own in `groups`. A
    hyperparameter may be read and set for all groups as an attribute: `opt.lr = 0.1`. `reduce(parameters)` is called
    first in each step: where gradients come from several devices, it is what turns them into the global batch's.
    Raises UserError for a hyperparameter that no part declares, or one without a value.
    """

    def __init__(
        self,
        params: Iterable[Parameter] | Iterable[Sequence[Parameter]],
        steppers: Sequence[Part],
        stats: Sequence[Part] = (),
        reduce: Callable[[list[Parameter]], None] | None = None,
        **hypers: float,
    ) -> None:
        entries: list[Any] = list(params)
        groups = entries if entries and not isinstance(entries[0], Tensor) else [entries]
        parts = [(part, tuple(hyperparameters([part]))) for part in (*stats, *steppers)]
        defaults = hyperparameters([*stats, *steppers])
        chosen = _checked(hypers, defaults)
        vars(self).update(
            groups=[(list(group), dict(chosen)) for group in groups], parts=parts, reduce=reduce, state={}
        )

    @property
    def params(self) -> list[Parameter]:
        "The parameters of all groups."
        return [p for group, _ in self.groups for p in group]

    @torch.no_grad()
    def step(self) -> None:
        "Reduce the gradients, then update every parameter that has one."
        if self.reduce is not None:
            self.reduce(self.params)
        for group, hypers in self.groups:
            for p in group:
                if p.grad is not None and p.requires_grad:
                    self._update(p, hypers)

    def _update(self, p: Parameter, hypers: dict[str, float]) -> None:
        grad, state = p.grad, self.state.setdefault(p, {})
        for part, names in self.parts:
            changed = part(p, grad, state, **{name: hypers[name] for name in names})
            grad = grad if changed is None else changed

    def zero_grad(self) -> None:
        "Set the gradients to zero in place: they may be views of a shared buffer."
        for p in self.params:
            if p.grad is not None:
                p.grad.zero_()

    def set(self, **hypers: float) -> None:
        "Set hyperparameters of all groups; UserError for an unknown one."
        for _, own in self.groups:
            own.update(_checked({**own, **hypers}, own))

    def __getattr__(self, name: str) -> Any:
        groups = vars(self).get("groups", [])
        if groups and name in groups[-1][1]:
            return groups[-1][1][name]
        raise AttributeError(f"{type(self).__name__} has no attribute or hyperparameter {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            vars(self)[name] = value
        else:
            self.set(**{name: value})

    def state_dict(self) -> dict[str, Tensor]:
        "The stats' tensors as `number of the parameter.name`: live memory, so clone what must not change."
        return {f"{n}.{key}": t for n, p in enumerate(self.params) for key, t in self.state.get(p, {}).items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        "Replace the stats' tensors by copies of `state`'s; UserError, and no change, where a shape does not fit."
        loaded: dict[Parameter, State] = {}
        params = self.params
        for name, tensor in state.items():
            number, _, key = name.partition(".")
            if not number.isdigit() or int(number) >= len(params) or params[int(number)].shape != tensor.shape:
                raise UserError(f"optimizer state {name!r} of shape {tuple(tensor.shape)} fits no parameter")
            p = params[int(number)]
            loaded.setdefault(p, {})[key] = tensor.to(p.device, copy=True)
        self.state = loaded


def _checked(given: dict[str, float], defaults: dict[str, Any]) -> dict[str, float]:
    unknown = [name for name in given if name not in defaults]
    if unknown:
        close = difflib.get_close_matches(unknown[0], defaults, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"hyperparameter {unknown[0]!r} is unknown{hint}; this optimizer has {', '.join(defaults)}")
    values = {**defaults, **given}
    if missing := [name for name, value in values.items() if value is inspect.Parameter.empty]:
        raise UserError(f"hyperparameter {missing[0]!r} needs a value")
    return values


def SGD(
    params: Iterable[Parameter] | Iterable[Sequence[Parameter]],
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    reduce: Callable[[list[Parameter]], None] | None = None,
) -> Optimizer:
    "Stochastic gradient descent with torch's momentum and L2; without momentum it keeps no state."
    if momentum:
        return Optimizer(params, [sgd_step], [l2, average_grad], reduce, lr=lr, momentum=momentum,
                         weight_decay=weight_decay)  # fmt: skip
    return Optimizer(params, [sgd_step], [l2], reduce, lr=lr, weight_decay=weight_decay)
