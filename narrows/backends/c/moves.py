"""Operators that move codes, or pick the largest.

What moves is not listed operator by operator: the operator runs on the addresses of its operand's
elements (`narrows.backends.c.layout`), and tells so where each element of the result is found.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from narrows.backends.c.layout import (
    Loop,
    View,
    channels_last,
    loops,
    row_major,
    viewed,
)
from narrows.backends.c.sketch import Pointers, Sketch, nest
from narrows.ir.meta import op_name
from narrows.ir.ops.integer import Moves
from narrows.ir.ops.table import find

Rule = Callable[[Sketch, fx.Node, dict[str, Any]], View]

SAME = frozenset(
    f"{n}.default" for n in ("clone", "contiguous", "alias", "dropout", "feature_dropout",
                             "alpha_dropout", "feature_alpha_dropout")
)  # fmt: skip


def is_move(node: fx.Node) -> bool:
    """Whether a node moves codes without looking at them, or picks the largest."""
    if node.target is operator.getitem:
        return True
    row = find(node)
    return row is not None and isinstance(row.integer, Moves)


def write(sketch: Sketch, node: fx.Node) -> None:
    """Enter where the value of a node that moves codes lies."""
    name = op_name(node)
    if node.target is operator.getitem:
        sketch.views[node] = sketch.views[node.args[0]][node.args[1]]  # type: ignore[index]
    elif name in SAME:
        sketch.views[node] = sketch.views[node.all_input_nodes[0]]
    elif name in PICKS:
        sketch.views[node] = PICKS[name](sketch, node, sketch.given(node))
    else:
        sketch.views[node] = _moved(sketch, node)


def _moved(sketch: Sketch, node: fx.Node) -> Any:
    """Return the view, or the views, of what an operator makes of its operand's addresses."""
    source = next(n for n in node.all_input_nodes if n in sketch.views)
    view = sketch.views[source]
    values = {**sketch.fixed, source: view.addresses()}
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    run: Any = node.target
    made = run(*args, **kwargs)
    if isinstance(made, Tensor):
        return _placed(sketch, node, view, made)
    return tuple(_placed(sketch, node, view, part) for part in made)


def _placed(sketch: Sketch, node: fx.Node, view: View, addresses: Tensor) -> View:
    found = viewed(view.buffer, addresses)
    if found is not None:
        return found
    rank = addresses.dim()
    order = view.order() if rank == len(view.shape) else row_major(rank)
    target = sketch.result(node, tuple(addresses.shape), order, view.buffer.unit)
    return sketch.gathered(node, view.buffer, addresses, target)


# ------------------------------------------------------------------ those that look


