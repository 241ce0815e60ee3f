"""Concatenation of channels, vector by vector.

A general concatenation asks of every element which part it is from, and so computes one at a time.
Here the question is put once for a vector, which is as long as the places where parts begin allow,
and answered by halving the list of parts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import te, tirx

from narrows.backends.tvm.kernels import LANES


def concatenation(widths: Sequence[int], lanes: int) -> Callable[..., Any]:
    """Return the kernel ``[..., C0'], [..., C1'], ... -> [..., C0 + C1 + ...]``.

    Args:
        widths: The channels ``C`` of each part, of which ``C' >= C`` are stored.
        lanes: How many channels a vector of the machine holds.
    """
    lanes = math.gcd(lanes, *widths[:-1])
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

        shape = (*parts[0].shape[:-1], starts[-1])
        return te.compute(shape, at, name="concatenation", attrs={LANES: lanes})

    return compute
