"""What a person is told where masked channels remain, and where nothing of the inputs does.

A channel that a plan masks may have to stay, as zeros, for what shares its place: the model's
output, an input that is joined to it. The rewriter needs no decision for that, so it notes nothing;
`remaining` compares the plan with what came out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import fx

from narrows.ir.channels import Facts, analyse
from narrows.ir.labels import Value
from narrows.ir.meta import Meta
from narrows.ir.ops import table
from narrows.ir.ops.layout import Layout
from narrows.ir.program import Note, Origin, Program, Pruning
from narrows.ir.rewrite import facts_of
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.plans.uses import Use, uses_of


def remaining(
    program: Program, plan: ChannelPlan, result: Program, notes: Sequence[Note]
) -> Iterator[Note]:
    """Yield which masked outputs are still made although no other note says why.

    Args:
        program: The program before it was pruned.
        plan: The plan.
        result: The pruned program.
        notes: What there is to say already.
    """
    uses = uses_of(program)
    layers = {use.node for found in uses.values() for use in found}
    names = {node.name for node in layers}
    explained = {n.where for n in notes if n.channels}
    # Of a layer that reads them, what it says of its own results explains nothing.
    explained_later = {
        n.where for n in notes if n.channels and (n.reason != "output" or n.where not in names)
    }
    for name, keep in plan.outputs.items():
        if len(uses.get(name, ())) != 1 or name not in result.weights:
            continue
        (use,) = uses[name]
        there = present(use, "outputs", result.origins.get(name))
        count = 0 if there is None else len(np.setdiff1d(there, keep))
        reached = _reached(use.node, layers) if count else []
        unsaid = explained_later.isdisjoint(n.name for n in reached)
        if count and use.node.name not in explained and unsaid:
            stay = "1 masked output stays" if count == 1 else f"{count} masked outputs stay"
            message = f"{stay}, as zeros: {_why(program, reached)}"
            yield Note(use.node.name, "place", message, count, Meta(use.node).source)


def _reached(node: fx.Node, layers: set[fx.Node]) -> list[fx.Node]:
    """Return what reads a node's channels, up to the next layers and the outputs."""
    found: dict[fx.Node, None] = {}
    queue = [*node.users]
    while queue:
        user = queue.pop()
        if user not in found:
            found[user] = None
            queue += [] if user in layers else user.users
    return list(found)


def _why(program: Program, reached: Sequence[fx.Node]) -> str:
    ends = [*_joined(program, reached)]
    if any(node.op == "output" for node in reached):
        ends.insert(0, "the model's output holds them")
    return " and ".join(ends) or "what reads them has a place for them"


def _joined(program: Program, reached: Sequence[fx.Node]) -> Iterator[str]:
    """Yield which inputs of the model, as they are, meet the channels."""
    for holder in program.placeholders:
        moved = {holder}
        for node in program.graph.nodes:
            if isinstance(table.find(node), Layout) and moved & {*node.all_input_nodes}:
                moved.add(node)
        meets = (
            n.name for n in program.graph.nodes if n in reached and moved & {*n.all_input_nodes}
        )
        if (first := next(meets, None)) is not None:
            yield f"{first} joins the model's input {holder.name} to them"


# ------------------------------------------------------------------ outputs without inputs


def constant_outputs(before: Program, pruning: Pruning) -> Iterator[Note]:
    """Yield which outputs depended on an input before and do not any more."""
    facts = facts_of(pruning)
    for number, (old, new) in enumerate(
        zip(_results(before), _results(pruning.program), strict=True)
    ):
        if _is_constant(facts, new) and not _is_constant(analyse(before), old):
            yield Note(
                old.name, "constant", f"output {number} is the same for every input: nothing that "
                "an input decides is left of it", 0, Meta(old).source,
            )  # fmt: skip


def _results(program: Program) -> list[Any]:
    (results,) = program.output.args
    return list(results)  # type: ignore[arg-type]


def _is_constant(facts: Facts, node: Any) -> bool:
    """Whether every channel of an output that is computed is a constant."""
    flow = facts.flows.get(node)
    if flow is None or node.op != "call_function" or not isinstance(flow.value, Value):
        return False
    return not flow.value.free and bool(flow.value.known().all())


# ------------------------------------------------------------------ what a rewritten weight holds


def present(use: Use, side: str, origin: Origin | None) -> np.ndarray | None:
    """Return which channels of a side are in a rewritten weight; ``None`` if that is not plain."""
    width = use.width(side)
    if origin is None:
        return np.arange(width)
    axis = use.in_axis if side == "inputs" else use.out_axis
    if use.groups > 1:
        if use.groups != use.inputs:
            return None
        rows = _index(origin, use.out_axis)
        if rows is None:
            return np.arange(width)
        return rows if side == "outputs" else np.unique(rows // (use.outputs // use.inputs))
    found = _index(origin, axis)
    return np.arange(width) if found is None else found


def _index(origin: Origin, axis: int) -> np.ndarray | None:
    index = origin.index[axis]
    if index is None:
        return None
    found = np.unique(np.array(index))
    return found[found >= 0]  # what is not there is a channel of zeros that was added
