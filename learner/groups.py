"""Which parameters belong together: groups of layers that are frozen or have rates of their own, and who decays.

As in fastai, BatchNorm stays trainable in frozen layers: its statistics must follow the new data, and its weights with
them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from learner.batchnorm import BatchNorm
from learner.errors import UserError
from learner.layers import Linear
from learner.module import Module, Parameter

Splitter = Callable[[Module], list[list[Parameter]]]


def one_group(model: Module) -> list[list[Parameter]]:
    "A splitter: all parameters together."
    return [model.parameters()]


def body_and_head(model: Module) -> list[list[Parameter]]:
    """A splitter: everything before the head, and that: the model's `head` if it is a Linear, else its last Linear.

    UserError where there is none.
    """
    head = _head(model).parameters()
    return [[p for p in model.parameters() if p not in set(head)], head]


def _head(model: Module) -> Linear:
    linears = [module for module in (*model.modules(), getattr(model, "head", None)) if isinstance(module, Linear)]
    if not linears:
        raise UserError(f"{type(model).__name__} has no Linear layer that would be its head; give your own splitter")
    return linears[-1]


def head_names(model: Module) -> list[str]:
    "The names of the parameters of the head, see `body_and_head`."
    head = set(body_and_head(model)[1])
    return [name for name, parameter in model.named_parameters() if parameter in head]


def replace_head(model: Module, n_out: int) -> Module:
    "Give `model` a new head (see `body_and_head`) for `n_out` other classes, that has learnt nothing yet; the model."
    head = _head(model)
    fresh = Linear(head.weight.shape[1], n_out).to(head.weight.device, dtype=head.weight.dtype)
    head.weight, head.bias = fresh.weight, fresh.bias
    return model


def layer_groups(model: Module, splitter: Splitter) -> list[list[Parameter]]:
    "What `splitter` makes of `model`; UserError unless each parameter is in exactly one group."
    groups = splitter(model)
    counts = Counter(p for group in groups for p in group)
    for name, parameter in model.named_parameters():
        if (count := counts[parameter]) != 1:
            raise UserError(f"the splitter puts {name} into {count} groups; each parameter belongs to exactly one")
    return groups


def freeze_to(model: Module, groups: Sequence[Sequence[Parameter]], n: int) -> None:
    """Train the parameters of `groups[n:]` and, of those before, BatchNorm's alone; n may be negative.

    UserError where n names no group.
    """
    if not -len(groups) <= n < len(groups):
        raise UserError(f"freeze_to({n}) leaves nothing to train: there are {len(groups)} groups of layers")
    norms = {p for owner, _, p in _owners(model) if isinstance(owner, BatchNorm)}
    for number, group in enumerate(groups):
        for p in group:
            p.requires_grad_(number >= n % len(groups) or p in norms)


def plain_groups(model: Module, splitter: Splitter) -> list[dict[str, Any]]:
    "Groups for an optimizer, as `no_decay_groups` gives them: the splitter's, all of which decay."
    return [{"params": group} for group in layer_groups(model, splitter)]


def no_decay_groups(model: Module, splitter: Splitter = one_group) -> list[dict[str, Any]]:
    """Groups for an optimizer: of each of the splitter's, the weights, then biases and BatchNorm with no weight decay.

    Decay pulls towards zero, which is the simplest value of a weight but of no scale or shift. Both of a pair are the
    same `layer` to the optimizer, so that a spread rate has one value for them.
    """
    spared = {p for owner, name, p in _owners(model) if isinstance(owner, BatchNorm) or name == "bias"}
    pairs: list[dict[str, Any]] = []
    for layer, group in enumerate(layer_groups(model, splitter)):
        pairs.append({"params": [p for p in group if p not in spared], "layer": layer})
        pairs.append({"params": [p for p in group if p in spared], "layer": layer, "weight_decay": 0.0})
    return pairs


def _owners(model: Module) -> Iterator[tuple[Module, str, Parameter]]:
    "Each parameter with the module that has it and its name there."
    modules = dict(model.named_modules())
    for dotted, parameter in model.named_parameters():
        prefix, _, name = dotted.rpartition(".")
        yield modules[prefix], name, parameter
