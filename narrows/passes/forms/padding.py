"""Channels of zeros, added where a width keeps a target from its fast kernels.

A network that was pruned elsewhere has whatever widths its pruner left. Some targets compute a
convolution over 45 channels slower than one over 48. `padded` adds the missing channels: their
weights are zero, in the layers that make them and in those that read them. They are dead like
channels that a mask drops, so the smallest form is what it was, and a target's costs decide whether
any of them stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.channels import Facts
from narrows.ir.cost import CostTable
from narrows.ir.couplings import Coupling, couplings
from narrows.ir.labels import Bools
from narrows.ir.ops import table as ops
from narrows.ir.ops.args import arguments, changed
from narrows.ir.ops.contract import Contract
from narrows.ir.program import Meta, Origin, Program, infer_shapes
from narrows.ir.rewrite import Base
from narrows.ir.work import CONVOLUTIONS, work_of


def padded(base: Base, table: CostTable) -> Base | None:
    """Return a base whose widths meet the blocks of a target, or ``None`` if all do anyway.

    Args:
        base: What a program is pruned from.
        table: The target's costs.
    """
    program = base.program
    slow = {node.name for node in program.graph.nodes if _is_slow(node, table)}
    if not slow:
        return None
    found = couplings(program)
    owners = Counter((m.weight, m.axis) for c in found for m in c.members)
    grown = [c for c in found if slow & _near(program, c) and _can_grow(program, c, owners)]
    while grown:
        block = table.layout.block
        wider = _padded(program, {c: -c.width % block for c in grown}, base.ignored)
        spoilt = [c for c in grown if not _is_constant(wider.facts, c)]
        if not spoilt:
            return wider
        grown = [c for c in grown if c not in spoilt]
    return None


def _is_slow(node: fx.Node, table: CostTable) -> bool:
    """Whether a convolution would run in blocks if it had a few channels more."""
    work = work_of(node) if isinstance(ops.find(node), Contract) else None
    if work is None or work.kind not in CONVOLUTIONS or work.kind == "grouped":
        return False
    block = table.layout.block
    more = work.resized(inputs=work.inputs + -work.inputs % block)
    return table.form(work) == "plain" and table.form(more) != "plain"


def _near(program: Program, coupling: Coupling) -> set[str]:
    """Return the nodes whose channels are a coupling's, and those that read them."""
    nodes = [n for n in program.graph.nodes if n.name in set(coupling.nodes)]
    return {*coupling.nodes, *(u.name for n in nodes for u in n.users)}


def _can_grow(program: Program, coupling: Coupling, owners: Mapping[tuple[str, int], int]) -> bool:
    """Whether channels can be added at the end of every tensor and weight of a coupling."""
    if coupling.barrier:
        return False
    for m in coupling.members:
        whole = program.weights[m.weight].shape[m.axis] == coupling.width
        if owners[m.weight, m.axis] > 1 or not whole or m.positions.shape[1] != 1:
            return False
        if (m.positions[:, 0] != np.arange(coupling.width)).any():
            return False
    inside = set(coupling.nodes)
    nodes = [n for n in program.graph.nodes if n.name in _near(program, coupling)]
    return all(_takes_more(n, n.name in inside, coupling.width) for n in nodes)


def _takes_more(node: fx.Node, inside: bool, width: int) -> bool:
    """Whether an operator does the same on more channels, with nothing changed but its weights."""
    row = ops.find(node)
    if isinstance(row, Contract):
        if arguments(node).get("groups", 1) == 1:
            return True
        work = work_of(node)
        return inside and work is not None and work.groups == work.inputs == work.outputs == width
    return inside and row is not None and row.even


def _padded(program: Program, extra: Mapping[Coupling, int], ignored: Mapping[str, Bools]) -> Base:
    """Return a base with so many channels of zeros more at the end of each coupling."""
    wider = program.copy()
    weights, origins = wider.weights, dict(program.origins)
    for coupling, count in extra.items():
        for m in coupling.members:
            name, tensor = m.weight, weights[m.weight]
            shape = [count if a == m.axis else s for a, s in enumerate(tensor.shape)]
            weights[name] = torch.cat([tensor.detach(), tensor.new_zeros(shape)], dim=m.axis)
            origins[name] = _origin(origins.get(name), name, tensor, m.axis, count)
    names = {name: count for c, count in extra.items() for name in c.nodes}
    for node in wider.graph.nodes:
        if not isinstance(ops.find(node), Contract):
            continue
        groups = arguments(node).get("groups", 1)
        if groups > 1 and node.name in names:
            node.args, node.kwargs = changed(node, {"groups": groups + names[node.name]})
    wider = wider.replace(weights=weights, origins=origins)
    infer_shapes(wider)
    longer = {}
    for node in wider.graph.nodes:
        row, mask = ops.find(node), ignored.get(node.name)
        if mask is not None and isinstance(row, Contract):
            x = arguments(node)[row.x]
            more = Meta(x).shape[row.input_axis(node, x)] - len(mask)
            longer[node.name] = np.append(mask, np.ones(more, dtype=bool))
    return Base(wider, {**ignored, **longer})


def _origin(before: Origin | None, name: str, tensor: Tensor, axis: int, count: int) -> Origin:
    """Return where a weight came from that has channels of zeros more: they have no place, -1."""
    if before is None:
        before = Origin(name, tuple(tensor.shape), (None,) * tensor.dim())
    index = before.index[axis]
    index = (*(range(tensor.shape[axis]) if index is None else index), *(-1,) * count)
    return replace(before, index=(*before.index[:axis], index, *before.index[axis + 1 :]))


def _is_constant(facts: Facts, coupling: Coupling) -> bool:
    """Whether the channels that were added are known to be finite constants everywhere."""
    names = set(coupling.nodes)
    for node in facts.program.graph.nodes:
        if node.name in names:
            const = facts.value(node).const
            if const is None or not np.isfinite(const[coupling.width :]).all():
                return False
    return True
