"""Integer program -> ONNX model: one function per operator, by form."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import onnx
import torch
from torch import fx

from narrows.backends.integers import of_narrows
from narrows.backends.onnx.integer import choices, moves, portable, qdq, qlinear, quotients, wide
from narrows.backends.onnx.integer.graph import Graph
from narrows.backends.onnx.integer.islands import Islands
from narrows.errors import LowerError, UsageError
from narrows.ir.graph import live_nodes
from narrows.ir.integer.bounds import EXACT, accumulator_bound
from narrows.ir.integer.grid import HALF_UP
from narrows.ir.meta import Meta, op_name, shape_of
from narrows.ir.ops.args import arguments
from narrows.ir.program import Program

FORMS: dict[str, dict[str, Callable[[Graph, fx.Node], None]]] = {
    "qdq": qdq.FORM,
    "qlinear": qlinear.FORM,
    "integer": portable.FORM,
}

# What is written the same way in every form, for codes of any width.
ALIKE: dict[str, Callable[[Graph, fx.Node], None]] = {**choices.FORM, **quotients.FORM}

# Beyond this shift a result can lie among the codes while its accumulator is no float32.
EXACT_SHIFT = 16


def lower(program: Program, outputs: list[fx.Node], form: str, opset: int) -> onnx.ModelProto:
    """Return the model of an integer program.

    Args:
        program: The program.
        outputs: The nodes that the model returns.
        form: ``qdq``, ``qlinear`` or ``integer``.
        opset: The version of the ONNX operators.

    Raises:
        LowerError: An operator has no form in ONNX, or would compute something else there.
    """
    if form not in FORMS:
        raise UsageError(f"form is {', '.join(FORMS)}, got {form!r}")
    half_up = rounds_up(program)
    if half_up and form == "qdq":
        raise LowerError(
            f"{program.name} rounds ties up, which the form qdq cannot",
            why="QuantizeLinear rounds ties to even, and the nudged scale that makes up for it is "
            "exact in fused kernels alone",
            hint='form="qlinear", form="integer", or quantize with rounding="half_even"',
        )
    graph = Graph(program, half_up)
    table = FORMS[form]
    live = [n for n in live_nodes(program.graph) if n.op == "call_function"]
    live = [n for n in live if Meta(n).size is None]
    islands = Islands(graph, [n for n in live if is_island(n)], opset)
    for node in live:
        name = str(node.target._opname) if of_narrows(node) else ""  # type: ignore[union-attr]
        if name in ALIKE:
            ALIKE[name](graph, node)
            continue
        if of_narrows(node) and wide.is_wide(node):
            wide.FORM[name](graph, node)
            continue
        if of_narrows(node):
            if form != "integer":
                _check_exact(graph, node)
            table[name](graph, node)
            continue
        if is_island(node):
            islands.write(node)
        else:
            _mover(node)(graph, node)
    inputs = [n for n in program.placeholders if shape_of(n) is not None]
    graph.give(outputs)
    return graph.model(inputs, outputs, opset)


def rounds_up(program: Program) -> bool:
    """Whether the shifts of an integer program round ties up."""
    calls = (n for n in program.graph.nodes if of_narrows(n))
    return any(arguments(n).get("rounding") == HALF_UP for n in calls)


def is_island(node: fx.Node) -> bool:
    """Whether an operator is written as the exporter of float programs writes it."""
    return not of_narrows(node) and _mover(node) is None


def _mover(node: fx.Node) -> Any:
    """Return what writes an operator that moves codes; ``None`` for any other."""
    return moves.find(node) if _on_codes(node) else None


def _on_codes(node: fx.Node) -> bool:
    """Whether an operator works on codes, or on the parts of a split of codes."""
    while node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    dtype = Meta(node).dtype if shape_of(node) is not None else Meta(node.all_input_nodes[0]).dtype
    return dtype in (torch.uint8, torch.int16)


def _check_exact(graph: Graph, node: fx.Node) -> None:
    """Raise `LowerError` where a kernel's float32 would not tell what a shift does."""
    args: dict[str, Any] = arguments(node)
    if op_name(node).startswith("matmul"):
        grids = [graph.grid(args[side]) for side in ("a", "b")]
        most = [max(g.zero - g.low, g.high - g.zero) for g in grids]
        bound = torch.tensor([shape_of(args["a"])[-1] * most[0] * most[1]])
        by = torch.tensor([args["shift_by"]])
    elif op_name(node).startswith(("conv", "linear")):
        turned = op_name(node).startswith("conv_transpose")
        bias = None if args["bias"] is None else graph.tensor(args["bias"])
        weight, grid = graph.tensor(args["weight"]), graph.grid(args["x"])
        bound = accumulator_bound(weight, bias, grid, int(turned), args["groups"] if turned else 1)
        by = torch.tensor(args["shift_by"]).expand_as(bound)
    else:
        return
    wrong = (bound > EXACT) & (by > EXACT_SHIFT)
    if bool(wrong.any()):
        channel = int(wrong.float().argmax())
        raise graph.refuse(
            node,
            f"{node.name} would not be exact in this form",
            f"the accumulator of channel {channel} can reach {int(bound[channel]):,}, beyond "
            f"float32, and its shift {int(by[channel])} lets it matter",
            'form="integer", or fewer bits for the weights of this layer',
        )


__all__ = ["FORMS", "lower"]
