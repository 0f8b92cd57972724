"""A GPU that is none: the processor's memory and arithmetic under a GPU's rules, so that these can be tested anywhere.

1. A tensor is there or here, as its memory is marked; what is computed of tensors there is there.
2. Tensors of both places don't mix, but for numbers (no dimensions), as in torch.
3. What makes the processor wait for a GPU is noted: a value that it reads, a shape that depends on values, and each
   copy but one from page-locked memory that need not be waited for. So is what takes a processor's time for nothing:
   pictures that are sent as floats, or copied once more to be page-locked.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
WAITED_FOR = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount"}  # of aten's


def is_there(tensor: Tensor) -> bool:
    "Whether it is in the GPU's memory."
    return getattr(tensor.untyped_storage(), "gpu", False)


def marked(result: Any, mark: str = "gpu") -> Any:
    "The tensor, or several, in memory that is marked as the GPU's, or as page-locked."
    for tensor in tree_leaves(result):
        if isinstance(tensor, Tensor):
            setattr(tensor.untyped_storage(), mark, True)
    return result


def tensors_in(*values: Any) -> list[Tensor]:
    "All tensors among these."
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class Rules(TorchDispatchMode):
    "What each operation asks of its tensors, backward's too, and where its results are."

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, name = tensors_in(args, kwargs or {}), func.overloadpacket.__name__
        there = [tensor for tensor in given if is_there(tensor)]
        if not there:
            return func(*args, **(kwargs or {}))
        if len(there) < len(given):
            if name == "copy_":
                self.waits.append(f"{func}")
            elif any(tensor.dim() for tensor in given if not is_there(tensor)):
                raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        masks = name in ("index", "index_put_") and any(t.dtype == torch.bool for t in tensors_in(args[1]))
        if name in WAITED_FOR or masks:
            self.waits.append(f"{func}")
        return marked(func(*args, **(kwargs or {})))


class Devices(TorchFunctionMode):
    "Has torch's functions take `cuda` for a device, and tensors tell where they are."

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits
        asked: Any = Tensor
        self.own: dict[Any, Callable[..., Any]] = {
            asked.device.__get__: lambda x: GPU if is_there(x) else CPU,
            asked.is_cuda.__get__: is_there,
            asked.to: self._to,
            asked.cpu: partial(self._to, device=CPU),
            asked.cuda: partial(self._to, device=GPU),
            asked.pin_memory: self._pin,
            asked.tolist: self._tolist,
            asked.numpy: self._numpy,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.own:
            return self.own[func](*args, **kwargs)
        wanted, pinned = kwargs.get("device"), kwargs.pop("pin_memory", False)
        if wanted is None or torch.device(wanted).type != "cuda":
            result = func(*args, **kwargs)
            return marked(result, "pinned") if pinned else result
        if func in (torch.tensor, torch.as_tensor):
            self.waits.append(f"{func.__name__} on the GPU")
        return marked(func(*args, **{**kwargs, "device": CPU}))

    def _to(self, x: Tensor, *args: Any, non_blocking: bool = False, copy: bool = False, **kwargs: Any) -> Tensor:
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for value in args:
            if isinstance(value, Tensor):
                device, dtype = GPU if is_there(value) else CPU, value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, str | torch.device):
                device = value
        there = is_there(x) if device is None else torch.device(device).type == "cuda"
        if there == is_there(x):
            return x.to(dtype or x.dtype, copy=copy)
        if there and x.dim() == 4 and x.is_floating_point():
            self.waits.append(f"pictures {tuple(x.shape)} sent as floats")
        if not (there and non_blocking and (getattr(x.untyped_storage(), "pinned", False) or not x.numel())):
            self.waits.append(f"a copy of {tuple(x.shape)} {'to' if there else 'from'} the GPU")
        with torch.utils._python_dispatch._disable_current_modes():
            moved = x.detach().clone().to(dtype or x.dtype)
        return marked(moved) if there else moved

    def _pin(self, x: Tensor) -> Tensor:
        if getattr(x.untyped_storage(), "pinned", False):
            return x
        if x.dim() == 4:
            self.waits.append(f"pictures {tuple(x.shape)} copied to be page-locked")
        return marked(x.clone(), "pinned")

    def _tolist(self, x: Tensor) -> Any:
        if is_there(x):
            self.waits.append("tolist")
        return x.tolist()

    def _numpy(self, x: Tensor) -> Any:
        if is_there(x):
            raise TypeError("can't convert a tensor on the GPU to numpy: copy it first")
        return x.numpy()


class Stream:
    "Of a GPU that is never behind; an Event too."

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def record(self) -> None: ...

    def wait_event(self, event: Any) -> None: ...


@contextmanager
def pretended() -> Iterator[list[str]]:
    "Within it, there is a GPU for this thread; the list has what was waited for."
    waits: list[str] = []
    autocast = torch.autocast
    stand_ins = {
        "cuda.Stream": Stream,
        "cuda.Event": Stream,
        "cuda.current_stream": Stream,
        "cuda.stream": nullcontext,
        "cuda.mem_get_info": lambda device=None: (2**33, 2**34),
        "Tensor.record_stream": lambda x, stream: None,
        "autocast": lambda device_type, *args, **kwargs: autocast("cpu", *args, **kwargs),
    }
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch(f"torch.{name}", stand_in))
        stack.enter_context(Rules(waits))
        stack.enter_context(Devices(waits))
        yield waits
