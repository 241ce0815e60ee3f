"""`Segment`: parts of a network that follow one another, with one tensor between two of them.

A residual block is one, and so is a layer of a plain network. Where a tensor is read across a
longer way, as the skips of a U-Net are, all of that way is one segment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from narrows.ir.meta import Meta, shape_of
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

    Of the places between two layers it ends at the smallest tensor, and it does not end at one that
    is larger than those before and behind it: the wide middle of an inverted bottleneck, say.

    Args:
        program: The program.
        layers: The nodes that count as layers.
    """
    nodes = [n for n in program.graph.nodes if n.op not in ("placeholder", "output")]
    outputs = next(n for n in program.graph.nodes if n.op == "output").all_input_nodes
    fixed, last = _fixed(program.graph), _last(program.graph)
    place = {n: i for i, n in enumerate(program.graph.nodes)}
    found: list[Segment] = []
    begin = 0
    for end in [*_ends(program, nodes, set(layers), fixed, last, place), len(nodes)]:
        ends = tuple(outputs) if end == len(nodes) else (nodes[end - 1],)
        found.append(Segment(tuple(nodes[begin:end]), ends, ()))
        begin = end
    return [_closed(program, segment, fixed, last, place) for segment in found]


def _ends(
    program: Program,
    nodes: Sequence[fx.Node],
    layers: set[fx.Node],
    fixed: set[fx.Node],
    last: Mapping[fx.Node, int],
    place: Mapping[fx.Node, int],
) -> list[int]:
    """Return how many nodes are done at the end of each segment but the last."""
    alive = [n for n in program.placeholders if _is_data(n)]
    best: dict[int, tuple[int, int]] = {}  # per number of layers before it: size, and place
    done = 0
    for count, node in enumerate(nodes, 1):
        done += node in layers
        if node not in fixed and _is_data(node):
            alive.append(node)
        alive = [n for n in alive if last[n] > place[node]]
        if alive == [node] and 0 < done < len(layers):
            best[done] = min(best.get(done, (1 << 62, 0)), (bytes_of(node), count))
    cuts = [best[n] for n in sorted(best)]
    sizes = [1 << 62, *(size for size, _ in cuts), 1 << 62]
    return [
        count for i, (size, count) in enumerate(cuts, 1)
        if size <= sizes[i - 1] or size <= sizes[i + 1]
    ]  # fmt: skip


def bytes_of(node: fx.Node) -> int:
    """Return the bytes of a node's tensor at the example's sizes; 0 of a weight or a size."""
    shape, dtype = shape_of(node), Meta(node).dtype
    return 0 if shape is None or node.op == "get_attr" else math.prod(shape) * dtype.itemsize


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


__all__ = ["Segment", "Values", "bytes_of", "segments_of"]
