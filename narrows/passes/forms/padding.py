"""Channels of zeros, added where a width keeps a target from its fast kernels.

A network that was pruned elsewhere has whatever widths its pruner left. Some targets compute a
convolution over 45 channels slower than one over 48. `padded` adds the missing channels: their
weights are zero, in the layers that make them and in those that read them. They are dead like
channels that a mask drops, so the smallest form is what it was, and a target's costs decide whether
any of them stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.channels import Facts
from narrows.ir.costs import Costs, rounded
from narrows.ir.couplings import Coupling
from narrows.ir.editing import infer_shapes
from narrows.ir.labels import Bools, Ints, Value
from narrows.ir.meta import shape_of
from narrows.ir.ops import table as ops
from narrows.ir.ops.args import arguments, changed
from narrows.ir.ops.join import Join
from narrows.ir.program import Origin, Program, Pruning
from narrows.ir.rewrite import facts_of
from narrows.ir.structure import structure_of
from narrows.ir.work import CONVOLUTIONS
from narrows.ir.workload import work_of

# Per weight axis: behind which index how many channels of zeros are added.
Gaps = dict[int, int]


def padded(pruning: Pruning, costs: Costs) -> Pruning | None:
    """Return a pruning of a program whose widths meet a target's steps.

    ``None`` if all do anyway.

    Args:
        pruning: What is pruned.
        costs: The target's costs.
    """
    program = pruning.program
    slow = {node.name for node in program.graph.nodes if _is_slow(node, costs)}
    if not slow:
        return None
    facts = facts_of(pruning)
    ties = structure_of(program).ties
    grown = [c for c in ties if slow & _near(program, c) and _can_grow(facts, c)]
    while grown:
        wider = _padded(program, {c: -c.width % costs.step for c in grown}, pruning)
        spoilt = _not_constant(facts, facts_of(wider), {n for c in grown for n in c.nodes})
        if not spoilt:
            return wider
        grown = [c for c in grown if not spoilt & set(c.nodes)]
    return None


def _is_slow(node: fx.Node, costs: Costs) -> bool:
    """Whether a convolution would have a fast kernel if it had a few channels more."""
    work = work_of(node) if ops.contracts(node) else None
    if work is None or work.kind not in CONVOLUTIONS or work.kind == "grouped":
        return False
    if costs.fits(work):
        return False
    return costs.fits(work.resized(inputs=rounded(work.inputs, costs.step)))


def _near(program: Program, coupling: Coupling) -> set[str]:
    """Return the nodes whose channels are a coupling's, and those that read them."""
    nodes = [n for n in program.graph.nodes if n.name in set(coupling.nodes)]
    return {*coupling.nodes, *(u.name for n in nodes for u in n.users)}


def _can_grow(facts: Facts, coupling: Coupling) -> bool:
    """Whether channels can be added at the end of a coupling wherever its channels are.

    They may be all that a tensor has, or, behind a concat, a run of it. Weights that anything else
    reads, too, or that are reshaped on their way, stay as they are.
    """
    if coupling.barrier:
        return False
    for m in coupling.members:
        places = m.positions[:, 0]
        if m.positions.shape[1] != 1 or (np.diff(places) != 1).any():
            return False
    inside, near = set(coupling.nodes), _near(facts.program, coupling)
    weights = {m.weight for m in coupling.members}
    for node in facts.program.graph.nodes:
        if node.op == "get_attr" and str(node.target) in weights:
            if any(user.name not in near for user in node.users):
                return False
        elif node.name in near:
            within = node.name in inside
            if not _takes_more(facts, node, within) or _is_tied(facts, node, weights, within):
                return False
            if within and _meets_another(facts, node, inside):
                return False
    return True


def _takes_more(facts: Facts, node: fx.Node, inside: bool) -> bool:
    """Whether an operator does the same on more channels, with nothing changed but its weights."""
    row = ops.find(node)
    if ops.contracts(node):
        if arguments(node).get("groups", 1) == 1:
            return True
        work = work_of(node)
        return inside and work is not None and work.groups == work.inputs == work.outputs
    if isinstance(row, Join) and inside and not row.stacks:
        return facts.value(node).axes == (arguments(node)["dim"] % len(shape_of(node)),)
    return inside and row is not None and row.any_width


def _is_tied(facts: Facts, node: fx.Node, grown: set[str], inside: bool) -> bool:
    """Whether an operator has weights as wide as its channels that do not grow with them."""
    if ops.concatenates(node):
        return False
    if ops.contracts(node):
        c = ops.contraction(facts, node)
        read = [] if c is None else [c.weight, *([c.bias] if inside and c.bias is not None else [])]
        return not read or any(n.op != "get_attr" or str(n.target) not in grown for n in read)
    free = [n for n in node.all_input_nodes if facts.is_free(n)]
    left = [n for n in free if n.op != "get_attr" or str(n.target) not in grown]
    return any(math.prod(shape_of(n) or ()) > 1 for n in left)


