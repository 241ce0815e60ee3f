"""What becomes of operators that work element by element, and of concatenation, in C."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from narrows.backends.c.layout import Buffer, View, loops, packed, row_major
from narrows.backends.c.sketch import Pointers, Sketch, nest
from narrows.backends.c.types import CODES
from narrows.ir.meta import Meta


def tail(args: dict[str, Any]) -> str:
    """Return the arguments that every call ends in."""
    return f"{args['zero']}, {args['low']}, {args['high']}"


def span(value: Any) -> tuple[int, int]:
    """Return the smallest and the largest code that a tensor may hold, zero point and all."""
    grid = Meta(value).grid if isinstance(value, fx.Node) else None
    if grid is not None and grid.wide:
        return grid.low, grid.high
    wide = isinstance(value, Tensor) and value.dtype is torch.int16
    return (-(2**15), 2**15 - 1) if wide else (0, 255)


def reach(args: dict[str, Any], side: str) -> int:
    """Return the largest magnitude of an operand without its zero point."""
    low, high = span(args[side])
    zero = args[f"{side}_zero"]
    return max(zero - low, high - zero)


def number(
    sketch: Sketch, node: fx.Node, args: dict[str, Any], sides: str, by: int, bound: int
) -> tuple[int, str]:
    """Return a shift, and the type of the numbers where a code has 16 bits (`Sketch.shift`)."""
    wide = any(span(args[s]) != span(None) for s in sides)
    if Meta(node).dtype is torch.int16 or wide:
        return sketch.long_shift(node, by, bound)
    return sketch.shift(node, by, bound), ""


def elementwise(
    sketch: Sketch, node: fx.Node, kernel: str, operands: list[View], extra: str, sums: str = ""
) -> View:
    """Add the step of a kernel that takes an element of each operand, which are broadcast."""
    shape = sketch.shape(node)
    whole = next((v for v in operands if v.shape == shape), None)
    order = row_major(len(shape)) if whole is None else whole.order()
    target = sketch.result(node, shape, order)
    views = [target, *(v.broadcast(shape) for v in operands)]
    made = loops(views, order)

    def code(at: Pointers) -> list[str]:
        def call(p: list[str], s: list[str], n: int) -> str:
            pairs = ", ".join(f"{a}, {b}" for a, b in zip(p, s, strict=True))
            return f"{kernel}({pairs}, {n}{', ' if extra else ''}{extra});"

        return nest([at(v) for v in views], made, call)

    return sketch.step(node, kernel, target, views[1:], code, in_place=True, sums=sums)


def add(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    """Add the step of a sum or a difference."""
    ups = args["a_shift"], args["b_shift"]
    if max(ups) > 40:
        raise sketch.refuse(
            node, f"{node.name} adds numbers whose scales are 2^{max(ups)} apart",
            "their sum has no place in 64 bits", "quantize with other exponents",
        )  # fmt: skip
    bound = (reach(args, "a") << ups[0]) + (reach(args, "b") << ups[1])
    by, sums = number(sketch, node, args, "ab", args["shift_by"], bound)
    extra = (
        f"{ups[0]}, {ups[1]}, {by}, {args['a_zero']}, {args['b_zero']}, {tail(args)}, "
        f"{args['sign']}"
    )
    operands = [sketch.view(args["a"]), sketch.view(args["b"])]
    return elementwise(sketch, node, "add", operands, extra, sums)


def mul(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    """Add the step of a product."""
    bound = reach(args, "a") * reach(args, "b")
    by, sums = number(sketch, node, args, "ab", args["shift_by"], bound)
    extra = f"{by}, {args['a_zero']}, {args['b_zero']}, {tail(args)}"
    operands = [sketch.view(args["a"]), sketch.view(args["b"])]
    return elementwise(sketch, node, "mul", operands, extra, sums)


def rescale(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    """Add the step of codes that change their grid."""
    by, sums = number(sketch, node, args, "x", args["shift_by"], reach(args, "x"))
    extra = f"{by}, {args['x_zero']}, {tail(args)}"
    return elementwise(sketch, node, "rescale", [sketch.view(args["x"])], extra, sums)


def lookup(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    """Add the step of a table."""
    codes = args["table"].numpy()
    table = sketch.constant(f"{node.name}_table", codes, CODES[codes.itemsize])
    table += f" + {-args['first']}" if args["first"] else ""
    return elementwise(sketch, node, "lookup", [sketch.view(args["x"])], table)


def prelu(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    """Add the step of slopes."""
    slopes = args["slopes"]
    symbol = sketch.constant(f"{node.name}_slopes", slopes.numpy(), "int16_t")
    strides = packed(slopes.shape, row_major(slopes.dim()))
    held = View(Buffer(symbol, slopes.numel(), "constant", symbol), 0, tuple(slopes.shape), strides)
    bound = 255 * max(1 << args["unit"], int(slopes.to(torch.int64).abs().max()))
    by = sketch.shift(node, args["shift_by"], bound)
    extra = f"{args['unit']}, {by}, {args['x_zero']}, {tail(args)}"
    return elementwise(sketch, node, "prelu", [sketch.view(args["x"]), held], extra)


def concat(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    """Add the steps of tensors side by side."""
    parts = [sketch.view(x) for x in args["xs"]]
    shape = sketch.shape(node)
    axis, order = args["axis"] % len(shape), max(parts, key=lambda v: v.size).order()
    target = sketch.result(node, shape, order)
    offset = 0
    for i, (part, by, zero) in enumerate(zip(parts, args["shift_by"], args["zeros"], strict=True)):
        hole = View(target.buffer, offset, part.shape, target.strides)
        offset += part.shape[axis] * target.strides[axis]
        low, high = span(args["xs"][i])
        inside = low >= args["low"] and high <= args["high"]
        if by == 0 and zero == args["zero"] and inside and part.buffer.unit == hole.buffer.unit:
            sketch.copied(node, part, hole)
            continue
        operand = {"x": args["xs"][i], "x_zero": zero}
        by, sums = number(sketch, node, operand, "x", by, reach(operand, "x"))
        _joined(sketch, node, part, hole, f"{by}, {zero}, {tail(args)}", sums)
    return target


def _joined(sketch: Sketch, node: fx.Node, part: View, hole: View, extra: str, sums: str) -> None:
    made = loops([hole, part], hole.order())

    def code(at: Pointers) -> list[str]:
        return nest([at(hole), at(part)], made, lambda p, s, n:
                    f"rescale({p[0]}, {s[0]}, {p[1]}, {s[1]}, {n}, {extra});")  # fmt: skip

    sketch.step(node, "rescale", hole, [part], code, sums=sums)


__all__ = [
    "add",
    "concat",
    "elementwise",
    "lookup",
    "mul",
    "number",
    "prelu",
    "reach",
    "rescale",
    "span",
    "tail",
]
