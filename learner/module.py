"Module: parameters, buffers and children that are found by assigning them, and all that walks this tree."

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from learner.errors import UserError


class _Marked(Tensor):
    """A tensor whose class is only a mark for `Module.__setattr__`.

    A bare subclass would send each operation through `__torch_function__` (2.5x on small ones) and hand its class on
    to every result; with that protocol disabled an operation costs what it costs on a tensor and gives a tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _is_param = True  # torch's sign for its compiler that this stays where it is, and is a plain tensor underneath

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if id(self) not in memo:
            memo[id(self)] = type(self)(self.detach().clone(), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple[type, tuple[Tensor, bool]]:
        # a clone, since it may be a piece of a large buffer, all of which would be written
        return type(self), (self.detach().clone(), self.requires_grad)


class Parameter(_Marked):
    "A tensor of any shape that its module trains: `Parameter(torch.zeros(3))`."

    def __new__(cls, data: Tensor, requires_grad: bool = True) -> Self:
        return Tensor._make_subclass(cls, data.detach(), requires_grad)


class Buffer(_Marked):
    "A tensor of any shape that belongs to its module's state but is not trained, such as BatchNorm's running mean."

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Self:
        return Tensor._make_subclass(cls, data.detach(), requires_grad)


class Hook:
    "A function attached to a module's output, until `remove()`; also a context manager."

    def __init__(self, module: Module, function: Callable[[Module, tuple, Any], Any]) -> None:
        self.module, self.function = module, function
        module._hooks.append(self)

    def remove(self) -> None:
        "Detach the function; a second call does nothing."
        if self in self.module._hooks:
            self.module._hooks.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()


class Module:
    """A function with parameters: subclasses assign Parameters, Buffers and Modules, and define `forward`.

    Each such attribute is registered under its name as it is assigned (no call to `super().__init__()` is needed);
    assigning something else to the name, or deleting it, takes it out again. `training` is set on the whole tree.
    Raises UserError for what would compute but never be trained: layers that are in a list alone, and torch.nn's own.
    """

    _tensors: dict[str, Parameter | Buffer]
    _children: dict[str, Module]
    _hooks: list[Hook]
    _training: bool

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        vars(self).update(_tensors={}, _children={}, _hooks=[], _training=True)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(value, (Parameter, Buffer, Module)):
            _refuse_untrained(self, name, value)
        super().__setattr__(name, value)
        # a tuple, since the compiler of torch 2.9 knows no unions
        registries: list[tuple[dict, Any]] = [(self._tensors, (Parameter, Buffer)), (self._children, Module)]
        for registry, kind in registries:
            if isinstance(value, kind):
                registry[name] = value  # in the place of the one before: Sequential runs in this order
            else:
                registry.pop(name, None)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self._tensors.pop(name, None)
        self._children.pop(name, None)

    def forward(self, *args: Any) -> Any:
        "What the module computes; each subclass defines it."
        raise TypeError(f"{type(self).__name__} defines no forward()")

    def __call__(self, *args: Any) -> Any:
        result = self.forward(*args)
        for hook in list(self._hooks):
            replaced = hook.function(self, args, result)
            result = result if replaced is None else replaced
        return result

    def register_forward_hook(self, function: Callable[[Module, tuple, Any], Any]) -> Hook:
        "Call `function(module, inputs, output)` after each forward; what it returns, unless None, is the new output."
        return Hook(self, function)

    @property
    def children(self) -> list[Module]:
        "The modules directly below, in the order of assignment."
        return list(self._children.values())

    def modules(self) -> Iterator[Module]:
        "This module and all below it, each once, parents first."
        return (module for _, module in self.named_modules())

    def named_modules(self, prefix: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Module]]:
        "As `modules`, with dotted names; the root's name is empty."
        seen = set() if seen is None else seen
        if id(self) in seen:
            return
        seen.add(id(self))
        yield prefix, self
        for name, child in self._children.items():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name, seen)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        "Dotted name and Parameter, each Parameter once although two modules may share it."
        return ((name, tensor) for name, tensor in self._named_tensors() if isinstance(tensor, Parameter))

    def named_buffers(self) -> Iterator[tuple[str, Buffer]]:
        "Dotted name and Buffer, each once."
        return ((name, tensor) for name, tensor in self._named_tensors() if isinstance(tensor, Buffer))

    def parameters(self) -> list[Parameter]:
        "All Parameters of the tree."
        return [parameter for _, parameter in self.named_parameters()]

    def buffers(self) -> list[Buffer]:
        "All Buffers of the tree."
        return [buffer for _, buffer in self.named_buffers()]

    def _named_tensors(self) -> Iterator[tuple[str, Parameter | Buffer]]:
        seen: set[int] = set()
        for prefix, module in self.named_modules():
            for name, tensor in module._tensors.items():
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield (f"{prefix}.{name}" if prefix else name), tensor

    @property
    def training(self) -> bool:
        "Whether the module trains (as new ones do) or is evaluated; setting it sets the whole tree."
        return self._training

    @training.setter
    def training(self, value: bool) -> None:
        for module in self.modules():
            vars(module)["_training"] = value

    def train(self, mode: bool = True) -> Self:
        "Set `training` and return the module."
        self.training = mode
        return self

    def eval(self) -> Self:
        "Set `training` to False and return the module."
        return self.train(False)

    def requires_grad_(self, mode: bool = True) -> Self:
        "Make all parameters of the tree trainable, or freeze them, and return the module."
        for parameter in self.parameters():
            parameter.requires_grad_(mode)
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the tree's tensors in place to a device, and the floating-point ones to a dtype.

        Optimizers still fit, but one with a state of another dtype: make it anew.
        """
        for _, tensor in self._named_tensors():
            new_type = dtype if tensor.is_floating_point() else None
            tensor.data = tensor.data.to(device=device, dtype=new_type)
            if tensor.grad is not None:
                tensor.grad = tensor.grad.to(device=device, dtype=new_type)
        return self

    def cuda(self) -> Self:
        "Move to the current GPU."
        return self.to("cuda")

    def cpu(self) -> Self:
        "Move to the CPU."
        return self.to("cpu")

    def double(self) -> Self:
        "Convert to float64."
        return self.to(dtype=torch.float64)

    def state_dict(self) -> dict[str, Tensor]:
        "Dotted name to tensor for all parameters and buffers: the live memory, so clone what must not change."
        return {name: tensor.detach() for name, tensor in self._named_tensors()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> Self:
        """Copy `state` into the tree in place, all of it or nothing.

        Raises UserError that lists every name that is missing, unexpected or of another shape.
        """
        own = self.state_dict()
        faults = [f"missing: {name}" for name in own.keys() - state.keys()]
        faults += [f"unexpected: {name}" for name in state.keys() - own.keys()]
        for name in own.keys() & state.keys():
            if own[name].shape != state[name].shape:
                faults.append(f"{name} has shape {tuple(state[name].shape)}, the model's is {tuple(own[name].shape)}")
        if faults:
            raise UserError(f"the state does not fit {type(self).__name__}: " + "; ".join(sorted(faults)))
        for name, tensor in own.items():
            tensor.copy_(state[name])
        return self

    def __repr__(self) -> str:
        lines = [f"{name}: {child!r}".replace("\n", "\n  ") for name, child in self._children.items()]
        shapes = ", ".join(f"{name}={tuple(tensor.shape)}" for name, tensor in self._tensors.items())
        below = "".join(f"\n  {line}" for line in lines)
        return f"{type(self).__name__}({shapes}{below}{chr(10) if below else ''})"


def _refuse_untrained(owner: Module, name: str, value: Any) -> None:
    "Raise UserError where `value` has what would be trained, if the owner found it."
    if torch.compiler.is_compiling() or value is None or isinstance(value, (int, float, str)):
        return  # in a forward, which the compiler follows, nothing is built
    place, members = f"{type(owner).__name__}.{name}", [value]
    if isinstance(value, (list, tuple, dict)):
        members = list(value.values() if isinstance(value, dict) else value)
    known = [*owner._tensors.values(), *owner._children.values()]
    for one in members:
        if isinstance(one, (Module, _Marked)) and not any(one is other for other in known):
            raise UserError(
                f"{place} is a {type(value).__name__} of layers or parameters, where they would not be found nor "
                "trained: make it a Sequential, or give each an attribute of its own"
            )
        if _trains_in_torch(one):
            raise UserError(
                f"{place} is torch.nn's {type(one).__name__}, which would not be found nor trained: take the layer of "
                "that name in learner.layers, or learner.module's Parameter"
            )


def _trains_in_torch(one: Any) -> bool:
    if isinstance(one, Tensor):
        return type(one) is torch.nn.Parameter and one.requires_grad
    is_module = any(base.__module__ == "torch.nn.modules.module" for base in type(one).__mro__)
    return is_module and any(p.requires_grad for p in one.parameters())


class Sequential(Module):
    "Modules applied one after the other, registered as 0, 1, 2 ...; indexable. UserError for what is no Module."

    def __init__(self, *layers: Module) -> None:
        for number, layer in enumerate(layers):
            if not isinstance(layer, Module):
                raise UserError(
                    f"layer {number} of a Sequential is {layer!r}, no Module: wrap a function in Lambda(...)"
                )
            setattr(self, str(number), layer)

    def __getitem__(self, index: int) -> Module:
        return self.children[index]

    def __len__(self) -> int:
        return len(self._children)

    def forward(self, x: Any) -> Any:
        "Feed `x` through every layer."
        for layer in self._children.values():
            x = layer(x)
        return x
