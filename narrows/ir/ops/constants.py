"""Which channels of a tensor made of weights are one constant."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from narrows.ir.labels import Ints, Value


def as_array(data: Tensor) -> np.ndarray:
    """Return a tensor's numbers; types that NumPy lacks (bfloat16, float8) as float32, exactly."""
    data = data.detach()
    narrow = data.is_floating_point() and data.dtype.itemsize <= 2 and data.dtype != torch.float16
    return (data.float() if narrow else data).numpy()


def constants_of(data: Tensor, value: Value) -> np.ndarray:
    """Return per label of ``value`` the constant that ``data`` holds there, NaN where it varies.

    ``data`` broadcasts to the shape of ``value``.
    """
    labels = value.tensor
    lo = (
        data.detach()
        .to(torch.float64)
        .reshape([1] * (labels.dim() - data.dim()) + list(data.shape))
    )
    hi = lo
    for axis in range(labels.dim()):
        if labels.shape[axis] == 1 and lo.shape[axis] > 1:
            lo, hi = lo.amin(axis, keepdim=True), hi.amax(axis, keepdim=True)
    flat = labels.flatten().numpy()
    return per_label(
        flat,
        value.count,
        lo.expand(labels.shape).flatten().numpy(),
        hi.expand(labels.shape).flatten().numpy(),
    )


def per_label(
    labels: Ints, count: int, low: np.ndarray, high: np.ndarray | None = None
) -> np.ndarray:
    """Return per label the value that all its positions share, NaN where they differ or are NaN.

    Args:
        labels: The label of each position.
        count: The number of labels.
        low: The value of each position, or its lower bound.
        high: Its upper bound; ``low`` if omitted.
    """
    high = low if high is None else high
    if len(labels) == count and np.array_equal(labels, np.arange(count)):
        return np.where(low == high, low, np.nan)
    bottom, top = np.full(count, np.inf), np.full(count, -np.inf)
    np.fmin.at(bottom, labels, low)  # these two skip NaN
    np.fmax.at(top, labels, high)
    bad = np.zeros(count, dtype=bool)
    np.logical_or.at(bad, labels, np.isnan(low) | np.isnan(high))
    return np.where((bottom == top) & ~bad, bottom, np.nan)
