"Functions run by several processes that form a group, as workers do, but without Ray."

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

from cluster.comms import Group
from cluster.meeting import Meeting, Store


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> Any:
    "Call `function(group, *args)` in that many processes of one thread each; what rank 0's returned."
    context = multiprocessing.get_context("spawn")
    results, store = context.Queue(), Store("127.0.0.1")
    member = [
        context.Process(target=_member, args=(rank, world_size, store.meeting, results, function, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in member:
        process.start()
    result = results.get(timeout=600)
    for process in member:
        process.join(60)
    if isinstance(result, BaseException):
        raise result
    return result


def _member(rank: int, world_size: int, meeting: Meeting, results: Any, function: Any, args: Any) -> None:
    torch.set_num_threads(1)
    group = Group(rank, world_size, meeting, "gloo")
    try:
        result = function(group, *args)
    except Exception as error:
        results.put(error)
        raise
    if rank == 0:
        results.put(result)
    group.barrier()
    group.close()
