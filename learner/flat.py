"""Tensors side by side in one buffer: what is done to all of them is then one operation, however many there are.

Each piece begins at a multiple of 16 elements, as the fast kernels of CPUs and GPUs like it; the gaps are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

ALIGN = 16  # elements


def places(like: Sequence[Tensor]) -> tuple[list[int], int]:
    "Where in a buffer each of these tensors begins, and how long the buffer is."
    ends = list(accumulate((-(-t.numel() // ALIGN) * ALIGN for t in like), initial=0))
    return ends[:-1], ends[-2] + like[-1].numel()


def views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    "Views of `flat` (n,) with the shapes and strides of `like`, so that all are in memory as these are."
    starts, first = places(like)[0], flat.storage_offset()
    return [flat.as_strided(t.shape, _strides(t), first + start) for t, start in zip(like, starts)]


def together(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A flat tensor (n,), and its views in the shapes and strides of `like`, with the numbers of `tensors`.

    Where these lie in memory just so, they are the views and nothing is copied.
    """
    starts, length = places(like)
    if _lie_at(tensors, like, starts):
        return tensors[0].as_strided((length,), (1,)), list(tensors)
    flat = torch.zeros(length, dtype=tensors[0].dtype, device=like[0].device)
    copies = views(flat, like)
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor)
    return flat, copies


def _strides(like: Tensor) -> tuple[int, ...]:
    "Its strides, or of a tensor with holes or overlaps, those of a copy."
    if like.is_contiguous() or like.is_contiguous(memory_format=torch.channels_last):
        return like.stride()  # at a quarter of the time
    return torch.empty_like(like, device="meta").stride()


def _lie_at(tensors: Sequence[Tensor], like: Sequence[Tensor], starts: Sequence[int]) -> bool:
    first = tensors[0]
    memory, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    return all(
        (t.untyped_storage().data_ptr(), t.storage_offset() - offset, t.dtype) == (memory, start, first.dtype)
        and (t.device, t.stride()) == (model.device, _strides(model))
        for t, model, start in zip(tensors, like, starts, strict=True)
    )
