"""A captured model whose BatchNorms share their batch with other devices, cut where they ask these.

What is asked can be no part of compiled code: all devices must ask in one order, one whose code is compiled as well as
one whose is not, which has just joined or to which a compiler said no. So it stays outside (`BatchNorm.share`, a few
numbers a channel), and each stretch of the model from one to the next is compiled for itself, with all else of
BatchNorm in it. That keeps the order of an uncompiled model. Forward, the pieces run as the model is written. Backward,
autograd runs what was made last of all that it can run, and so everything in reverse, branches included: a piece ends,
and has handed over its gradients, before the BatchNorm in front of it asks, and after the one behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.split_module import split_module

from learner.batchnorm import BatchNorm, stand_in

Compiler = Callable[[GraphModule, list[Tensor]], Callable[..., Any]]


def in_pieces(compiler: Compiler, norms: Sequence[BatchNorm]) -> Compiler:
    "A compiler of graphs in which `stand_in`s are for these BatchNorms."

    def compile_pieces(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        if not any(map(_asks, graph.graph.nodes)):
            return compiler(graph, inputs)
        whole = split_module(graph, graph, _piece_of(graph).__getitem__, keep_original_order=True)
        for name, piece in list(whole.named_children()):
            assert isinstance(piece, GraphModule)
            asked = [partial(norms[node.args[2]].share, node.args[1]) for node in piece.graph.nodes if _asks(node)]
            delattr(whole, name)
            setattr(whole, name, asked[0] if asked else _when_needed(compiler, piece))
        return whole.forward

    return compile_pieces


def _asks(node: Node) -> bool:
    return node.target in (stand_in, torch.ops.orchestrator.share.default)


def _piece_of(graph: GraphModule) -> dict[Node, int]:
    "The number of each node's piece: where a BatchNorm asks is one, and so is what is between two of these."
    number, numbers = 0, dict[Node, int]()
    for node in graph.graph.nodes:
        number += _asks(node)
        numbers[node] = number
        number += _asks(node)
    return numbers


def _when_needed(compiler: Compiler, piece: GraphModule) -> Callable[..., Any]:
    "The piece, compiled when it is first called: only then is known what it is given."
    compiled: list[Callable[..., Any]] = []
    (output,) = (node for node in piece.graph.nodes if node.op == "output")
    if single := isinstance(output.args[0], Node):
        output.args = (output.args,)  # compilers want graphs that give a tuple
        piece.recompile()

    def run(*args: Any) -> Any:
        if not compiled:
            compiled.append(compiler(piece, list(args)))
        result = compiled[0](*args)
        return result[0] if single else result

    return run
