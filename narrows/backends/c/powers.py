"""Weights as sums of powers of two, for a build without multiplications."""

from __future__ import annotations

import numpy as np

# With more powers than this a multiplication is the better choice, wherever there is one.
MOST_TERMS = 2


def power_digits(codes: np.ndarray) -> np.ndarray | None:
    """Return the powers of two that weights are sums of, as few as there are.

    Args:
        codes: Whole numbers of at most 8 bits.

    Returns:
        int8 ``[terms, *codes.shape]``: ``k + 1`` stands for ``2**k``, ``-(k + 1)`` for ``-2**k``
        and 0 for nothing. ``None`` where a weight needs more than `MOST_TERMS`.
    """
    left = codes.astype(np.int64)
    planes = []
    while left.any() or not planes:
        if len(planes) == MOST_TERMS:
            return None
        size = np.abs(left)
        power = np.floor(np.log2(np.maximum(size, 1))).astype(np.int64)
        # The nearer of both neighbours leaves the fewest: 7 is 8 - 1, not 4 + 2 + 1.
        power += 2 * size > 3 * (1 << power)
        digit = np.where(size > 0, np.sign(left) * (power + 1), 0)
        planes.append(digit.astype(np.int8))
        left = left - np.where(size > 0, np.sign(left) * (1 << power), 0)
    return np.stack(planes)
