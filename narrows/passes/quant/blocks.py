"""`cut`: the places where a network falls into blocks, read off its graph.

A block is a region that is entered through one tensor and left through one: a residual block, an
inverted residual, a branch that is joined again, the attention or the feed-forward half of a
transformer layer. In terms of graphs its exit ``v`` and its entry ``u`` are a node and the node
that every way to it leads through (its immediate dominator), such that nothing between the two is
read elsewhere. Names of modules or classes play no part.
"""

from __future__ import annotations

from torch import fx

from narrows.ir.meta import Meta
from narrows.ir.program import Program
from narrows.passes.quant.survey import Survey

LARGEST = 8  # layers of one block; what holds more is cut inside
CHAIN = 3  # layers that follow each other without a branch and are taken together


def cut(program: Program, found: Survey) -> list[fx.Node]:
    """Return the nodes at which blocks end, in execution order.

    A block is what lies between such nodes. Every layer is in one: where no region holds it, or
    only one with more than ``LARGEST`` layers, it is a block of its own, together with the clip
    behind it.

    Args:
        program: A prepared program.
        found: Its survey.
    """
    tensors = _fed_tensors(program)
    place = {n: i for i, n in enumerate(tensors)}
    above = _ancestors(tensors, place)
    layers = {n for n in found.layers() if n in place}
    regions: list[tuple[int, fx.Node]] = []
    for node, entry in _dominators(tensors, place).items():
        if entry is None:
            continue
        inner = above[node] & ~above[entry] | 1 << place[node]
        inner &= ~(1 << place[entry])
        if _closed(inner, node, tensors, place):
            regions.append((inner, found.tail(node)))
    exits = _outermost(regions, layers, place)
    covered = 0
    for inner, _ in exits:
        covered |= inner
    ends = {end for _, end in exits}
    ends |= {found.tail(n) for n in layers if not covered >> place[n] & 1}
    chosen = [n for n in tensors if n in ends]
    return _chained(chosen, layers, place)


def _fed_tensors(program: Program) -> list[fx.Node]:
    """Return the nodes that hang on an input and stand for tensors, in execution order."""
    fed = set(program.placeholders)
    for node in program.graph.nodes:
        if node.op == "call_function" and any(n in fed for n in node.all_input_nodes):
            fed.add(node)
    return [n for n in program.graph.nodes if n in fed and Meta(n).size is None]


def _inputs(node: fx.Node, place: dict[fx.Node, int]) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if n in place]


def _ancestors(tensors: list[fx.Node], place: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """Return per node the nodes above it, as the bits of a number."""
    above: dict[fx.Node, int] = {}
    for node in tensors:
        above[node] = 0
        for source in _inputs(node, place):
            above[node] |= above[source] | 1 << place[source]
    return above


def _dominators(tensors: list[fx.Node], place: dict[fx.Node, int]) -> dict[fx.Node, fx.Node | None]:
    """Return per node the last node that every way from the inputs to it leads through.

    ``None`` stands for the inputs together. In execution order one sweep is enough.
    """
    found: dict[fx.Node, fx.Node | None] = {}
    for node in tensors:
        sources = _inputs(node, place)
        entry: fx.Node | None = sources[0] if sources else None
        for source in sources[1:]:
            other: fx.Node | None = source
            while entry is not other:
                if entry is None or other is None:
                    entry = other = None
                elif place[entry] > place[other]:
                    entry = found[entry]
                else:
                    other = found[other]
        found[node] = entry
    return found


def _closed(inner: int, end: fx.Node, tensors: list[fx.Node], place: dict[fx.Node, int]) -> bool:
    """Whether what lies in a region is read nowhere else, its end aside."""
    left = inner & ~(1 << place[end])
    while left:
        low = left & -left
        left ^= low
        for user in tensors[low.bit_length() - 1].users:
            if user.op == "output" or (user in place and not inner >> place[user] & 1):
                return False
    return True


def _outermost(
    regions: list[tuple[int, fx.Node]], layers: set[fx.Node], place: dict[fx.Node, int]
) -> list[tuple[int, fx.Node]]:
    """Return the largest regions that are small enough, and lie beside each other."""
    mask = sum(1 << place[n] for n in layers)
    fitting = [r for r in regions if 0 < (r[0] & mask).bit_count() <= LARGEST]
    taken, chosen = 0, []
    for inner, end in sorted(fitting, key=lambda r: -r[0].bit_count()):
        if not inner & taken:
            taken |= inner
            chosen.append((inner, end))
    return chosen


def _chained(ends: list[fx.Node], layers: set[fx.Node], place: dict[fx.Node, int]) -> list[fx.Node]:
    """Leave out ends between single layers that follow each other, up to ``CHAIN`` of them."""
    held = {end: _between(end, set(ends), place) for end in ends}
    counts = {end: len(inside & layers) for end, (inside, _) in held.items()}
    readers: dict[fx.Node, int] = {}
    for _, sources in held.values():
        for source in sources:
            readers[source] = readers.get(source, 0) + 1
    merged: dict[fx.Node, int] = {}
    dropped: set[fx.Node] = set()
    for end in ends:
        merged[end] = counts[end]
        sources = held[end][1]
        if counts[end] != 1 or len(sources) != 1:
            continue
        (before,) = sources
        if counts.get(before) != 1 or readers[before] != 1 or merged[before] >= CHAIN:
            continue
        merged[end] += merged[before]
        dropped.add(before)
    return [end for end in ends if end not in dropped]


def _between(
    end: fx.Node, ends: set[fx.Node], place: dict[fx.Node, int]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """Return the nodes of the block that ends at a node, and the nodes it reads from."""
    inside, sources, waiting = {end}, set(), [end]
    while waiting:
        for source in _inputs(waiting.pop(), place):
            if source in ends or source.op == "placeholder":
                sources.add(source)
            elif source not in inside:
                inside.add(source)
                waiting.append(source)
    return inside, sources


__all__ = ["cut"]
