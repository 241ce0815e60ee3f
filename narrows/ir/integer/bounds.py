"""How large an accumulator can become, per output channel, for any input at all.

With codes ``x`` between ``low`` and ``high`` around the zero point, every partial sum of a channel,
in whatever order it is formed, lies between the sum of its smallest and the sum of its largest
products::

    bound = |b| + max(sum max(w (low - zero), w (high - zero)), -sum min(...))

Below `SAFE` an int32 accumulator cannot overflow. Up to `EXACT` every partial sum is a float32, so
that a backend that adds in float32 is exact, too. Sums of wide codes may take 64 bits; below
`WIDE_SAFE` they are float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrows.ir.integer.grid import Grid

SAFE = 2**31
EXACT = 2**24
WIDE_SAFE = 2**53

# A result that is more than 31 bits to the right of its accumulator is zero whatever comes in;
# one that is further left than this overflows whatever comes in.
SHIFTS = range(-23, 32)


def accumulator_bound(
    weight: Tensor, bias: Tensor | None, grid: Grid, axis: int = 0, groups: int = 1
) -> Tensor:
    """Return the bound of every output channel, as int64.

    Args:
        weight: The weight's codes.
        bias: The bias's codes, if there is one.
        grid: The grid of the operand.
        axis: The axis of the output channels.
        groups: Of a transposed convolution, whose weight has the channels of one group on ``axis``
            1.
    """
    rows = weight.to(torch.int64)
    if axis == 1 and groups > 1:  # [in, out / groups, ...]: a block of rows per group
        rows = rows.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        axis = 0
    rows = rows.movedim(axis, 0).flatten(1)
    least, most = grid.low - grid.zero, grid.high - grid.zero
    ends = torch.stack([rows * least, rows * most])
    reach = torch.maximum(ends.amax(0).clamp(min=0).sum(1), -ends.amin(0).clamp(max=0).sum(1))
    return reach if bias is None else reach + bias.to(torch.int64).abs()
