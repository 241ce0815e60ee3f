"""Functions that end somewhere: what they give for codes that lie beyond."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from narrows.ir.integer.library import define


@define
def fake_function(
    x: Tensor, name: str, low: float, high: float, numbers: Sequence[float] = ()
) -> Tensor:
    """Return a function of ``x``, which is brought to where the function is defined first.

    So the root of a negative number is that of 0, and its logarithm is minus infinity, which
    becomes the smallest code. There is one zero, as there is one code for it: ``1 / 0`` is
    infinity, never minus infinity.

    Args:
        x: Numbers.
        name: The overload in ATen: ``log.default``.
        low: Where the function begins; minus infinity if nowhere.
        high: Where it ends.
        numbers: Its further arguments.
    """
    operator, _, overload = name.partition(".")
    function: Any = getattr(getattr(torch.ops.aten, operator), overload)
    return function(x.clamp(low, high) + 0.0, *numbers)  # -0.0 + 0.0 is 0.0


__all__ = ["fake_function"]
