"""What becomes of comparisons, of truth values, and of what chooses between tensors, in C.

A truth value is a byte, 0 or 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from narrows.backends.c.elementwise import elementwise, number, reach
from narrows.backends.c.layout import View
from narrows.backends.c.moves import Rule, reduced
from narrows.backends.c.sketch import Sketch
from narrows.ir.integer.comparisons import ANSWERS
from narrows.ir.meta import Meta, op_name

MOST_UP = 40  # bits that an operand is shifted to the left by


def _how(args: dict[str, Any]) -> int:
    """Return what a comparison answers, as bits."""
    return sum(bit << i for i, bit in enumerate(ANSWERS[args["how"]]))


def compare(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    """Add the step of a comparison of two tensors."""
    ups = args["a_shift"], args["b_shift"]
    if max(ups) > MOST_UP:
        raise sketch.refuse(
            node, f"{node.name} compares numbers whose scales are 2^{max(ups)} apart",
            "they have no place in 64 bits", "quantize with other exponents",
        )  # fmt: skip
    bound = max(reach(args, "a") << ups[0], reach(args, "b") << ups[1])
    _, sums = number(sketch, node, args, "ab", 0, bound)
    extra = f"{ups[0]}, {ups[1]}, {args['a_zero']}, {args['b_zero']}, {_how(args)}"
    operands = [sketch.view(args["a"]), sketch.view(args["b"])]
    return elementwise(sketch, node, "compare", operands, extra, sums)


def compare_number(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    """Add the step of a comparison with a number."""
    extra = f"{args['code']}, {_how(args)}"
    return elementwise(sketch, node, "compare_number", [sketch.view(args["x"])], extra)


# ------------------------------------------------------------------ ATen's own


def _where(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    operands = [sketch.view(args[k]) for k in ("self", "other", "condition")]
    return elementwise(sketch, node, "choose", operands, "")


def _extreme(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    sign = 1 if op_name(node).startswith("max") else -1
    operands = [sketch.view(args["self"]), sketch.view(args["other"])]
    return elementwise(sketch, node, "larger", operands, str(sign))


# Functions of truth values, by what they make of 0 0, 0 1, 1 0 and 1 1: the bits 0 to 3.
LOGIC = {
    **dict.fromkeys(("logical_and.default", "bitwise_and.Tensor"), 0b1000),
    **dict.fromkeys(("logical_or.default", "bitwise_or.Tensor"), 0b1110),
    **dict.fromkeys(("logical_xor.default", "bitwise_xor.Tensor", "ne.Tensor"), 0b0110),
    "eq.Tensor": 0b1001,
    **dict.fromkeys(("logical_not.default", "bitwise_not.default"), 0b0001),
}


def _logic(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    first = args["self"]
    operands = [sketch.view(first), sketch.view(args.get("other", first))]
    return elementwise(sketch, node, "logic", operands, str(LOGIC[op_name(node)]))


def _any(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    view, dims = sketch.view(args["self"]), args["dim"]
    axes = sorted(d % len(view.shape) for d in (dims if isinstance(dims, list) else [dims]))
    sign = 1 if op_name(node).startswith("any") else -1

    def call(y: str, count: int, x: str, step: str, over: str) -> str:
        return f"extremum({y}, {count}, {x}, {step}, {over}, {sign});"

    return reduced(sketch, node, "extremum", view, axes, call)


CHOICES: dict[str, Rule] = {
    "where.self": _where, "maximum.default": _extreme, "minimum.default": _extreme,
}  # fmt: skip
TRUTHS: dict[str, Rule] = {
    **dict.fromkeys(LOGIC, _logic), "any.dim": _any, "all.dim": _any,
}  # fmt: skip


def find(sketch: Sketch, node: fx.Node) -> Rule | None:
    """Return the rule of an operator that chooses among codes, or works on truth values."""
    name = op_name(node)
    if name in CHOICES:
        return CHOICES[name]
    return TRUTHS.get(name) if all(_truth(sketch, n) for n in node.all_input_nodes) else None


def _truth(sketch: Sketch, node: fx.Node) -> bool:
    value = sketch.fixed.get(node)
    return (value.dtype if isinstance(value, Tensor) else Meta(node).dtype) is torch.bool


__all__ = ["compare", "compare_number", "find"]
