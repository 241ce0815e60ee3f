"""Which grid a work is read from, and other spellings of it, for which a runtime has other kernels.

A runtime picks its kernel by how an operator is called. PyTorch multiplies matrices for a 1x1
convolution on one thread, unless it is dilated, which means nothing for a window of one; then
oneDNN computes it. And its poolings run over registers of channels only where the channels lie
innermost. A cost table has grids of such spellings under the name of the usual one, with the
spelling before it. `narrows.passes.choose_kernels` writes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from narrows.ir.grid import Grid, Layout
from narrows.ir.work import CONVOLUTIONS, Work

DILATED = "dilated"
CHANNELS_LAST = "channels-last"
SPELLINGS = (DILATED, CHANNELS_LAST)
# What oneDNN prepares per call is at hand when one convolution runs again and again, as in a probe,
# and less so among other layers: it must be faster by that much alone to be taken.
AMONG_OTHERS = 1.25


def faster(grids: Mapping[str, Grid], layout: Layout, name: str, work: Work) -> tuple[str, float]:
    """Return the spelling of a work that takes least, empty for the usual one, and its us.

    Args:
        grids: All grids.
        layout: What the runtime does with layouts: a dilated convolution counts at widths that are
            aligned.
        name: The grid of the usual spelling.
        work: The work.
    """
    sizes = sizes_of(work)
    usual = ("", grids[name].at(sizes))
    spelling = DILATED if work.kind in CONVOLUTIONS else CHANNELS_LAST
    other = grids.get(f"{spelling} {name}")
    if other is None:
        return usual
    us = other.at(sizes)
    if spelling == DILATED:
        if work.inputs % layout.align or work.outputs % layout.align:
            return usual
        us *= AMONG_OTHERS
    return min(usual, (spelling, us), key=lambda found: found[1])


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
