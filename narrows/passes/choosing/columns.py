"""The columns that a layer multiplies with its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from narrows.ir.ops import table
from narrows.ir.ops.args import arguments
from narrows.ir.ops.contract import Contract
from narrows.passes.choosing.seen import Seen

POSITIONS = 256  # of an example, at most: neighbours say nearly the same


def columns(seen: Seen) -> Tensor | None:
    """Return what a layer multiplies: ``[groups, inputs of a group, taps, rows]``.

    The patches of a convolution are not gathered by a rule of their own: the layer's operator,
    given a weight of ones and zeros that picks one tap, returns them.

    Args:
        seen: The inputs of the layer.

    Returns:
        The columns, the rows being examples and positions of the result, 256 of an example at most;
        ``None`` for a layer that is no plain contraction.
    """
    layer, row = seen.layer, table.find(seen.layer.node)
    if layer.contraction is None or not isinstance(row, Contract):
        return None
    found = _patches(seen, layer.contraction) if row.spatial else seen.flat[:, :, None]
    found = found.reshape(*found.shape[:3], -1)
    count = found.shape[3]
    if count > POSITIONS:
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:POSITIONS]
        found = found[..., drawn.sort().values]
    found = found.permute(1, 2, 0, 3).flatten(2)
    return found.reshape(layer.groups, -1, *found.shape[1:])


def _patches(seen: Seen, c: Any) -> Tensor:
    """Return the patches of a convolution: ``[examples, inputs, taps, *positions]``."""
    x, kernel = seen.values, c.data.shape[2:]
    count = kernel.numel()
    picks = torch.eye(count, dtype=x.dtype).reshape(count, 1, *kernel)
    picks = picks.transpose(0, 1) if seen.layer.transposed else picks
    names = c.names
    changed = {names[0]: x.reshape(-1, 1, *x.shape[2:]), names[1]: picks, names[2]: None}
    target: Any = seen.layer.node.target
    made = target(**{**arguments(seen.layer.node), **changed, "groups": 1})
    return made.reshape(*x.shape[:2], *made.shape[1:])
