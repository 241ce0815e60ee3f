"""AdaPruner: widths in proportion to the mean gain of a block's batch norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from narrows.errors import PlanUsageError
from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer, layers_of
from narrows.passes.choosing.criteria import catalog
from narrows.passes.choosing.criteria.base import DataFree, scores
from narrows.passes.choosing.criteria.chains import batch_norm, gain


@dataclass(frozen=True)
class AdaPruner(DataFree):
    """The mean of the gains in a channel's block, over the channel's rank in its layer.

    With ``scope="global"`` every layer then keeps a share of its channels in proportion to the mean
    gain of its block: a channel of rank ``r`` of ``n`` scores ``mean * n / r``, so that those above
    a threshold ``1/a`` are the first ``a * mean * n``. A block is the module around the layer;
    where that is around all batch norms of the network, it is the layer alone.

    Attributes:
        order: The criterion that ranks the channels of a layer: which weights it inherits.
    """

    name: ClassVar[str] = "adapruner"
    paper: ClassVar[str] = (
        "Liu et al., AdaPruner: Adaptive Channel Pruning and Effective Weights Inheritance, 2021"
    )
    comparable: ClassVar[bool] = True
    order: str = "l1"

    def score(self, program: Program, layer: Layer, side: str) -> np.ndarray:
        """Return the scores; `NoScoreError` where no batch norm stands by the layer."""
        norm = batch_norm(layer, side)
        if norm is None or gain(program, norm) is None:
            raise self.no("no batch norm with a gain stands by it", "lamp")
        order = catalog.find(self.order)
        if not isinstance(order, DataFree) or isinstance(order, AdaPruner):
            raise PlanUsageError(
                f"adapruner cannot order channels by {order.name}",
                why="it takes a criterion that needs no data",
                hint="adapruner{order=l1}",
            )
        own = scores(order, program, layer, side)
        rank = np.empty(len(own))
        rank[np.argsort(-own, kind="stable")] = np.arange(1, len(own) + 1)
        return self.mean(program, layer, side) * len(own) / rank

    def mean(self, program: Program, layer: Layer, side: str) -> float:
        """Return the mean gain of the layer's block."""
        owner = layer.weight.rpartition(".")[0]  # the layer's own module
        block = owner.rpartition(".")[0]
        known = program.memo(f"gains of {side}", lambda: _gains(program, side))
        inside = {w: g for w, g in known.items() if block and w.startswith(f"{block}.")}
        if len(inside) == len(known) or layer.weight not in inside:
            inside = {layer.weight: known[layer.weight]}
        return float(torch.cat(list(inside.values())).mean())


def _gains(program: Program, side: str) -> dict[str, torch.Tensor]:
    """Return the gains of the batch norm by every weight that has one."""
    found = {}
    for weight, (layer, *_) in layers_of(program).items():
        norm = batch_norm(layer, side)
        own = None if norm is None else gain(program, norm)
        if own is not None:
            found[weight] = own
    return found
