"""What becomes of each operator of ``torch.ops.narrows`` in C: one rule per operator."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from narrows.backends.c.layout import Loop, View, channels_last, loops, packed, row_major
from narrows.backends.c.moves import Rule, reduced, spread, window_text
from narrows.backends.c.powers import power_digits
from narrows.backends.c.sketch import INT32, Pointers, Sketch, nest

# Vectors of inputs are read up to this many codes at once (NARROWS_LANES in the C code).
LANES = 32
# So many biases and shifts are read at once.
BLOCK = 16

FLOATS = {
    "layer_norm": "its root and its quotient are floating-point by definition",
}


def tail(args: dict[str, Any]) -> str:
    """Return the arguments that every call ends in."""
    return f"{args['zero']}, {args['low']}, {args['high']}"


def ends(args: dict[str, Any]) -> str:
    """Return the fields that every record ends in."""
    return f".zero = {args['zero']}, .low = {args['low']}, .high = {args['high']}"


# ------------------------------------------------------------------ layers


def _sums(
    sketch: Sketch, node: fx.Node, args: dict[str, Any], rows: Tensor, groups: int = 1
) -> tuple[str, int]:
    """Return the fields of a ``struct sums`` and the length of a row.

    Args:
        sketch: Gets the weights, the bias and the shifts.
        node: The layer.
        args: Its arguments.
        rows: The weight's codes, int8 ``[outputs, inputs]``, the inputs as they lie in memory.
        groups: How many groups the outputs fall into; a record describes one of them.
    """
    outputs, inputs = rows.shape
    rows, bias, shifts = _settled(sketch, node, args, rows)
    shape = "x".join(map(str, args["weight"].shape))
    digits = power_digits(rows.numpy())  # [terms, outputs, inputs]
    weights = sketch.constant(
        f"{node.name}_weights", rows.numpy(), "int8_t", pad=LANES - 1,
        remark=f"{shape}, stored [{outputs}][{inputs}]",
        powers=None if digits is None else digits.transpose(1, 0, 2),
    )  # fmt: skip
    fields = (
        f".weights = {weights}, {_settling(sketch, node, bias, shifts, groups)}, "
        f".inputs = {inputs}, "
        f".outputs = {outputs // groups}, {ends(args)}{_terms(sketch, digits)}"
    )
    return fields, inputs


def _settled(
    sketch: Sketch, node: fx.Node, args: dict[str, Any], rows: Tensor
) -> tuple[Tensor, Tensor, list[int]]:
    """Return weights and bias in int64, and shifts that stay within 32 bits.

    Codes are multiplied as they are; what their zero point adds to a sum is taken from the bias.
    """
    rows = rows.to(torch.int64)
    count = rows.shape[0]
    bias = torch.zeros(count, dtype=torch.int64)
    if args["bias"] is not None:
        bias = args["bias"].to(torch.int64)
    most = max(args["x_zero"], 255 - args["x_zero"])
    bounds = (rows.abs().sum(1) * most + bias.abs()).tolist()
    given = list(args["shift_by"])
    given = given * count if len(given) == 1 else given
    shifts = [sketch.shift(node, by, bound) for by, bound in zip(given, bounds, strict=True)]
    sketch.signed_shifts |= min(shifts) < 0
    bias = bias - args["x_zero"] * rows.sum(1)
    reach = 255 * torch.stack([rows.clamp(min=0).sum(1), -rows.clamp(max=0).sum(1)])
    if int((reach + bias.abs()).max()) >= INT32:
        sketch.widen(node)
    return rows, bias, shifts


def _settling(
    sketch: Sketch, node: fx.Node, bias: Tensor, shifts: list[int], groups: int = 1
) -> str:
    """Return the fields of bias and shifts; every group reads whole blocks of them."""
    pad = BLOCK - 1 if groups > 1 else -len(shifts) % BLOCK
    name = node.name
    biases = sketch.constant(f"{name}_bias", bias.numpy(), "number", pad=pad)
    moved = sketch.constant(f"{name}_shifts", np.asarray(shifts), "int32_t", pad=pad)
    return f".bias = {biases}, .shifts = {moved}"


def _terms(sketch: Sketch, digits: np.ndarray | None) -> str:
    """Return the field that says how many powers of two a weight is the sum of."""
    sketch.layers += 1
    if digits is None:
        return ""
    sketch.shift_layers += 1
    return f" TERMS({len(digits)})"


def _columns(sketch: Sketch, node: fx.Node, inputs: int) -> View:
    return sketch.scratch(node, 4 * (-(-inputs // LANES) * LANES))


def _conv(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    view, weight = sketch.images(node, sketch.view(args["x"])), args["weight"]
    shape = sketch.shape(node)
    target = sketch.result(node, shape, channels_last(len(shape)))
    axes = len(shape) - 2
    kernel, groups = list(weight.shape[2:]), args["groups"]
    how = {"kernel": kernel, **{k: args[k] for k in ("stride", "padding", "dilation")}}
    macs = math.prod(shape) * math.prod(weight.shape[1:])
    rows = weight.movedim(1, -1).flatten(1)
    if groups == view.shape[1] == shape[1]:
        return _depthwise(sketch, node, args, (view, target), how, macs)
    plain = all(k == 1 for k in (*kernel, *args["stride"])) and not any(args["padding"])
    if plain and groups == 1:
        return _dense(sketch, node, args, view, target, rows)
    sums, inputs = _sums(sketch, node, args, rows, groups)
    assert axes == len(kernel)
    window = window_text(view.shape, shape, how, view.shape[1])
    return _windowed(sketch, node, args, "conv", (view, target), (sums, window, inputs, macs))


def _windowed(
    sketch: Sketch,
    node: fx.Node,
    args: dict[str, Any],
    kernel: str,
    views: tuple[View, View],
    facts: tuple[str, str, int, int],
) -> View:
    (view, target), (sums, window, inputs, macs) = views, facts
    text = (
        f".sums = {{{sums}}}, .at = {{{window}}}, .groups = {args['groups']}, "
        f".x_zero = {args['x_zero']}"
    )
    name, columns = sketch.record("conv", node.name, text), _columns(sketch, node, inputs)

    def code(at: Pointers) -> list[str]:
        return [f"{kernel}(&{name}, {at(view)}, {at(target)}, {at(columns)});"]

    return sketch.step(node, kernel, target, [view], code, scratch=columns, macs=macs)


def _conv_transpose(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    view, weight = sketch.images(node, sketch.view(args["x"])), args["weight"]
    shape, groups = sketch.shape(node), args["groups"]
    target = sketch.result(node, shape, channels_last(len(shape)))
    kernel = list(weight.shape[2:])
    # [in, out / groups, ...] -> [out, ..., in / groups]
    parts = weight.unflatten(0, (groups, -1)).movedim(1, -1)
    rows = parts.flatten(0, 1).flatten(1)
    how = {"kernel": kernel, **{k: args[k] for k in ("stride", "padding", "dilation")}}
    sums, inputs = _sums(sketch, node, args, rows, groups)
    window = window_text(view.shape, shape, how, view.shape[1])
    facts = (sums, window, inputs, view.size * math.prod(weight.shape[1:]))
    return _windowed(sketch, node, args, "conv_transpose", (view, target), facts)


def _depthwise(
    sketch: Sketch,
    node: fx.Node,
    args: dict[str, Any],
    views: tuple[View, View],
    how: dict[str, list[int]],
    macs: int,
) -> View:
    view, target = views
    rows, bias, shifts = _settled(sketch, node, args, args["weight"].flatten(1))
    kernels = rows.t().contiguous().numpy()
    digits = power_digits(kernels)
    weights = sketch.constant(
        f"{node.name}_weights", kernels, "int8_t", powers=digits,
        remark=f"stored [{rows.shape[1]}][{rows.shape[0]}]",
    )  # fmt: skip
    text = (
        f".at = {{{window_text(view.shape, target.shape, how, view.shape[1])}}}, "
        f".weights = {weights}, {_settling(sketch, node, bias, shifts)}, "
        f".x_zero = {args['x_zero']}, {ends(args)}{_terms(sketch, digits)}"
    )
    name = sketch.record("depthwise", node.name, text)

    def code(at: Pointers) -> list[str]:
        return [f"depthwise(&{name}, {at(view)}, {at(target)});"]

    return sketch.step(node, "depthwise", target, [view], code, macs=macs)


def _dense(
    sketch: Sketch,
    node: fx.Node,
    args: dict[str, Any],
    view: View,
    target: View,
    weight: Tensor,
) -> View:
    sums, inputs = _sums(sketch, node, args, weight)
    rows = view.size // inputs
    name = sketch.record("sums", node.name, sums)
    columns = _columns(sketch, node, inputs) if inputs % LANES else None

    def code(at: Pointers) -> list[str]:
        spare = "0" if columns is None else at(columns)
        return [f"dense(&{name}, {rows}, {at(view)}, {at(target)}, {spare});"]

    macs = target.size * inputs
    return sketch.step(node, "dense", target, [view], code, scratch=columns, macs=macs)


def _linear(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    view = sketch.view(args["x"])
    last = len(view.shape) - 1
    order = [*(a for a in view.order() if a != last), last]
    view = sketch.stored(node, view, order)
    target = sketch.result(node, sketch.shape(node), order)
    return _dense(sketch, node, args, view, target, args["weight"])


def _matmul(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    a, b, shape = sketch.view(args["a"]), sketch.view(args["b"]), sketch.shape(node)
    target = sketch.result(node, shape, row_major(len(shape)))
    full = list(shape)
    if len(a.shape) == 1:
        a = View(a.buffer, a.offset, (1, *a.shape), (0, *a.strides))
        full.insert(len(full) - (len(b.shape) > 1), 1)
    if len(b.shape) == 1:
        b = View(b.buffer, b.offset, (*b.shape, 1), (*b.strides, 0))
        full.append(1)
    m, n, count = a.shape[-2], b.shape[-1], a.shape[-1]
    by = sketch.shift(node, args["shift_by"], count * 255 * 255)
    text = (
        f".m = {m}, .n = {n}, .count = {count}, .a_row = {a.strides[-2]}, "
        f".a_column = {a.strides[-1]}, .b_row = {b.strides[-2]}, .b_column = {b.strides[-1]}, "
        f".by = {by}, .a_zero = {args['a_zero']}, .b_zero = {args['b_zero']}, {ends(args)}"
    )
    name = sketch.record("matmul", node.name, text)
    strides = packed(full, row_major(len(full)))
    lead = full[:-2]
    batches = [View(target.buffer, 0, tuple(lead), tuple(strides[:-2]))]
    for side in (a, b):
        batch = View(side.buffer, side.offset, side.shape[:-2], side.strides[:-2])
        batches.append(batch.broadcast(lead))
    made = loops(batches, row_major(len(lead)))

    def code(at: Pointers) -> list[str]:
        return nest([at(target), at(a), at(b)], [*made, ONCE], lambda p, s, c:
                    f"matmul(&{name}, {p[1]}, {p[2]}, {p[0]});")  # fmt: skip

    return sketch.step(node, "matmul", target, [a, b], code, macs=target.size * count)


ONCE = Loop(1, (0, 0, 0))  # an innermost loop for calls that do a whole matrix or row


# ------------------------------------------------------------------ element by element


def _elementwise(
    sketch: Sketch, node: fx.Node, kernel: str, operands: list[View], extra: str
) -> View:
    shape = sketch.shape(node)
    whole = next((v for v in operands if v.shape == shape), None)
    order = row_major(len(shape)) if whole is None else whole.order()
    target = sketch.result(node, shape, order)
    views = [target, *(v.broadcast(shape) for v in operands)]
    made = loops(views, order)

    def code(at: Pointers) -> list[str]:
        def call(p: list[str], s: list[str], n: int) -> str:
            pairs = ", ".join(f"{a}, {b}" for a, b in zip(p, s, strict=True))
            return f"{kernel}({pairs}, {n}, {extra});"

        return nest([at(v) for v in views], made, call)

    return sketch.step(node, kernel, target, views[1:], code, in_place=True)


def _add(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    ups = args["a_shift"], args["b_shift"]
    if max(ups) > 40:
        raise sketch.refuse(
            node, f"{node.name} adds numbers whose scales are 2^{max(ups)} apart",
            "their sum has no place in 64 bits", "quantize with other exponents",
        )  # fmt: skip
    by = sketch.shift(node, args["shift_by"], (255 << ups[0]) + (255 << ups[1]))
    extra = (
        f"{ups[0]}, {ups[1]}, {by}, {args['a_zero']}, {args['b_zero']}, {tail(args)}, "
        f"{args['sign']}"
    )
    operands = [sketch.view(args["a"]), sketch.view(args["b"])]
    return _elementwise(sketch, node, "add", operands, extra)


def _mul(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    by = sketch.shift(node, args["shift_by"], 255 * 255)
    extra = f"{by}, {args['a_zero']}, {args['b_zero']}, {tail(args)}"
    operands = [sketch.view(args["a"]), sketch.view(args["b"])]
    return _elementwise(sketch, node, "mul", operands, extra)


def _rescale(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    by = sketch.shift(node, args["shift_by"], 255)
    extra = f"{by}, {args['x_zero']}, {tail(args)}"
    return _elementwise(sketch, node, "rescale", [sketch.view(args["x"])], extra)


def _lookup(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    table = sketch.constant(f"{node.name}_table", args["table"].numpy(), "uint8_t")
    return _elementwise(sketch, node, "lookup", [sketch.view(args["x"])], table)


def _concat(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    parts = [sketch.view(x) for x in args["xs"]]
    shape = sketch.shape(node)
    axis, order = args["axis"] % len(shape), max(parts, key=lambda v: v.size).order()
    target = sketch.result(node, shape, order)
    offset = 0
    for part, by, zero in zip(parts, args["shift_by"], args["zeros"], strict=True):
        hole = View(target.buffer, offset, part.shape, target.strides)
        offset += part.shape[axis] * target.strides[axis]
        if by == 0 and zero == args["zero"] and (args["low"], args["high"]) == (0, 255):
            sketch.copied(node, part, hole)
            continue
        _joined(sketch, node, part, hole, f"{sketch.shift(node, by, 255)}, {zero}, {tail(args)}")
    return target


def _joined(sketch: Sketch, node: fx.Node, part: View, hole: View, extra: str) -> None:
    made = loops([hole, part], hole.order())

    def code(at: Pointers) -> list[str]:
        return nest([at(hole), at(part)], made, lambda p, s, n:
                    f"rescale({p[0]}, {s[0]}, {p[1]}, {s[1]}, {n}, {extra});")  # fmt: skip

    sketch.step(node, "rescale", hole, [part], code)


# ------------------------------------------------------------------ averages and quotients


def average_shift(by: int, count: int) -> int:
    """Return a shift that does the same to an average of codes and stays within 64 bits."""
    return max(min(by, 10), -10 - count.bit_length())


def _mean(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    view, axes = sketch.view(args["x"]), args["axes"]
    by = average_shift(args["shift_by"], math.prod(view.shape[a] for a in axes))
    extra = f"{by}, {args['x_zero']}, {tail(args)}"

    def call(y: str, count: int, x: str, step: str, over: str) -> str:
        return f"mean({y}, {count}, {x}, {step}, {over}, {extra});"

    return reduced(sketch, node, "mean", view, axes, call)


def _average_pool(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    view = sketch.images(node, sketch.view(args["x"]))
    shape = sketch.shape(node)
    target = sketch.result(node, shape, channels_last(4))
    how = {k: args[k] for k in ("kernel", "stride", "padding")} | {"dilation": [1, 1]}
    text = (
        f".at = {{{window_text(view.shape, shape, how, view.shape[1])}}}, "
        f".padding_counts = {int(args['count_include_pad'])}, "
        f".by = {average_shift(args['shift_by'], math.prod(args['kernel']))}, "
        f".x_zero = {args['x_zero']}, {ends(args)}"
    )
    name = sketch.record("average", node.name, text)

    def code(at: Pointers) -> list[str]:
        return [f"average_pool(&{name}, {at(view)}, {at(target)});"]

    return sketch.step(node, "average_pool", target, [view], code)


def _softmax(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    view = sketch.view(args["x"])
    axis = args["axis"] % len(view.shape)
    table = sketch.constant(f"{node.name}_table", args["table"].numpy(), "uint16_t")
    target = sketch.result(node, view.shape, view.order())
    up, down = max(args["exponent"], 0), max(-args["exponent"], 0)
    extra = f"{view.shape[axis]}, {table}, {up}, {down}, {tail(args)}"
    steps = target.strides[axis], view.strides[axis]
    shape = tuple(1 if a == axis else n for a, n in enumerate(view.shape))
    heads = [View(v.buffer, v.offset, shape, v.strides) for v in (target, view)]
    made = [*loops(heads, target.order()), ONCE]

    def code(at: Pointers) -> list[str]:
        return nest([at(target), at(view)], made, lambda p, s, n:
                    f"softmax({p[0]}, {steps[0]}, {p[1]}, {steps[1]}, {extra});")  # fmt: skip

    return sketch.step(node, "softmax", target, [view], code)


RULES: dict[str, Rule] = {
    "conv": _conv, "conv_transpose": _conv_transpose, "linear": _linear, "matmul": _matmul,
    "add": _add, "mul": _mul, "rescale": _rescale, "lookup": _lookup, "concat": _concat,
    "mean": _mean, "average_pool": _average_pool, "softmax": _softmax,
}  # fmt: skip

__all__ = ["FLOATS", "LANES", "RULES", "spread"]
