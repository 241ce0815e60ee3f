"""Which grid the time of a work is read from, and where on it."""

from __future__ import annotations

import math

from narrows.ir.work import Work


def sizes_of(work: Work) -> dict[str, float]:
    """Return what the axes of grids are called, and where a work lies on them."""
    per = work.groups if work.kind == "grouped" else 1
    read = work.batch * math.prod(work.source) * work.inputs if work.source else 0
    return {
        "batch": work.batch,
        "positions": work.positions,
        "rows": work.batch * work.positions,
        "inputs": work.inputs // per,
        "outputs": work.outputs // per,
        "elements": max(work.elements, read if work.kind in ("pool", "reduce") else 0),
    }


def window(work: Work) -> str:
    """Return ``3x3/2``: the window and its larger step."""
    return f"{'x'.join(map(str, work.kernel))}/{max(work.stride, default=1)}"


def read_window(text: str) -> tuple[int, int]:
    """Return the elements of a window and its step."""
    size, _, stride = text.partition("/")
    return math.prod(int(k) for k in size.split("x")), int(stride)


def windowed_grid(form: str, work: Work) -> str:
    """Return the name of the grid of a convolution that is computed in a form."""
    return f"{form} {work.kind} {window(work)}"
