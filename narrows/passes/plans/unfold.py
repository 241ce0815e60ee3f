"""A state dict of folded batch norms, given back the norms."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from narrows.errors import PlanError
from narrows.ir.ops.args import arguments
from narrows.ir.program import Draft, Program
from narrows.passes.fold_batch_norm import fold, layer_row, parts_of, scaled


def unfolded(program: Program, folded: Program) -> Program:
    """Return ``program`` with weights by which it computes what ``folded`` does.

    Every norm keeps its gain and statistics, and the layer before it takes the rest; where the
    layer has no bias, the norm's own shift does, and without one its mean. A channel whose gain is
    zero, which would lose what was trained, is given a gain of its deviation.

    Args:
        program: A program with batch norms.
        folded: What ``fold-batch-norm`` makes of it, perhaps with other weights.

    Raises:
        PlanError: Layers share a norm, and would need it to be two.
    """
    weights = {n: folded.weights.get(n, t) for n, t in program.weights.items()}
    result = program.copy(weights=weights)
    nodes = {n.name: n for n in result.graph.nodes}
    norms: dict[str, list[fx.Node]] = {}
    biases: dict[str, str] = {}
    for done in fold(program)[1]:
        norms.setdefault(done.layer, []).append(nodes[done.norm])
        biases[done.layer] = done.bias
    taker = _Taker(result)
    for layer, behind in norms.items():
        taker.unfold(nodes[layer], behind, folded.weights[biases[layer]])
    return result.seal()


class _Taker:
    """Takes folded norms out of the layers of a draft."""

    def __init__(self, program: Draft) -> None:
        self.program = program
        self.written: set[str] = set()

    def unfold(self, layer: fx.Node, norms: list[fx.Node], bias: Tensor) -> None:
        """Set the weights of a layer, and of the norms behind it, from those that hold both."""
        row, given = layer_row(layer), arguments(layer)
        left, total = bias.detach().double(), torch.ones(bias.shape, dtype=torch.float64)
        for norm in reversed(norms):
            parts = parts_of(self.program, norm)
            dead = parts.gain == 0
            if bool(dead.any()):
                parts = replace(parts, gain=torch.where(dead, parts.deviation, parts.gain))
                self._set(arguments(norm)["weight"], parts.gain)
            total = total * parts.scale
            if norm is norms[0] and given[row.bias] is None:
                self._shift(norm, left, parts.mean, parts.scale)
            else:
                left = (left - parts.shift) / parts.scale + parts.mean
        weight = self.program.tensor(given[row.weight])
        self._set(given[row.weight], scaled(layer, weight, 1 / total))
        if given[row.bias] is not None:
            self._set(given[row.bias], left)

    def _shift(self, norm: fx.Node, left: Tensor, mean: Tensor, scale: Tensor) -> None:
        """Let a norm behind a layer without a bias give ``left`` where the layer gives zero."""
        given = arguments(norm)
        if given["bias"] is not None:
            self._set(given["bias"], left + mean * scale)
        else:
            self._set(given["running_mean"], -left / scale)

    def _set(self, node: fx.Node, tensor: Tensor) -> None:
        name = str(node.target)
        old, new = self.program.weights[name], tensor.to(self.program.weights[name].dtype)
        if name in self.written and not torch.allclose(old, new):
            raise PlanError(
                f"{name!r} cannot be restored",
                why="layers share that norm, it was folded into each, and they need it to be two",
                hint="train a program whose norms are not folded",
            )
        self.written.add(name)
        self.program.weights[name] = new


__all__ = ["unfolded"]
