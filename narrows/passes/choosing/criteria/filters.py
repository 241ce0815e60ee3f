"""The weights of one channel of a layer, side by side: what data-free criteria look at."""

from __future__ import annotations

from torch import Tensor

from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer


def blocks(program: Program, layer: Layer) -> Tensor:
    """Return the weight as ``[groups, outputs of a group, inputs of a group, taps]``.

    A table that rows are looked up in has its rows as taps.
    """
    if layer.contraction is not None:
        return layer.contraction.blocks.detach()
    return program.weights[layer.weight].detach().T[None, :, None, :]


def filters(program: Program, layer: Layer, side: str) -> Tensor:
    """Return the weights that make each channel, or that read it: ``[channels, weights each]``."""
    found = blocks(program, layer)
    found = found if side == "outputs" else found.transpose(1, 2)
    return found.reshape(found.shape[0] * found.shape[1], -1)