def _meets_another(facts: Facts, node: fx.Node, inside: set[str]) -> bool:
    """Whether an operator takes its channels beside as many of a tensor that does not grow.

    Such a tensor comes from an operator that nothing is known of, or its channels are another's.
    """
    if ops.concatenates(node) or ops.contracts(node):
        return False
    axes, rank = facts.value(node).axes, len(shape_of(node))
    others = [n for n in node.all_input_nodes if n.name not in inside and not facts.is_free(n)]
    shapes = [(1,) * (rank - len(shape_of(n))) + tuple(shape_of(n)) for n in others]
    return any(len(s) != rank or any(s[axis] != 1 for axis in axes) for s in shapes)


def _padded(program: Program, extra: Mapping[Coupling, int], pruning: Pruning) -> Pruning:
    """Return a pruning of a program with so many channels of zeros more per coupling."""
    wider = program.copy()
    weights, origins = wider.weights, dict(program.origins)
    gaps: dict[tuple[str, int], Gaps] = {}
    for coupling, count in extra.items():
        for m in coupling.members:
            gaps.setdefault((m.weight, m.axis), {})[int(m.positions[-1, 0]) + 1] = count
    for (name, axis), added in gaps.items():
        tensor, index = weights[name], _index(weights[name].shape[axis], added)
        zeros = torch.zeros_like(tensor.narrow(axis, 0, 1)).detach()
        taken = torch.cat([tensor.detach(), zeros], dim=axis)
        weights[name] = taken.index_select(axis, torch.from_numpy(index))
        origins[name] = longer_origin(origins.get(name), name, tensor, axis, index)
    facts, longer = facts_of(pruning), dict(pruning.ignored)
    for old, node in zip(program.graph.nodes, wider.graph.nodes, strict=True):
        c = ops.contraction(facts, old)
        if c is None or c.weight.op != "get_attr":
            continue
        # Who reads what it makes, channel by channel, has no axis of its own for what it reads.
        axis = c.in_axis if c.groups == 1 else c.out_axis
        added = gaps.get((str(c.weight.target), axis), {})
        if c.groups > 1 and added:
            node.args, node.kwargs = changed(node, {"groups": c.groups + sum(added.values())})
        if node.name in longer and added:
            mask = longer[node.name]
            longer[node.name] = np.append(mask, True)[_index(len(mask), added)]
    wider.origins = origins
    infer_shapes(wider)
    return Pruning(wider.seal(), longer)


def _index(width: int, added: Gaps) -> Ints:
    """Return the old index at every new place of an axis; ``width`` for those that are new."""
    places = [end for end, count in added.items() for _ in range(count)]
    return np.insert(np.arange(width), places, width)


def longer_origin(
    before: Origin | None, name: str, tensor: Tensor, axis: int, index: Ints
) -> Origin:
    """Return where a weight came from that has channels of zeros more: they have no place, -1."""
    if before is None:
        before = Origin(name, tuple(tensor.shape), (None,) * tensor.dim())
    made: list[Any] = list(before.index)
    nested = [a for a, old in enumerate(made) if old and isinstance(old[0], tuple)]
    for other in nested:  # each row of an axis has columns of its own on this one
        rows = made[other]
        if other == axis:
            made[other] = tuple(tuple((*row, -1)[i] for i in index) for row in rows)
        else:
            gone = (-1,) * len(rows[0])
            made[other] = tuple((*rows, gone)[i] for i in index)
    if axis not in nested:
        old = made[axis]
        places = (*(range(tensor.shape[axis]) if old is None else old), -1)
        made[axis] = tuple(places[i] for i in index)
    return replace(before, index=tuple(made))


def _not_constant(before: Facts, after: Facts, inside: set[str]) -> set[str]:
    """Return the nodes in which channels that were added are not known to be finite constants."""
    old = {node.name: flow.value for node, flow in before.flows.items()}
    added: dict[fx.Node, Bools] = {}
    spoilt = set()
    for node, flow in after.flows.items():
        was, value = old[node.name], flow.value
        if node.name not in inside or not isinstance(was, Value) or not isinstance(value, Value):
            continue
        mask = np.zeros(value.count, dtype=bool)
        passed = [(r.source, r.operand) for r in flow.reads if r.source is not None]
        if not passed:  # it makes them, the new ones last
            mask[was.count :] = True
        for source, operand in passed:
            if operand in added:
                mask |= (source >= 0) & added[operand][source]
        added[node] = mask
        if value.const is None or not np.isfinite(value.const[mask]).all():
            spoilt.add(node.name)
    return spoilt
