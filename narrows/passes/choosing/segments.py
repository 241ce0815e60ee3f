"""`Segment`: parts of a network that follow one another, with one tensor between two of them.

A residual block is one, and so is a layer of a plain network. Where a tensor is read across a
longer way, as the skips of a U-Net are, all of that way is one segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from narrows.ir.meta import Meta
from narrows.ir.program import Program

Values = dict[fx.Node, Any]


@dataclass(frozen=True, eq=False)
class Segment:
    """Some nodes of a graph that follow one another.

    Attributes:
        nodes: The nodes, in execution order.
        ends: What it makes that is read behind it: one tensor, or the network's outputs.
        wanted: What is read behind it beside that: sizes.
    """

    nodes: tuple[fx.Node, ...]
    ends: tuple[fx.Node, ...]
    wanted: tuple[fx.Node, ...]

    def run(self, given: Mapping[fx.Node, Any], weights: Mapping[str, Tensor]) -> Values:
        """Return the values that are read behind it.

        Args:
            given: What was read behind the segments before it.
            weights: By name.
        """
        values = dict(given)
        for node in self.nodes:
            if node.op == "get_attr":
                values[node] = weights[str(node.target)]
                continue
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
            target: Any = node.target
            values[node] = target(*args, **kwargs)
        return {n: values[n] for n in (*self.ends, *self.wanted) if n in values}


def segments_of(program: Program, layers: Sequence[fx.Node]) -> list[Segment]:
    """Return the segments of a program, in execution order, each with a layer at least.

    Args:
        program: The program.
        layers: The nodes that count as layers.
    """
    nodes = [n for n in program.graph.nodes if n.op not in ("placeholder", "output")]
    outputs = next(n for n in program.graph.nodes if n.op == "output").all_input_nodes
    fixed = _fixed(program.graph)
    last = _last(program.graph)
    place = {n: i for i, n in enumerate(program.graph.nodes)}
    found: list[Segment] = []
    held: list[fx.Node] = []
    alive = [n for n in program.placeholders if _is_data(n)]
    marked = set(layers)
    for node in nodes:
        held.append(node)
        if node not in fixed and _is_data(node):
            alive.append(node)
        alive = [n for n in alive if last[n] > place[node]]
        is_end = node is nodes[-1]
        if not is_end and (alive != [node] or not marked & set(held)):
            continue
        ends = tuple(outputs) if is_end else (node,)
        found.append(Segment(tuple(held), ends, ()))
        held = []
    if len(found) > 1 and not marked & set(found[-1].nodes):
        tail = found.pop()
        found[-1] = Segment((*found[-1].nodes, *tail.nodes), tail.ends, ())
    return [_closed(program, segment, fixed, last, place) for segment in found]


def _closed(
    program: Program,
    segment: Segment,
    fixed: set[fx.Node],
    last: Mapping[fx.Node, int],
    place: Mapping[fx.Node, int],
) -> Segment:
    """Return a segment that makes its own constants, and says which sizes are read behind it."""
    own = set(segment.nodes)
    needed: set[fx.Node] = set()
    todo = [n for node in segment.nodes for n in node.all_input_nodes if n in fixed]
    while todo:
        node = todo.pop()
        if node not in needed and node not in own:
            needed.add(node)
            todo += node.all_input_nodes
    before = [n for n in program.graph.nodes if n in needed]
    nodes = (*before, *segment.nodes)
    end = max(place[n] for n in segment.nodes)
    sizes = [n for n in program.graph.nodes if place[n] <= end < last.get(n, -1)]
    wanted = [n for n in sizes if n not in fixed and not _is_data(n)]
    return Segment(nodes, segment.ends, tuple(wanted))


def _is_data(node: fx.Node) -> bool:
    """Whether a node's value is a tensor, or several: not a size."""
    return Meta(node).size is None


def _fixed(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that depend on weights alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        read = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and all(n in found for n in read)):
            found.add(node)
    return found


def _last(graph: fx.Graph) -> dict[fx.Node, int]:
    last: dict[fx.Node, int] = {}
    for place, node in enumerate(graph.nodes):
        last.setdefault(node, -1)
        for arg in node.all_input_nodes:
            last[arg] = place
    return last


__all__ = ["Segment", "Values", "segments_of"]
