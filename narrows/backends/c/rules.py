"""What becomes of each operator of ``torch.ops.narrows`` in C: one rule per operator."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from narrows.backends.c import choices, elementwise
from narrows.backends.c.elementwise import number, reach, span, tail
from narrows.backends.c.layout import Loop, View, channels_last, loops, packed, row_major
from narrows.backends.c.moves import Rule, reduced, spread, window_text
from narrows.backends.c.norms import layer_norm
from narrows.backends.c.powers import power_digits
from narrows.backends.c.quotients import div, vector_norm
from narrows.backends.c.resizing import resample
from narrows.backends.c.sketch import INT32, INT64, Pointers, Sketch, nest
from narrows.backends.c.types import Types
from narrows.ir.meta import Meta

# Vectors of inputs are read up to this many codes at once (NARROWS_LANES in the C code).
LANES = 32
# So many biases and shifts are read at once.
BLOCK = 16


def ends(args: dict[str, Any]) -> str:
    """Return the fields that every record ends in."""
    return f".zero = {args['zero']}, .low = {args['low']}, .high = {args['high']}"


# ------------------------------------------------------------------ layers


def _sums(
    sketch: Sketch,
    node: fx.Node,
    args: dict[str, Any],
    views: tuple[View, View],
    rows: Tensor,
    groups: int = 1,
) -> tuple[str, int, Types | None]:
    """Return the fields of a ``struct sums``, the length of a row, and the types of the kernel.

    Args:
        sketch: Gets the weights, the bias and the shifts.
        node: The layer.
        args: Its arguments.
        views: Its operand and its result.
        rows: The weight's codes, int8 ``[outputs, inputs]``, the inputs as they lie in memory.
        groups: How many groups the outputs fall into; a record describes one of them.
    """
    outputs, inputs = rows.shape
    rows, bias, shifts, sums = _settled(sketch, node, args, rows)
    shape = "x".join(map(str, args["weight"].shape))
    digits = power_digits(rows.numpy())  # [terms, outputs, inputs]
    weights = sketch.constant(
        f"{node.name}_weights", rows.numpy(), "int8_t", pad=LANES - 1,
        remark=f"{shape}, stored [{outputs}][{inputs}]",
        powers=None if digits is None else digits.transpose(1, 0, 2),
    )  # fmt: skip
    fields = (
        f".weights = {weights}, {_settling(sketch, node, bias, shifts, sums, groups)}, "
        f".inputs = {inputs}, "
        f".outputs = {outputs // groups}, {ends(args)}{_terms(sketch, digits)}"
    )
    return fields, inputs, Types.of("dense", views[1], views[:1], sums)


def _settled(
    sketch: Sketch, node: fx.Node, args: dict[str, Any], rows: Tensor
) -> tuple[Tensor, Tensor, list[int], str]:
    """Return weights and bias in int64, shifts that stay within the type of sums, and that type
    where a code has 16 bits.

    Codes are multiplied as they are; what their zero point adds to a sum is taken from the bias.
    """
    rows = rows.to(torch.int64)
    count = rows.shape[0]
    bias = torch.zeros(count, dtype=torch.int64)
    if args["bias"] is not None:
        bias = args["bias"].to(torch.int64)
    bounds = (rows.abs().sum(1) * reach(args, "x") + bias.abs()).tolist()
    given = list(args["shift_by"])
    given = given * count if len(given) == 1 else given
    pairs = zip(given, bounds, strict=True)
    made = [number(sketch, node, args, "x", by, bound) for by, bound in pairs]
    shifts, sums = [by for by, _ in made], max(kind for _, kind in made)
    sketch.signed_shifts |= min(shifts) < 0
    bias = bias - args["x_zero"] * rows.sum(1)
    most = max(map(abs, span(args["x"])))
    parts = most * torch.stack([rows.clamp(min=0).sum(1), -rows.clamp(max=0).sum(1)])
    if args["x_zero"] == 0 and span(args["x"])[0] < 0:
        parts = most * rows.abs().sum(1)
    if int((parts + bias.abs()).max()) >= INT32:
        if not sums:
            sketch.widen(node)
        sums = sums and "int64_t"
    return rows, bias, shifts, sums


def _settling(
    sketch: Sketch, node: fx.Node, bias: Tensor, shifts: list[int], sums: str, groups: int = 1
) -> str:
    """Return the fields of bias and shifts; every group reads whole blocks of them."""
    pad = BLOCK - 1 if groups > 1 else -len(shifts) % BLOCK
    name = node.name
    biases = sketch.constant(f"{name}_bias", bias.numpy(), sums or "number", pad=pad)
    moved = sketch.constant(f"{name}_shifts", np.asarray(shifts), "int32_t", pad=pad)
    return f".bias = {biases}, .shifts = {moved}"


def _terms(sketch: Sketch, digits: np.ndarray | None) -> str:
    """Return the field that says how many powers of two a weight is the sum of."""
    sketch.layers += 1
    if digits is None:
        return ""
    sketch.shift_layers += 1
    return f" TERMS({len(digits)})"


def _columns(sketch: Sketch, node: fx.Node, inputs: int, unit: int) -> View:
    return sketch.scratch(node, 4 * (-(-inputs // LANES) * LANES), unit)


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
    sums = _sums(sketch, node, args, (view, target), rows, groups)
    assert axes == len(kernel)
    window = window_text(view.shape, shape, how, view.shape[1])
    return _windowed(sketch, node, args, "conv", (view, target), (*sums, window, macs))


def _windowed(
    sketch: Sketch,
    node: fx.Node,
    args: dict[str, Any],
    kernel: str,
    views: tuple[View, View],
    facts: tuple[str, int, Types | None, str, int],
) -> View:
    (view, target), (sums, inputs, types, window, macs) = views, facts
    text = (
        f".sums = {{{sums}}}, .at = {{{window}}}, .groups = {args['groups']}, "
        f".x_zero = {args['x_zero']}"
    )
    name = sketch.record("conv", node.name, text, types)
    columns = _columns(sketch, node, inputs, view.buffer.unit)

    def code(at: Pointers) -> list[str]:
        return [f"{kernel}(&{name}, {at(view)}, {at(target)}, {at(columns)});"]

    kind = "" if types is None else types.sums
    return sketch.step(node, kernel, target, [view], code, scratch=columns, macs=macs, sums=kind)


def _conv_transpose(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    view, weight = sketch.images(node, sketch.view(args["x"])), args["weight"]
    shape, groups = sketch.shape(node), args["groups"]
    target = sketch.result(node, shape, channels_last(len(shape)))
    kernel = list(weight.shape[2:])
    # [in, out / groups, ...] -> [out, ..., in / groups]
    parts = weight.unflatten(0, (groups, -1)).movedim(1, -1)
    rows = parts.flatten(0, 1).flatten(1)
    how = {"kernel": kernel, **{k: args[k] for k in ("stride", "padding", "dilation")}}
    sums = _sums(sketch, node, args, (view, target), rows, groups)
    window = window_text(view.shape, shape, how, view.shape[1])
    facts = (*sums, window, view.size * math.prod(weight.shape[1:]))
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
    rows, bias, shifts, sums = _settled(sketch, node, args, args["weight"].flatten(1))
    kernels = rows.t().contiguous().numpy()
    digits = power_digits(kernels)
    weights = sketch.constant(
        f"{node.name}_weights", kernels, "int8_t", powers=digits,
        remark=f"stored [{rows.shape[1]}][{rows.shape[0]}]",
    )  # fmt: skip
    text = (
        f".at = {{{window_text(view.shape, target.shape, how, view.shape[1])}}}, "
        f".weights = {weights}, {_settling(sketch, node, bias, shifts, sums)}, "
        f".x_zero = {args['x_zero']}, {ends(args)}{_terms(sketch, digits)}"
    )
    types = Types.of("depthwise", target, [view], sums)
    name = sketch.record("depthwise", node.name, text, types)

    def code(at: Pointers) -> list[str]:
        return [f"depthwise(&{name}, {at(view)}, {at(target)});"]

    return sketch.step(node, "depthwise", target, [view], code, macs=macs, sums=sums)


def _dense(
    sketch: Sketch,
    node: fx.Node,
    args: dict[str, Any],
    view: View,
    target: View,
    weight: Tensor,
) -> View:
    sums, inputs, types = _sums(sketch, node, args, (view, target), weight)
    rows = view.size // inputs
    name = sketch.record("sums", node.name, sums, types)
    columns = _columns(sketch, node, inputs, view.buffer.unit) if inputs % LANES else None

    def code(at: Pointers) -> list[str]:
        spare = "0" if columns is None else at(columns)
        return [f"dense(&{name}, {rows}, {at(view)}, {at(target)}, {spare});"]

    macs = target.size * inputs
    kind = "" if types is None else types.sums
    return sketch.step(node, "dense", target, [view], code, scratch=columns, macs=macs, sums=kind)


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
    bound = count * reach(args, "a") * reach(args, "b")
    by, sums = number(sketch, node, args, "ab", args["shift_by"], bound)
    text = (
        f".m = {m}, .n = {n}, .count = {count}, .a_row = {a.strides[-2]}, "
        f".a_column = {a.strides[-1]}, .b_row = {b.strides[-2]}, .b_column = {b.strides[-1]}, "
        f".by = {by}, .a_zero = {args['a_zero']}, .b_zero = {args['b_zero']}, {ends(args)}"
    )
    name = sketch.record("matmul", node.name, text, Types.of("matmul", target, [a, b], sums))
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

    macs = target.size * count
    return sketch.step(node, "matmul", target, [a, b], code, macs=macs, sums=sums)


ONCE = Loop(1, (0, 0, 0))  # an innermost loop for calls that do a whole matrix or row


# ------------------------------------------------------------------ averages and quotients


def average_shift(sketch: Sketch, node: fx.Node, by: int, count: int, divisor: int) -> int:
    """Return a shift that does the same to a sum of codes over a divisor and stays in 64 bits."""
    wide = any(Meta(n).dtype is torch.int16 for n in (node, *node.all_input_nodes))
    bits = 18 if wide else 10
    by = max(min(by, bits + (count // divisor).bit_length()), -bits - divisor.bit_length())
    if count << bits + max(-by, 0) >= INT64 or (not wide and 255 * count >= INT32):
        raise sketch.refuse(node, f"{node.name} averages too much", "its sum may be too large")
    return by


def _mean(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    view, axes = sketch.view(args["x"]), args["axes"]
    count = math.prod(view.shape[a] for a in axes)
    divisor = args["divisor"] or count
    by = average_shift(sketch, node, args["shift_by"], count, divisor)
    extra = f"{divisor}, {by}, {args['x_zero']}, {tail(args)}"

    def call(y: str, count: int, x: str, step: str, over: str) -> str:
        return f"mean({y}, {count}, {x}, {step}, {over}, {extra});"

    return reduced(sketch, node, "mean", view, axes, call)


def _average_pool(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    view = sketch.images(node, sketch.view(args["x"]))
    shape = sketch.shape(node)
    target = sketch.result(node, shape, channels_last(len(shape)))
    how = {k: args[k] for k in ("kernel", "stride", "padding")}
    how["dilation"] = [1] * len(args["kernel"])
    count = math.prod(args["kernel"])
    by = average_shift(sketch, node, args["shift_by"], count, args["divisor"] or count)
    text = (
        f".at = {{{window_text(view.shape, shape, how, view.shape[1])}}}, "
        f".padding_counts = {int(args['count_include_pad'])}, .divisor = {args['divisor']}, "
        f".by = {by}, "
        f".x_zero = {args['x_zero']}, {ends(args)}"
    )
    types = Types.of("average_pool", target, [view])
    name = sketch.record("average", node.name, text, types)

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
    "add": elementwise.add, "mul": elementwise.mul, "rescale": elementwise.rescale,
    "prelu": elementwise.prelu, "lookup": elementwise.lookup, "concat": elementwise.concat,
    "compare": choices.compare, "compare_number": choices.compare_number,
    "div": div, "vector_norm": vector_norm,
    "mean": _mean, "average_pool": _average_pool, "softmax": _softmax, "layer_norm": layer_norm,
    "resample": resample,
}  # fmt: skip

__all__ = ["LANES", "RULES", "spread"]
