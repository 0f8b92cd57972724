"Spans: neighbouring parameters that have had the same past, updated as if they were one."

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from learner.errors import UserError
from learner.flat import together, views
from learner.module import Parameter

State = dict[str, Tensor]
Part = Callable[..., Tensor | None]
Past = dict[Parameter, State]
BLOCK = 2**18  # elements for each thread: fewer cost more calls, more do not stay in its cache


class Span:
    """Parameters that all have gradients, their `flat` values, flat `grad` and flat `state`; each is a view of these.

    What optimizers are made of works element by element, so that one call does for the whole span; a tensor of the
    state that is not as long as `flat`, such as a count of steps, is the whole span's. Values, gradients and state are
    moved side by side if they are not so yet, in the strides of each parameter.
    """

    def __init__(self, params: Sequence[Parameter], past: Past, hypers: dict[str, Any]) -> None:
        self.params, self.hypers, self.trained = params, hypers, params[0].requires_grad
        self.flat, values = together([p.data for p in params], params)
        self.grad, self.grads = together([p.grad for p in params if p.grad is not None], params)
        self.state = {
            # a clone, since where a span is parted a count must not be both parts'
            name: together([past[p][name] for p in params], params)[0] if _by_element(t, params[0]) else t.clone()
            for name, t in past.get(params[0], {}).items()
        }
        self.n_states = len(self.state)
        self.alike = _alike(params)
        for p, value, grad in zip(params, values, self.grads, strict=True):
            p.data, p.grad = value, grad
        self.memory = [p.data_ptr() for p in params]

    def holds(self) -> bool:
        "Whether all is as it was: nothing moved, replaced, frozen or thawed, and no kind of state added."
        return len(self.state) == self.n_states and all(
            p.grad is grad and p.requires_grad is self.trained and p.data_ptr() == place
            for p, grad, place in zip(self.params, self.grads, self.memory)
        )

    def past(self) -> Past:
        "The state of each parameter, in its own shape: live memory."
        split = {name: views(t, self.params) for name, t in self.state.items() if self._by_element(t)}
        return {p: self.state | {name: of[n] for name, of in split.items()} for n, p in enumerate(self.params)}

    def update(self, parts: Sequence[tuple[Part, Sequence[str]]]) -> None:
        "Run the parts in turn, each with the gradient that the one before it left."
        whole = any(getattr(part, "per_tensor", False) for part, _ in parts)
        small = len(self.flat) <= BLOCK or self.flat.device.type != "cpu"
        if whole or small or not self.state:
            self._run(parts, self.flat, self.grad, self.state)
        else:
            self._run_in_blocks(parts)

    def _run_in_blocks(self, parts: Sequence[tuple[Part, Sequence[str]]]) -> None:
        """Run all parts on one block after the other, small enough that it stays in the processor's cache.

        An Adam step of 11 M parameters then takes half the time. What counts for the whole span is the same after
        each block. A span without state is not cut: its first step is yet to make the state.
        """
        size, made = BLOCK * torch.get_num_threads(), State()
        for start in range(0, len(self.flat), size):
            cut = slice(start, start + size)
            flat = self.flat[cut]
            given = {name: t[cut] if self._by_element(t) else t.clone() for name, t in self.state.items()}
            state = dict(given)
            self._run(parts, flat, self.grad[cut], state)
            for name, t in state.items():
                if t.shape != flat.shape:
                    made[name] = t
                elif t is not given.get(name):  # a part may put a new tensor there instead of changing the old one
                    made.setdefault(name, torch.empty_like(self.flat))[cut] = t
        self.state |= made

    def _run(self, parts: Sequence[tuple[Part, Sequence[str]]], flat: Tensor, grad: Tensor, state: State) -> None:
        for part, names in parts:
            hypers = {name: self.hypers[name] for name in names}
            if getattr(part, "per_tensor", False):
                grad = self._by_shape(part, grad, hypers)
            else:
                changed = part(flat, grad, state, **hypers)
                grad = grad if changed is None else changed
        if len(state) != self.n_states and (odd := [name for name, t in state.items() if not isinstance(t, Tensor)]):
            raise UserError(f"the optimizer's state {odd[0]!r} is {state[odd[0]]!r}: keep it as torch.tensor(...)")

    def _by_element(self, tensor: Tensor) -> bool:
        return tensor.shape == self.flat.shape

    def _by_shape(self, part: Part, grad: Tensor, hypers: dict[str, Any]) -> Tensor:
        "What a part that looks at parameters as a whole makes of the gradient, or of the parameters."
        given, made = views(grad, self.params), dict[int, Tensor]()
        for numbers in self.alike:
            values = _stacked([self.params[n].data for n in numbers])
            result = part(values, _stacked([given[n] for n in numbers]), **hypers)
            if result is not None:
                made.update(zip(numbers, result))
            elif len(numbers) > 1:  # else it is the parameter itself
                for n, value in zip(numbers, values):
                    self.params[n].data.copy_(value)
        return together([made[n] for n in sorted(made)], self.params)[0] if made else grad


def spans(params: Sequence[Parameter], past: Past, hypers: dict[str, Any]) -> Iterator[Span]:
    """Of the parameters with a gradient, those that can go together: neighbours that are alike and have a like past.

    A function of its arguments alone, so that a run that was resumed goes on with the same spans, and the same bits.
    """
    with_gradient = [p for p in params if p.grad is not None]
    for _, members in groupby(with_gradient, lambda p: _kind(p, past.get(p, {}))):
        yield Span(list(members), past, hypers)


def _alike(params: Sequence[Parameter]) -> list[list[int]]:
    """The numbers of those that go through a `per_tensor` part at once.

    On a GPU all of one shape, by a third to half of the kernels. On a CPU, where products of stacked matrices
    take up to 1.2 of the time of one after the other, each goes alone.
    """
    groups: dict[Any, list[int]] = {}
    for number, p in enumerate(params):
        groups.setdefault(number if p.device.type == "cpu" else p.shape, []).append(number)
    return list(groups.values())


def _stacked(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)  # a view


def _kind(p: Parameter, state: State) -> tuple[Any, ...]:
    shared = [(name, None if _by_element(t, p) else t.tolist()) for name, t in state.items()]
    return p.requires_grad, p.dtype, p.device, sorted(shared)


def _by_element(tensor: Tensor, p: Parameter) -> bool:
    "Whether this tensor of the state has a number for each of the parameter's; a scalar one may have a counter too."
    return tensor.shape == p.shape and (p.dim() > 0 or tensor.is_floating_point())
