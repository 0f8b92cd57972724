"""One step of many workers, simulated: how long it takes over a stated network, and what holds it up.

All ranks do the same at the same time, so one is followed. Its step is a list of pieces: some compute, then perhaps a
message to sum over all ranks. A bucket of gradients is only started; for BatchNorm's sums, and at the end for all
buckets, compute waits. Messages go one after the other in the order in which they were started, so that a sum of
BatchNorm waits for the buckets before it: NCCL does so with all messages of a communicator, of which we have one
(https://github.com/pytorch/pytorch/issues/137390).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, log2


@dataclass(frozen=True)
class Piece:
    "Seconds of compute, then a message (of 0 bytes: none); `waits`: compute goes on once all messages are through."

    seconds: float
    size: float = 0
    waits: bool = False


def step_time(pieces: Sequence[Piece], exchange: Callable[[float], float]) -> float:
    "Seconds of a step whose messages of so many bytes take `exchange` seconds each."
    now = free = 0.0  # how far compute is, and when the network has sent all that was started
    for piece in pieces:
        now += piece.seconds
        if piece.size:
            free = max(now, free) + exchange(piece.size)
        if piece.waits:
            now = max(now, free)
    return now


def without_batchnorm(pieces: Sequence[Piece]) -> list[Piece]:
    "The same step without the messages that compute waits for one by one."
    return [replace(piece, size=0, waits=False) if piece.waits and piece.size else piece for piece in pieces]


@dataclass(frozen=True)
class Protocol:
    "A way to send: seconds to begin, seconds a hop within a node and between two, and its share of the bandwidth."

    begin: float
    within: float
    between: float
    share: float = 1.0


FREE = Protocol(0, 0, 0)


@dataclass(frozen=True)
class Network:
    """Bytes a second in each direction: from a GPU to the next of its node, and out of a node by all its NICs.

    NCCL's own model (src/graph/tuning.cc), of which this is the main part, takes what is fastest for each message: a
    ring or a tree, in one of its protocols. For S bytes over N ranks on M nodes of G:

    Ring: 2 (N - 1) hops, of which 2 (M - 1) between nodes, as it comes into and out of each node once; through each
    link go 2 (N - 1) / N * S, and no way needs less (Patarasuk and Yuan, 2009,
    https://doi.org/10.1016/j.jpdc.2008.09.002).

    Tree: up and down again, each time G - 1 hops along a node's GPUs and log2(M) between nodes; through each link go
    2 S. That short messages need no more hops than grow with log2 is what Thakur, Rabenseifner and Gropp have of
    recursive doubling (2005, https://doi.org/10.1177/1094342005051521).
    """

    within: float
    between: float
    protocols: tuple[Protocol, ...]
    per_node: int = 8

    def exchange(self, size: float, n: int) -> float:
        "Seconds of an all-reduce of `size` bytes over `n` ranks, which fill one node after the other."
        if n == 1:
            return 0.0
        return min(way(size, n, protocol) for way in (self._ring, self._tree) for protocol in self.protocols)

    def _ring(self, size: float, n: int, by: Protocol) -> float:
        between = 2 * (self._nodes(n) - 1)
        hops = (2 * (n - 1) - between) * by.within + between * by.between
        return by.begin + hops + 2 * (n - 1) / n * size / (by.share * self._slowest(n))

    def _tree(self, size: float, n: int, by: Protocol) -> float:
        hops = (min(n, self.per_node) - 1) * by.within + ceil(log2(self._nodes(n))) * by.between
        return by.begin + 2 * hops + 2 * size / (by.share * self._slowest(n))

    def _nodes(self, n: int) -> int:
        return ceil(n / self.per_node)

    def _slowest(self, n: int) -> float:
        links = [self.within] * (self.per_node > 1) + [self.between] * (self._nodes(n) > 1)
        return min(links)


def limit(pieces: Sequence[Piece], network: Network, n: int) -> str:
    "What holds a step up most: what would save most if it cost nothing; compute, where that is less than a twentieth."

    def seconds(pieces: Sequence[Piece], network: Network) -> float:
        return step_time(pieces, lambda size: network.exchange(size, n))

    whole, others = seconds(pieces, network), without_batchnorm(pieces)
    saved = {
        "BatchNorm": whole - seconds(others, network),
        "bandwidth": whole - seconds(pieces, replace(network, within=inf, between=inf)),
        "latency": seconds(others, network) - seconds(others, replace(network, protocols=(FREE,))),
    }
    most = max(saved, key=lambda name: saved[name])
    return most if saved[most] > whole / 20 else "compute"