def _pad(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    view = sketch.view(args["self"])
    rank, given = len(view.shape), args["pad"]
    sides = [(0, 0)] * rank  # what goes around an axis; where it is negative, it is cut off
    for i in range(len(given) // 2):
        sides[rank - 1 - i] = (given[2 * i], given[2 * i + 1])
    shape = [n + a + b for n, (a, b) in zip(view.shape, sides, strict=True)]
    before = [max(a, 0) for a, _ in sides]
    cut = tuple(
        slice(max(-a, 0), n - max(-b, 0)) for n, (a, b) in zip(view.shape, sides, strict=True)
    )
    target = sketch.result(node, shape, view.order())
    inside = viewed(view.buffer, view.addresses()[cut])
    assert inside is not None
    offset = sum(b * s for b, s in zip(before, target.strides, strict=True))
    hole = View(target.buffer, offset, inside.shape, target.strides)
    code, size = int(args["value"] or 0), target.buffer.size
    if code and target.buffer.unit > 1:  # memset writes bytes
        around = sketch.view(torch.tensor(code, dtype=torch.int16)).broadcast(target.shape)
        sketch.copied(node, around, target)
    else:
        sketch.step(node, "", target, [], lambda at: [f"memset({at(target)}, {code}, {size});"])
    made = loops([hole, inside], target.order())

    def text(at: Pointers) -> list[str]:
        return nest([at(hole), at(inside)], made, lambda p, s, n:
                    f"copy({p[0]}, {s[0]}, {p[1]}, {s[1]}, {n});")  # fmt: skip

    sketch.step(node, "copy", target, [inside, target], text)
    return target


def spread(value: Any, axes: int) -> list[int]:
    """Return one number per axis; ATen takes a single one for all."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * axes if len(values) == 1 else values


def window_text(
    shape: tuple[int, ...], out: tuple[int, ...], how: dict[str, list[int]], channels: int
) -> str:
    """Return the fields of a ``struct window``; what has fewer than three axes gets ones."""
    lead = 3 - (len(shape) - 2)

    def three(values: Any, blank: int) -> str:
        return "{" + ", ".join(map(str, [blank] * lead + list(values))) + "}"

    parts = {
        "in": three(shape[2:], 1), "out": three(out[2:], 1), "kernel": three(how["kernel"], 1),
        "stride": three(how["stride"], 1), "pad": three(how["padding"], 0),
        "dilation": three(how["dilation"], 1),
    }  # fmt: skip
    fields = ", ".join(f".{k} = {v}" for k, v in parts.items())
    return f".images = {shape[0]}, .channels = {channels}, {fields}"


def _max_pool(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    axes = int(op_name(node)[8])
    view = sketch.view(args["self"])
    if len(view.shape) != axes + 2:
        raise sketch.refuse(node, f"{node.name} pools a tensor without a batch axis", "")
    view = sketch.images(node, view)
    kernel = spread(args["kernel_size"], axes)
    how = {
        "kernel": kernel, "stride": spread(args["stride"], axes) if args["stride"] else kernel,
        "padding": spread(args["padding"], axes), "dilation": spread(args["dilation"], axes),
    }  # fmt: skip
    shape = sketch.shape(node)
    target = sketch.result(node, shape, channels_last(len(shape)))
    name = sketch.record("window", node.name, window_text(view.shape, shape, how, view.shape[1]))

    def code(at: Pointers) -> list[str]:
        return [f"max_pool(&{name}, {at(view)}, {at(target)});"]

    return sketch.step(node, "max_pool", target, [view], code)


def _extremum(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    view = sketch.view(args["self"])
    rank = len(view.shape)
    axes = sorted(d % rank for d in args.get("dim", ())) or list(range(rank))
    sign = 1 if op_name(node).startswith(("amax", "max")) else -1

    def call(y: str, count: int, x: str, step: str, over: str) -> str:
        return f"extremum({y}, {count}, {x}, {step}, {over}, {sign});"

    return reduced(sketch, node, "extremum", view, axes, call)


def reduced(
    sketch: Sketch,
    node: fx.Node,
    kernel: str,
    view: View,
    axes: list[int],
    call: Callable[[str, int, str, str, str], str],
) -> View:
    """Add a step that makes one code of all codes along axes, for all other positions."""
    kept = [a for a in view.order() if a not in axes]
    along = [a for a in view.order() if a in axes]
    over = loops([view], along)
    if len(over) > 2:  # those axes are not neighbours in memory
        view = sketch.stored(node, view, [*kept, *along])
        over = loops([view], along)
    over = [Loop(1, (0,))] * (2 - len(over)) + over
    counts = ", ".join(str(loop.count) for loop in over)
    steps = ", ".join(str(loop.steps[0]) for loop in over)
    text = f"(const int[]){{{counts}}}, (const int[]){{{steps}}}"
    shape = [1 if a in axes else n for a, n in enumerate(view.shape)]
    held = sketch.result(node, shape, [*kept, *along])
    made = loops([held, View(view.buffer, view.offset, tuple(shape), view.strides)], kept)

    def code(at: Pointers) -> list[str]:
        return nest([at(held), at(view)], made, lambda p, s, n: call(p[0], n, p[1], s[1], text))

    sketch.step(node, kernel, held, [view], code)
    if len(sketch.shape(node)) == len(shape):
        return held
    left = [a for a in range(len(shape)) if a not in axes]
    return View(held.buffer, 0, tuple(shape[a] for a in left), tuple(held.strides[a] for a in left))


def _embedding(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    table, indices = sketch.view(args["weight"]), sketch.views[args["indices"]]
    table = sketch.stored(node, table, row_major(2))
    rows, width = table.shape
    shape = sketch.shape(node)
    target = sketch.result(node, shape, row_major(len(shape)))
    count = math.prod(shape[:-1])

    def code(at: Pointers) -> list[str]:
        return [
            f"if (embedding({at(target)}, {count}, {at(indices)}, {at(table)}, {rows}, {width}))",
            "    return 1;",
        ]

    return sketch.step(node, "embedding", target, [table, indices], code)


PICKS: dict[str, Rule] = {
    "pad.default": _pad,
    **{f"max_pool{n}d.default": _max_pool for n in (1, 2, 3)},
    **{f"{n}.default": _extremum for n in ("amax", "amin")},
    "embedding.default": _embedding,
}  # fmt: skip

__all__ = ["PICKS", "SAME", "is_move", "reduced", "spread", "window_text", "write"]
