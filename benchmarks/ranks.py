"Functions run by several processes that form a group, as workers do, but without Ray."

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from cluster.comms import Group
from cluster.meeting import KeyStore, Meeting


class Ranks:
    "Processes of one thread each, which stand by: each has made `make(group, *args)`, and calls it when asked."

    def __init__(self, world_size: int, make: Callable[..., Callable[[], Any]], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.results, self.store = context.Queue(), KeyStore("127.0.0.1")
        self.asked = [context.Queue() for _ in range(world_size)]
        self.members = [
            context.Process(
                target=_member, args=(rank, self.store.meeting, self.asked, self.results, make, args), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in self.members:
            process.start()

    def __call__(self) -> Any:
        "Have all call it once; what rank 0's returned."
        self._ask(True)
        result = self.results.get(timeout=600)
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        "Let them go."
        self._ask(False)
        for process in self.members:
            process.join(60)

    def _ask(self, once_more: bool) -> None:
        for queue in self.asked:
            queue.put(once_more)


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> Any:
    "Call `function(group, *args)` in that many processes of one thread each; what rank 0's returned."
    ranks = Ranks(world_size, partial(partial, function), *args)
    try:
        return ranks()
    finally:
        ranks.close()


def barrier(group: Group) -> None:
    "Return once every rank is here."
    group.sum_(torch.zeros(1))


def _member(rank: int, meeting: Meeting, asked: list[Any], results: Any, make: Any, args: Any) -> None:
    torch.set_num_threads(1)
    group = Group(rank, len(asked), meeting, "gloo")
    try:
        function = make(group, *args)
        while asked[rank].get():
            result = function()
            if rank == 0:
                results.put(result)
    except Exception as error:
        results.put(error)
        raise
    barrier(group)
    group.close()
