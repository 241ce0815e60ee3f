"""What is done with a graph alone: run it, from any node on if need be; find what is read."""

from __future__ import annotations

import copy
import gc
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

Observe = Callable[[fx.Node, Any], None]
Call = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]


class Run:
    """One run of a graph. Values are dropped after their last use.

    Args:
        graph: What to run.
        inputs: One value per placeholder.
        weights: By name.
        observe: Called with every node and its value.
        call: Runs one node in place of its target.
    """

    def __init__(
        self,
        graph: fx.Graph,
        inputs: Sequence[Any],
        weights: Mapping[str, Tensor],
        *,
        observe: Observe | None = None,
        call: Call | None = None,
    ) -> None:
        self._nodes = list(graph.nodes)
        self._last = {arg: node for node in self._nodes for arg in node.all_input_nodes}
        self._weights, self._observe, self._call = weights, observe, call
        holders = (n for n in self._nodes if n.op == "placeholder")
        self._given: dict[fx.Node, Any] = dict(zip(holders, inputs, strict=True))
        self._values: dict[fx.Node, Any] = {}
        self._position = 0

    def to(self, node: fx.Node) -> Any:
        """Go on until a node has run, and return its value."""
        while node not in self._values:
            self._step()
        return self._values[node]

    def before(self, node: fx.Node) -> None:
        """Go on until a node is the next to run."""
        while self._nodes[self._position] is not node:
            self._step()

    def finish(self) -> list[Any]:
        """Go on to the end, and return the flat outputs."""
        output = self._nodes[-1]
        if output.op != "output":
            raise ProgramError("the graph has no output node")
        self.before(output)
        return list(self._arguments(output)[0][0])

    @property
    def at(self) -> fx.Node:
        """The node that ran last, or that could not."""
        return self._nodes[max(self._position - 1, 0)]

    def branch(self, given: Mapping[fx.Node, Any]) -> Run:
        """Return a second run that goes on from here; this one is not touched by it.

        Args:
            given: Values that nodes have in that run, whatever they would compute.
        """
        other = copy.copy(self)
        other._values = {**self._values, **given}
        other._given = {**self._given, **given}
        return other

    def reweighted(self, weights: Mapping[str, Tensor]) -> Run:
        """Return a second run that goes on from here with other weights.

        What was computed of weights alone, such as a transposed one, is computed anew; all else
        that has run stays as it is.
        """
        other = self.branch({})
        other._weights = weights
        alone: set[fx.Node] = set()
        for node in self._nodes[: self._position]:
            read = node.all_input_nodes
            if node.op == "get_attr" or (read and alone.issuperset(read)):
                alone.add(node)
                if node in other._values:
                    other._values[node] = other._value(node)
        return other

    def _arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return map_arg((node.args, node.kwargs), self._values.__getitem__)

    def _step(self) -> None:
        node = self._nodes[self._position]
        self._position += 1
        self._values[node] = value = self._value(node)
        if self._observe is not None:
            self._observe(node, value)
        for arg in node.all_input_nodes:
            if self._last[arg] is node:
                self._values.pop(arg, None)

    def _value(self, node: fx.Node) -> Any:
        if node in self._given:
            return self._given[node]
        if node.op == "get_attr":
            return self._weights[str(node.target)]
        args, kwargs = self._arguments(node)
        if self._call is not None:
            return self._call(node, args, kwargs)
        target: Any = node.target
        return target(*args, **kwargs)


def interpret(
    graph: fx.Graph,
    inputs: Sequence[Any],
    weights: Mapping[str, Tensor],
    *,
    observe: Observe | None = None,
    call: Call | None = None,
) -> list[Any]:
    """Run ``graph`` node by node and return the flat outputs.

    Values are dropped after their last use. ``call`` replaces how one node is run.
    """
    return Run(graph, inputs, weights, observe=observe, call=call).finish()


def add_node(
    graph: fx.Graph, op: str, target: Any, args: Any = (), kwargs: Any = None, name: str = ""
) -> fx.Node:
    """Append a node to a graph.

    `torch.fx.Graph.create_node` looks through the arguments for sizes that torch is still tracing,
    which a program never has; arguments that are set afterwards are not looked through.
    """
    node = graph.create_node(op, target, name=name or None)
    node.args = args
    if kwargs:
        node.kwargs = kwargs
    return node


def live_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes that something reads, and the placeholders and output, in order."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("output", "placeholder") or node in needed:
            needed.add(node)
            needed.update(node.all_input_nodes)
    return (n for n in graph.nodes if n in needed)


@contextmanager
def without_collection() -> Iterator[None]:
    """Hold off the cyclic collector while many nodes are made: each pass of it walks all of torch.

    What is garbage is collected afterwards.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
