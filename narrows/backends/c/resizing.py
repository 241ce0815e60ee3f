"""What becomes of weighted averages over windows in C."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from narrows.backends.c.layout import View, channels_last
from narrows.backends.c.sketch import INT32, Pointers, Sketch
from narrows.ir.integer.windows import reach, totals


def resample(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> View:
    """Add the step of a resizing, or of an average over windows that differ in size."""
    view, shape = sketch.images(node, sketch.view(args["x"])), sketch.shape(node)
    target = sketch.result(node, shape, channels_last(len(shape)))
    if 255 * reach(args["weights"]) >= INT32 or max(view.shape) > 2**16:
        raise sketch.refuse(
            node, f"{node.name} averages over too much", "its sums do not fit into 32 bits"
        )
    even, by = _division(sketch, node, args)
    lead = 3 - len(args["places"])
    taps = [1] * lead + [t.shape[1] for t in args["places"]]
    text = (
        f".images = {shape[0]}, .channels = {shape[1]}, .in = {_three(view.shape[2:])}, "
        f".out = {_three(shape[2:])}, .taps = {_three(taps)}, "
        f".places = {_tables(sketch, node, 'places', args['places'], 'uint16_t', 0)}, "
        f".weights = {_tables(sketch, node, 'weights', args['weights'], 'int16_t', 1)}, "
        f".even = {int(even)}, .by = {by}, .x_zero = {args['x_zero']}, .zero = {args['zero']}, "
        f".low = {args['low']}, .high = {args['high']}"
    )
    name = sketch.record("resample", node.name, text)

    def code(at: Pointers) -> list[str]:
        return [f"resample(&{name}, {at(view)}, {at(target)});"]

    return sketch.step(node, "resample", target, [view], code)


def _division(sketch: Sketch, node: fx.Node, args: dict[str, Any]) -> tuple[bool, int]:
    """Return whether the division is a shift, and by what the result is shifted."""
    counts, by = totals(args["weights"]), args["shift_by"]
    most = int(counts.max())
    if bool((counts == most).all()) and most & (most - 1) == 0:
        return True, sketch.shift(node, by + most.bit_length() - 1, 255 * reach(args["weights"]))
    # Beyond these everything is 0, or everything but 0 at an end.
    return False, max(min(by, 10), -10 - most.bit_length())


def _three(values: Any) -> str:
    values = [1] * (3 - len(values)) + list(values)
    return "{" + ", ".join(map(str, values)) + "}"


def _tables(
    sketch: Sketch, node: fx.Node, what: str, tables: list[Tensor], ctype: str, blank: int
) -> str:
    """Return the names of three tables; an axis that there is not has one place of weight 1."""
    blanks = [tables[0].new_full((1,), blank)] * (3 - len(tables))
    names = [
        sketch.constant(f"{node.name}_{what}", table.numpy(), ctype) for table in (*blanks, *tables)
    ]
    return "{" + ", ".join(names) + "}"


__all__ = ["resample"]
