"""What is done with a graph alone: run it, and find what is read."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from narrows.errors import ProgramError

# Arithmetic on sizes that a graph may hold beside ATen operators.
SIZE_FUNCTIONS = frozenset(
    {operator.mul, operator.add, operator.sub, operator.floordiv, operator.truediv, operator.mod,
     operator.neg, operator.pow, operator.getitem, operator.eq, operator.ne, operator.lt,
     operator.le, operator.gt, operator.ge, math.floor, math.ceil, math.trunc}
)  # fmt: skip


def interpret(
    graph: fx.Graph,
    inputs: Sequence[Any],
    weights: Mapping[str, Tensor],
    *,
    observe: Callable[[fx.Node, Any], None] | None = None,
    call: Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any] | None = None,
) -> list[Any]:
    """Run ``graph`` node by node and return the flat outputs.

    Values are dropped after their last use. ``call`` replaces how one node is run.
    """
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for arg in node.all_input_nodes:
            last[arg] = node
    feed = iter(inputs)
    env: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            value = next(feed)
        elif node.op == "get_attr":
            value = weights[str(node.target)]
        else:
            args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
            if node.op == "output":
                return list(args[0])
            value = call(node, args, kwargs) if call else node.target(*args, **kwargs)
        env[node] = value
        if observe is not None:
            observe(node, value)
        for arg in node.all_input_nodes:
            if last[arg] is node:
                env.pop(arg, None)
    raise ProgramError("the graph has no output node")


def live_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes that something reads, and the placeholders and output, in order."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("output", "placeholder") or node in needed:
            needed.add(node)
            needed.update(node.all_input_nodes)
    return (n for n in graph.nodes if n in needed)
