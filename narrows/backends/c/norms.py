"""What becomes of a layer normalisation in C."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor, fx

from narrows.backends.c.layout import Buffer, Loop, View, loops, packed, row_major
from narrows.backends.c.sketch import Pointers, Sketch, nest
from narrows.backends.c.types import Types

LOOPS = 2  # over the elements of a row, in the C code


def layer_norm(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    """Add the steps of a normalisation over trailing axes; returns where its result lies."""
    view = sketch.view(args["x"])
    rank = len(view.shape)
    inner = set(range(rank - args["axes"], rank))
    view, along = _rows(sketch, node, view, args, inner)
    target = sketch.result(node, view.shape, view.order())
    gain = _parameter(sketch, f"{node.name}_gain", args["gain"], view.shape)
    offset = _parameter(sketch, f"{node.name}_offset", args["offset"], view.shape)
    walked = loops([target, view, gain], along)
    walked = [Loop(1, (0, 0, 0))] * (LOOPS - len(walked)) + walked
    types = Types.of("normalise", target, [view])
    name = sketch.record("norm", node.name, _fields(args, walked), types)
    views = [target, view, gain, offset]
    shape = tuple(1 if a in inner else n for a, n in enumerate(view.shape))
    heads = [View(v.buffer, v.offset, shape, v.strides) for v in views]
    order = [a for a in target.order() if a not in inner]
    made = [*loops(heads, order), Loop(1, (0,) * len(views))]

    def code(at: Pointers) -> list[str]:
        return nest([at(v) for v in heads], made, lambda p, s, n:
                    f"normalise(&{name}, {', '.join(p)});")  # fmt: skip

    return sketch.step(node, "normalise", target, [view], code, in_place=True)


def _rows(
    sketch: Sketch, node: fx.Node, view: View, args: dict[str, Any], inner: set[int]
) -> tuple[View, list[int]]:
    """Return a tensor whose rows few enough loops walk over, and the order of a row's axes."""
    along = [a for a in view.order() if a in inner]
    gain = _broadcast(args["gain"].shape, view.shape)
    held = View(Buffer("", 0), 0, view.shape, gain)
    if len(loops([view, held], along)) > LOOPS:  # it lies in an order of its own
        view = sketch.stored(node, view, row_major(len(view.shape)))
        along = sorted(inner)
    return view, along


def _broadcast(shape: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a parameter that is stored in its own shape, over that of a result."""
    plain = View(Buffer("", 0), 0, tuple(shape), packed(shape, row_major(len(shape))))
    return plain.broadcast(wanted).strides


def _parameter(sketch: Sketch, name: str, tensor: Tensor, shape: tuple[int, ...]) -> View:
    """Return a parameter in binary32, as bits."""
    bits = np.ascontiguousarray(tensor.detach().numpy()).view(np.uint32)
    symbol = sketch.constant(name, bits, "uint32_t", remark="binary32")
    strides = _broadcast(tuple(tensor.shape), shape)
    return View(Buffer(symbol, bits.size, "constant", symbol), 0, shape, strides)


def _fields(args: dict[str, Any], walked: list[Loop]) -> str:
    """Return the fields of a ``struct norm``."""
    counts = ", ".join(str(loop.count) for loop in walked)
    steps = [
        f".{name}_steps = {{{', '.join(str(loop.steps[i]) for loop in walked)}}}"
        for i, name in enumerate(("y", "x", "gain"))
    ]
    mantissa, exponent = math.frexp(args["eps"])
    eps = f"{{{int(mantissa * 2**53)}u, {exponent - 53}, 0}}"
    return (
        f".counts = {{{counts}}}, {', '.join(steps)}, .centred = {int(args['centred'])}, "
        f".x_zero = {args['x_zero']}, .zero = {args['zero']}, .low = {args['low']}, "
        f".high = {args['high']}, .eps = {eps}"
    )


__all__ = ["layer_norm"]
