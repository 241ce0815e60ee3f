"""Producers made twice, each copy for the readers that want the same of it.

Two layers may want different channels of one producer, and no order of them serves both without a
copy. Where copying is dear and the producer cheap, the producer is made once per reader, with just
the channels that this one reads. `apart` finds, by a target's costs, where that is faster than
every form with one producer (`narrows.passes.forms.widths`), and rewrites the program so; the
smallest form of each copy is then found like that of any layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import fx
from torch.fx.node import map_arg

from narrows.ir.channels import Facts
from narrows.ir.editing import add_weight
from narrows.ir.meta import Meta
from narrows.ir.ops import table as ops
from narrows.ir.program import Draft, Note, Pruning
from narrows.ir.rewrite import facts_of
from narrows.ir.structure.spaces import Reader, Space, handed
from narrows.passes.forms.widths import Chooser, Decision

# How often the time of making something again is counted. Cost tables are least certain of narrow
# layers, and the weights are there twice.
AGAIN = 2.0


@dataclass(frozen=True, eq=False)
class Split:
    """A space whose tensors are to be made once per part.

    Attributes:
        space: The space.
        parts: The readers of each copy; the first ones read the tensors that are there.
    """

    space: Space
    parts: tuple[tuple[Reader, ...], ...]


def apart(pruning: Pruning, chooser: Chooser, decisions: Sequence[Decision]) -> Pruning | None:
    """Return a pruning whose program makes some producers once per reader, ``None`` where no such
    form pays.

    Args:
        pruning: What the decisions are about.
        chooser: What made them.
        decisions: The best form with one producer each.
    """
    splits = [s for d in decisions if (s := _split(chooser, d)) is not None]
    return taken_apart(pruning, splits) if splits else None


def split_notes(pruning: Pruning) -> Iterator[Note]:
    """Yield which producers of the unpruned program are made more than once, and for whom."""
    facts = facts_of(pruning)
    for node in pruning.program.graph.nodes:
        if Meta(node).twin and ops.contraction(facts, node) is not None:
            readers = ", ".join(sorted({n.name for n in _readers(node)}))
            yield Note(
                node.name, "split", f"made a second time, for {readers} alone: every copy of "
                "channels costs more on this target", 0, Meta(node).source,
            )  # fmt: skip


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if Meta(user).twin:
            yield from _readers(user)
        else:
            yield user


# ------------------------------------------------------------------ where it pays


def _split(chooser: Chooser, decision: Decision) -> Split | None:
    """Return how to split the producers of a space, if that is cheaper than what was chosen."""
    space = decision.space
    if not can_split(chooser.facts, space):
        return None
    classes: dict[bytes, tuple[Reader, ...]] = {}
    for reader in space.readers:
        key = reader.wants.tobytes()
        classes[key] = (*classes.get(key, ()), reader)
    if len(classes) < 2 or all(np.array_equal(r.wants, decision.hold) for r in space.readers):
        return None
    rest, parts, now = [*classes.values()], [], decision
    while len(rest) > 1:
        options = []
        for one in rest:
            others = [r for c in rest if c is not one for r in c]
            options.append((_weighed(chooser, space, one), _weighed(chooser, space, others), one))
        first, second, one = min(options, key=lambda o: o[0].seconds + o[1].seconds)
        again = max(0.0, first.making + second.making - now.making)
        if first.seconds + second.seconds + (AGAIN - 1) * again >= now.seconds:
            break
        parts.append(one)
        rest.remove(one)
        now = second
    if not parts:
        return None
    return Split(space, (tuple(r for c in rest for r in c), *parts))


def can_split(facts: Facts, space: Space) -> bool:
    """Whether a space's tensors depend on nothing but its producers, and only layers read them."""
    if space.fixed or space.entries or not space.makers:
        return False
    nodes = [r.node for r in space.readers]
    if len(nodes) < 2 or len(set(nodes)) < len(nodes) or any(r.rigid for r in space.readers):
        return False
    inside = {*space.nodes, *nodes}
    if any(user in facts.flows and user not in inside for n in space.nodes for user in n.users):
        return False  # a concat, or a residual stream that goes on
    if any(n.op != "call_function" or len(facts.value(n).axes) > 1 for n in space.nodes):
        return False
    for maker in space.makers:
        c = ops.contraction(facts, maker)
        if c is None or c.groups > 1 or c.weight.op != "get_attr" or len(c.weight.users) > 1:
            return False
    return True


def _weighed(chooser: Chooser, space: Space, readers: Sequence[Reader]) -> Decision:
    """Return the best form of a space's tensors if just these layers read them."""
    nodes = _needed(chooser.facts, space, readers)
    live = np.any([r.wants for r in readers], axis=0)
    makers = [m for m in space.makers if m in nodes]
    part = Space([n for n in space.nodes if n in nodes], live, makers, [], [*readers])
    return chooser.weigh(part)


def _needed(facts: Facts, space: Space, readers: Sequence[Reader]) -> set[fx.Node]:
    """Return the tensors of a space that some of its readers depend on."""
    inside, found = set(space.nodes), set[fx.Node]()
    queue = [r.x for r in readers] + [n for r in readers for n in r.tail]
    while queue:
        node = queue.pop()
        if node in found or node not in inside:
            continue
        found.add(node)
        queue += [facts.flows[node].reads[slot].operand for slot in handed(facts, node)]
    return found


# ------------------------------------------------------------------ the program with copies


def taken_apart(pruning: Pruning, splits: Sequence[Split]) -> Pruning:
    """Return a pruning whose program makes its producers once per part of each split."""
    facts, program = facts_of(pruning), pruning.program.copy()
    new = dict(zip(pruning.program.graph.nodes, program.graph.nodes, strict=True))
    ignored = dict(pruning.ignored)
    for split in splits:
        shared = _needed(facts, split.space, split.parts[0])
        for readers in split.parts[1:]:
            needed = _needed(facts, split.space, readers)
            twins: dict[fx.Node, fx.Node] = {}
            for node in (n for n in split.space.nodes if n in needed & shared):
                twins[new[node]] = _twin(program, new[node], twins)
                if node.name in ignored:
                    ignored[twins[new[node]].name] = ignored[node.name]
            for node in (*(needed - shared), *(r.node for r in readers)):
                for before, after in twins.items():
                    new[node].replace_input_with(before, after)
            shared |= needed
    program.graph.lint()
    return Pruning(program.seal(), ignored)


def _twin(program: Draft, node: fx.Node, twins: dict[fx.Node, fx.Node]) -> fx.Node:
    """Add a node that does the same as ``node``, with weights of its own."""
    own = dict(twins)
    for weight in (n for n in node.all_input_nodes if n.op == "get_attr"):
        stem, dot, leaf = str(weight.target).rpartition(".")
        name = f"{stem}_split{dot}{leaf}" if dot else f"{leaf}_split"
        own[weight] = add_weight(program, name, program.tensor(weight), str(weight.target))
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: own.get(n, n))
    with program.graph.inserting_after(node):
        made = program.graph.create_node(
            node.op, node.target, args, kwargs, name=f"{node.name}_split"
        )
    made.meta = dict(node.meta)
    Meta(made).twin = Meta(node).twin or node.name
    return made


__all__ = ["Split", "apart", "can_split", "split_notes", "taken_apart"]
