"""What rows say of their operators' work: a node's sizes as a `Work`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops.args import settled_arguments
from narrows.ir.work import Work


def itemsize(node: fx.Node) -> int:
    """Return the bytes of one element of a node's result; 4 where it has no dtype."""
    dtype = Meta(node).dtype
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 4


def convolution(node: fx.Node, spatial: int, transposed: bool = False) -> Work:
    """Return the work of a convolution over ``spatial`` axes."""
    args = settled_arguments(node)
    x, out = shape_of(args["input"]), shape_of(node)
    weight = shape_of(args["weight"])
    groups = args.get("groups", 1)
    inputs, outputs = x[-1 - spatial], out[-1 - spatial]
    kind = "conv_transpose" if transposed else "conv"
    if groups > 1 and not transposed:
        kind = "depthwise" if weight[1] == 1 else "grouped"
    stride = args.get("stride", 1)
    stride = [stride] if isinstance(stride, int) else list(stride)
    return Work(
        kind,
        _spelled(node),
        batch=math.prod(x[: -1 - spatial]),
        inputs=inputs,
        outputs=outputs,
        groups=groups,
        kernel=tuple(weight[2:]),
        stride=tuple(stride if len(stride) == spatial else stride * spatial),
        space=tuple(out[-spatial:]),
        source=tuple(x[-spatial:]),
        itemsize=itemsize(node),
    )


def linear(node: fx.Node) -> Work:
    """Return the work of a matrix product with a weight ``[out, in]``."""
    out = shape_of(node)
    weight = shape_of(settled_arguments(node)["weight"])
    if len(weight) == 1:  # by a vector: one output, without an axis of its own
        out = (*out, 1)
    return Work(
        "linear",
        "linear",
        batch=out[0] if len(out) > 1 else 1,
        inputs=weight[-1],
        outputs=out[-1],
        space=tuple(out[1:-1]),
        itemsize=itemsize(node),
    )


def product(node: fx.Node, left: str) -> Work:
    """Return the work of a matrix product; ``left`` names its first factor."""
    out, x = shape_of(node), shape_of(settled_arguments(node)[left])
    right = next(a for n, a in settled_arguments(node).items() if n in ("other", "mat2"))
    y = shape_of(right)
    kind = "linear" if len(y) == 2 and right.op == "get_attr" else "matmul"
    rows, columns = (out[-2:] if len(out) > 1 else (1, *out)) if out else (1, 1)
    if len(y) == 1:  # by a vector: one column
        rows, columns = out[-1] if out else 1, 1
    return Work(
        kind,
        _spelled(node),
        batch=math.prod(out) // max(1, rows * columns),
        inputs=x[-1],
        outputs=columns,
        space=(rows,),
        itemsize=itemsize(node),
    )


def attention(node: fx.Node) -> Work:
    """Return the work of ``softmax(q k^T) v``."""
    args = settled_arguments(node)
    q, k, v = (shape_of(args[a]) for a in ("query", "key", "value"))
    return Work(
        "attention",
        _spelled(node),
        batch=math.prod(q[:-2]),
        inputs=q[-1],
        outputs=v[-1],
        kernel=(k[-2],),
        space=(q[-2],),
        itemsize=itemsize(node),
    )


def elementwise(node: fx.Node, kind: str) -> Work | None:
    """Return the work of what reads and writes elements without summing over a weight."""
    shape, read = shape_of(node), _operand_shape(node)
    if shape is None and read is None:
        return None
    batch, outputs, space = _split(shape if shape is not None else read)
    inputs, source = outputs, ()
    if read is not None and kind in ("pool", "reduce", "gather", "slice"):
        _, inputs, source = _split(read)
    axis = _innermost(node, shape) if kind == "gather" else None
    if shape is not None and read is not None and axis is not None:
        kind, inputs, outputs = "pick", read[axis], shape[axis]
        space = source = tuple(s for a, s in enumerate(shape) if a not in (0, axis))
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    if kind == "pool":
        args = settled_arguments(node)
        kernel = tuple(_numbers(args.get("kernel_size")))
        stride = tuple(_numbers(args.get("stride"))) or kernel
    return Work(
        kind,
        _spelled(node),
        batch=batch,
        inputs=inputs,
        outputs=outputs,
        kernel=kernel,
        stride=stride,
        space=space,
        source=source,
        itemsize=itemsize(node),
    )


def _innermost(node: fx.Node, shape: Any) -> int | None:
    """Return the axis along which a node picks, if no two elements of an index lie together."""
    axis = settled_arguments(node).get("dim")
    if not isinstance(axis, int) or shape is None or len(shape) < 2:
        return None
    axis %= len(shape)
    return axis if axis and math.prod(shape[axis + 1 :]) == 1 else None


def _numbers(value: Any) -> list[int]:
    if isinstance(value, int):
        return [value]
    return [v for v in value or () if isinstance(v, int)]


def _split(shape: Any) -> tuple[int, int, tuple[int, ...]]:
    """Return batch, channels and positions: ``[b, c, ...]``, or ``[b, tokens, c]``."""
    if len(shape) < 2:
        return 1, math.prod(shape), ()
    if len(shape) == 3:
        return shape[0], shape[2], (shape[1],)
    return shape[0], shape[1], tuple(shape[2:])


def _operand_shape(node: fx.Node) -> Any:
    for operand in node.all_input_nodes:
        if shape_of(operand) is not None and operand.op != "get_attr":
            return shape_of(operand)
    return None


def _spelled(node: fx.Node) -> str:
    target: Any = node.target
    return getattr(target, "_opname", None) or getattr(target, "__name__", str(target))
