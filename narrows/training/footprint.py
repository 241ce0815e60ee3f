"""What a network costs with masks, as a differentiable number: the share of weights or of products.

Penalties of gates are made of it: a channel that goes takes weights from the layer that makes it
and from all that read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from narrows.errors import UsageError
from narrows.ir.program import Program
from narrows.ir.structure import Holds, structure_of
from narrows.ir.structure.layers import Layer
from narrows.ir.workload import macs, works_of
from narrows.training.sites import Gate, member_of

KINDS = ("weights", "macs")


@dataclass(frozen=True, eq=False)
class Maker:
    """A layer that makes channels of a tie.

    Attributes:
        gate: The number of its gate, ``None`` where it has none.
        channels: The gate's channel of each of the tie's.
    """

    gate: int | None
    channels: Tensor


class Footprint:
    """The share of a network's weights, or multiplications, that masks leave.

    Of a layer with ``c`` weights (times the positions at which it multiplies with them) is left

        ``c  *  mean of its own mask of inputs  *  share of its input channels that somebody makes
        *  mean of its mask of outputs``

    where a channel that several layers make together, as in a residual stream, is made unless all
    of them close it: ``1 - product of (1 - m)``. A depthwise layer hands channels on, and makes
    none: it counts the smaller of its two sides. A weight that several layers read is shared out
    among them. It is the number to be pulled down; what a pruned program costs, `narrows.apply`
    says.

    Args:
        program: The program.
        gates: The gates, whose masks `share` is given.
        kind: ``weights``, or ``macs`` at the example's sizes.
    """

    def __init__(self, program: Program, gates: Sequence[Gate], kind: str = "weights") -> None:
        if kind not in KINDS:
            raise UsageError(
                f"there is no footprint {kind!r}",
                where="kind",
                why="it counts what is multiplied or what is stored",
                hint=f"one of {', '.join(KINDS)}",
            )
        structure = structure_of(program)
        self._gates = gates
        self._layers = [layer for own in structure.layers.values() for layer in own]
        self._ties = structure.ties
        self._along = {
            layer: structure.along(layer, "outputs" if _hands_on(layer) else "inputs")
            for layer in self._layers
        }
        uses = {layer: len(own) for own in structure.layers.values() for layer in own}
        self._costs = [_cost(program, layer, kind, uses[layer]) for layer in self._layers]
        self._whole = sum(self._costs)
        self._own = {
            (side.weight, side.side): (n, side)
            for n, gate in enumerate(gates)
            for side in gate.sides
        }
        makers: dict[int, list[Maker]] = {}
        for layer in self._layers:
            for tie, _ in () if _hands_on(layer) else structure.along(layer, "outputs") or ():
                makers.setdefault(tie, []).append(self._maker(layer, tie))
        self._makers = makers

    def share(self, masks: Sequence[Tensor]) -> Tensor:
        """Return what is left of the network, 0..1, differentiable.

        Args:
            masks: Per gate a mask ``[width]`` in 0..1.
        """
        made = {tie: self._made(tie, masks) for tie in self._makers}
        left = masks[0].new_zeros(())
        for layer, cost in zip(self._layers, self._costs, strict=True):
            fed = self._fed(self._along[layer], made, masks[0].new_ones(()))
            inside = self._mean(layer, "inputs", masks) * fed
            outside = self._mean(layer, "outputs", masks)
            both = torch.minimum(inside, outside) if _hands_on(layer) else inside * outside
            left = left + cost * both
        return left / self._whole

    def _maker(self, layer: Layer, tie: int) -> Maker:
        found = self._own.get((layer.weight, "outputs"))
        coupling = self._ties[tie]
        if found is None:
            return Maker(None, torch.arange(coupling.width))
        number, side = found
        first = layer.channels("outputs", member_of(coupling, layer).positions)[:, 0]
        return Maker(number, side.channels[torch.as_tensor(first)])

    def _made(self, tie: int, masks: Sequence[Tensor]) -> Tensor:
        """Return how much of each channel of a tie is made."""
        closed = torch.ones_like(masks[0][:1]).expand(self._ties[tie].width)
        for maker in self._makers[tie]:
            if maker.gate is None:
                return torch.ones_like(closed)
            closed = closed * (1 - masks[maker.gate][maker.channels.to(closed.device)])
        return 1 - closed

    def _fed(self, holds: Holds | None, made: dict[int, Tensor], whole: Tensor) -> Tensor:
        if not holds:
            return whole
        parts = [
            (self._ties[tie].width * each, made[tie].mean() if tie in made else whole)
            for tie, each in holds
        ]
        return sum((n * share for n, share in parts), whole * 0) / sum(n for n, _ in parts)

    def _mean(self, layer: Layer, side: str, masks: Sequence[Tensor]) -> Tensor:
        found = self._own.get((layer.weight, side))
        if found is None:
            return masks[0].new_ones(())
        number, own = found
        return masks[number][own.channels.to(masks[number].device)].mean()


def _hands_on(layer: Layer) -> bool:
    """Whether a layer is depthwise: its channels are those that it reads."""
    return layer.groups > 1 and layer.groups == layer.inputs


def _cost(program: Program, layer: Layer, kind: str, uses: int) -> float:
    if kind == "macs":
        return macs(layer.node, works_of(program))
    return program.weights[layer.weight].numel() / uses


__all__ = ["Footprint"]
