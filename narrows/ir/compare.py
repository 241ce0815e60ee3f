"""How far apart two results are."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor


def relative_error(actual: Any, expected: Any) -> float:
    """Return the largest difference of two results, relative to the expected one's largest value.

    Both may be nested; they must have the same structure and shapes. A NaN or an infinity in one
    but not the other counts as infinite error.
    """
    a_flat, a_spec = pytree.tree_flatten(actual)
    b_flat, b_spec = pytree.tree_flatten(expected)
    if a_spec != b_spec:
        return math.inf
    worst = 0.0
    for a, b in zip(a_flat, b_flat, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            worst = max(worst, 0.0 if a == b else math.inf)
            continue
        if a.shape != b.shape:
            return math.inf
        a, b = a.detach().double(), b.detach().double()
        both = a.isfinite() & b.isfinite()
        if not torch.allclose(a[~both], b[~both], equal_nan=True):
            return math.inf
        if not bool(both.any()):
            continue
        difference = (a - b)[both].abs().max().item()
        scale = b[both].abs().max().item()
        worst = max(worst, difference / scale if scale > 0 else difference)
    return worst
