"""Concatenation of channels whose parts all begin at a whole vector.

A general concatenation asks of every element which part it is from, and so computes one at a time.
Here the question is put once for a vector, and answered by halving the list of parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from tvm import te, tirx


def concatenation(widths: Sequence[int], lanes: int) -> Callable[..., Any]:
    """Return the kernel ``[..., C0], [..., C1], ... -> [..., C0 + C1 + ...]``.

    Args:
        widths: The channels of each part, multiples of ``lanes`` but for the last.
        lanes: How many channels a vector holds.
    """
    starts = [0, *itertools.accumulate(widths)]

    def compute(*parts: Any) -> Any:
        def at(*index: Any) -> Any:
            *lead, c = index

            def among(first: int, last: int) -> Any:
                """Return the value at ``c`` where it is of one of the parts first to last."""
                if first == last:
                    return parts[first][(*lead, c - starts[first])]
                middle = (first + last + 1) // 2
                before = tirx.floordiv(c, lanes) < starts[middle] // lanes
                return tirx.if_then_else(before, among(first, middle - 1), among(middle, last))

            return among(0, len(parts) - 1)

        return te.compute((*parts[0].shape[:-1], starts[-1]), at, name="concatenation")

    return compute
