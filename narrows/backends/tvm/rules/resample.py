"""Resampling along an axis: every result index is a weighted sum of a few operand indices.

Nearest, linear, cubic and anti-aliased resizing, uneven adaptive pooling, and padding that
reflects or repeats are all this, with other tables.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax, te

from narrows.backends.tvm.lowering import Lowering
from narrows.backends.tvm.values import Value


def nearest(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the tables that take one operand index per result index."""
    return indices[:, None], np.ones((len(indices), 1))


def resampled(
    low: Lowering, x: Value, axis: int, indices: np.ndarray, weights: np.ndarray
) -> Value:
    """Return a value resampled along an axis.

    Args:
        low: The lowering.
        x: The value.
        axis: An axis of its shape.
        indices: ``[out, taps]``, whole numbers: operand indices.
        weights: ``[out, taps]``: their weights.
    """
    out, taps = indices.shape
    if x.at(axis) == x.rank - 1:
        x = low.exact(x)
    place = x.at(axis)
    stored = (*x.stored[:place], out, *x.stored[place + 1 :])
    table = relax.const(np.ascontiguousarray(indices, "int32"), "int32")
    factors = relax.const(np.ascontiguousarray(weights, x.dtype), x.dtype)
    plain = taps == 1 and bool((weights == 1).all())

    def gather(source: Any, where: Any, scale: Any) -> Any:
        def at(*index: Any) -> Any:
            terms = [
                source(*index[:place], where[index[place], tap], *index[place + 1 :])
                for tap in range(taps)
            ]
            if not plain:  # a product of small whole numbers would be wider than they are
                terms = [t * scale[index[place], tap] for tap, t in enumerate(terms)]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            return total

        return te.compute(stored, at, name="resample")

    expr = low.kernel(gather, low.expr(x), table, factors, name="resample")
    shape = (*x.shape[:axis], out, *x.shape[axis + 1 :])
    return Value(shape, x.dtype, x.order, stored[-1], expr)
