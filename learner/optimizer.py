"The optimizer: a step runs small stats, then small steppers, over all parameters at once (see optim.py)."

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from learner.errors import UserError, did_you_mean
from learner.module import Parameter
from learner.spans import Part, Past, spans

Reduce = Callable[[list[Parameter]], None] | None
Groups = Iterable[Parameter] | Iterable[Sequence[Parameter]] | Iterable[dict[str, Any]]
Rate = float | slice | Sequence[float]


def hyperparameters(parts: Iterable[Part]) -> dict[str, Any]:
    "The hyperparameters that the signatures of `parts` declare, with their defaults (`inspect.Parameter.empty`: none)."
    declared = (inspect.signature(part).parameters.values() for part in parts)
    return {arg.name: arg.default for args in declared for arg in args if arg.kind is arg.KEYWORD_ONLY}


def spread(value: Rate, n: int) -> list[Any]:
    """A hyperparameter's values for `n` groups of layers, from the first to the last, as fastai reads it.

    A number is everyone's; slice(low, high) rises geometrically; slice(high) is high for the last group and a tenth
    of it for the others; a list has one for each. UserError for a slice from or to 0, or a list of others.
    """
    if isinstance(value, slice):
        low, high = value.start, value.stop
        if low is None:
            return [high / 10] * (n - 1) + [high]
        if not (low > 0 and high > 0):
            raise UserError(f"slice({low}, {high}) has no steps between: both must be above 0; freeze the others")
        return [low * (high / low) ** (i / (n - 1)) for i in range(n)] if n > 1 else [high]
    if isinstance(value, Sequence):
        if len(value) != n:
            raise UserError(f"{len(value)} values {list(value)} were given for {n} groups of layers")
        return list(value)
    return [value] * n


def settable(opt: Any) -> Optimizer:
    "`opt`, if its hyperparameters can be set from step to step; UserError for one of another make, such as torch's."
    if not isinstance(opt, Optimizer):
        raise UserError(
            f"the rate of {type(opt).__module__}.{type(opt).__name__} can't be set: use one of learner.optim"
        )
    return opt


class SkipStep(Exception):
    "Raised by a function given to `then`: this step's gradients are of no use, and nothing is to be updated."


class Optimizer:
    """Run `stats`, then `steppers`, over every parameter at each `step()`.

    Parameters, gradients and state are kept in a few flat tensors (see spans.py), over which each part runs once.

    `params` is a list of Parameters, or of groups: lists of Parameters, or as in torch dictionaries that have such a
    list as `params` and hyperparameters of their own. A hyperparameter is set for all groups, or spread over them (see
    `spread`), by keyword, by `set` or as an attribute: `opt.lr = slice(1e-6, 1e-4)`; read as an attribute it is the
    last group's. Dictionaries may say by `layer`, a number from 0 on, which of them share a place in the spread.
    `reduce(parameters)` is called first in each step: where gradients come from several devices, it is what turns them
    into the global batch's. Raises UserError for a hyperparameter that no part declares, for one without a value, and
    for a parameter that is in two groups.
    """

    def __init__(
        self, params: Groups, steppers: Sequence[Part], stats: Sequence[Part] = (), reduce: Reduce = None, **hypers: Any
    ) -> None:
        entries: list[Any] = list(params)
        given = entries if entries and not isinstance(entries[0], Tensor) else [entries]
        parts = [(part, tuple(hyperparameters([part]))) for part in (*stats, *steppers)]
        defaults = hyperparameters([*stats, *steppers])
        dicts: list[dict[str, Any]] = [dict(group) if isinstance(group, dict) else {"params": group} for group in given]
        layers = [own.pop("layer", number) for number, own in enumerate(dicts)]
        n, groups = max(layers) + 1, []
        for layer, own in zip(layers, dicts):
            members = list(own.pop("params"))
            shared = {name: spread(value, n)[layer] for name, value in hypers.items()}
            groups.append((members, _checked({**shared, **own}, defaults)))
        vars(self).update(
            groups=groups, layers=layers, n_layers=n, parts=parts, reduce=reduce, looks=[], past={}, spans=[]
        )
        if len(set(self.params)) < len(self.params):
            raise UserError("a parameter is in two groups, or twice in one: it would be updated twice a step")

    @property
    def params(self) -> list[Parameter]:
        "The parameters of all groups."
        return [p for group, _ in self.groups for p in group]

    @property
    def grads(self) -> list[Tensor]:
        "All gradients, of whole spans where there are some, for what works in place and element by element."
        if self._fits():
            return [span.grad for span in self.spans]
        return [p.grad for p in self.params if p.grad is not None]

    @torch.no_grad()
    def step(self) -> None:
        "Reduce the gradients, let those look that `then` named, and update every trained parameter that has one."
        if self.reduce is not None:
            self.reduce(self.params)
        try:
            for look in self.looks:
                look(self.params)
        except SkipStep:
            return
        self.gather()
        for span in self.spans:
            if span.trained:
                span.update(self.parts)

    @torch.no_grad()
    def gather(self) -> None:
        "Move what belongs together side by side, if it is not so yet: the first step would."
        if not self._fits():
            self.past = self._past()
            self.spans = [span for group, hypers in self.groups for span in spans(group, self.past, hypers)]

    def _fits(self) -> bool:
        "Whether the spans are still all parameters that have a gradient."
        with_gradient = sum(p.grad is not None for p in self.params)
        return with_gradient == sum(len(span.params) for span in self.spans) and all(s.holds() for s in self.spans)

    def _past(self) -> Past:
        "Each parameter's state, also of those that have no gradient now."
        return self.past | {p: state for span in self.spans for p, state in span.past().items()}

    def then(self, look: Callable[[list[Parameter]], object]) -> None:
        "Call `look(parameters)` in each step once gradients are reduced; it may change them, or raise SkipStep."
        self.looks.append(look)

    def zero_grad(self) -> None:
        "Set the gradients to zero in place: they may be views of a shared buffer."
        for grad in self.grads:
            grad.zero_()

    def set(self, **hypers: Any) -> None:
        "Set hyperparameters, the same for all groups or spread over them; UserError for an unknown one."
        for layer, (_, own) in zip(self.layers, self.groups):
            values = {name: spread(value, self.n_layers)[layer] for name, value in hypers.items()}
            own.update(_checked({**own, **values}, own))

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
        past = self._past()
        return {f"{n}.{key}": t for n, p in enumerate(self.params) for key, t in past.get(p, {}).items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        "Replace the stats' tensors by copies of `state`'s; UserError, and no change, where a shape does not fit."
        loaded: Past = {}
        params = self.params
        for name, tensor in state.items():
            number, _, key = name.partition(".")
            p = params[int(number)] if number.isdigit() and int(number) < len(params) else None
            if p is None or tensor.shape not in (p.shape, ()):
                raise UserError(f"optimizer state {name!r} of shape {tuple(tensor.shape)} fits no parameter")
            device = p.device if tensor.shape == p.shape else "cpu"
            loaded.setdefault(p, {})[key] = tensor.to(device, copy=True)
        self.past, self.spans = loaded, []


def _checked(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    unknown = [name for name in given if name not in defaults]
    if unknown:
        hint = did_you_mean(unknown[0], defaults)
        raise UserError(f"hyperparameter {unknown[0]!r} is unknown{hint}; this optimizer has {', '.join(defaults)}")
    values = {**defaults, **given}
    if missing := [name for name, value in values.items() if value is inspect.Parameter.empty]:
        raise UserError(f"hyperparameter {missing[0]!r} needs a value")
    return values
