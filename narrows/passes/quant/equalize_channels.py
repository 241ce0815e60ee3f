"""`EqualizeChannels`: powers of two move between a layer and those behind it, channel by channel.

ReLU commutes with a positive factor, so ``W2 relu(W1 x + b) = (W2 / t) relu(t W1 x + t b)`` for any
``t`` per channel. Where a tensor has one scale, a channel that is much smaller than the others gets
few codes; factors bring the channels' ranges together. They are powers of two, so that not a bit of
the float network changes.

Method: cross-layer equalization, M. Nagel et al., "Data-Free Quantization Through Weight
Equalization and Bias Correction", ICCV 2019, with the factors rounded to powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from narrows.ir.meta import shape_of
from narrows.ir.ops import table
from narrows.ir.ops.args import arguments
from narrows.ir.ops.integer import Clip, LayerWeights
from narrows.ir.ops.integer_forms import AveragePool, Layer, Lookup, Mean, Slope
from narrows.ir.program import Draft, Program, aten
from narrows.passes.base import Fidelity, Pass, PassResult
from narrows.passes.quant.widen_clips import own_weights

# What keeps every channel of axis 1 to itself and commutes with a positive factor, besides ReLU and
# averages.
PER_CHANNEL = {aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default,
               aten.dropout.default, aten.clone.default}  # fmt: skip
LARGEST = 8  # bits a channel is moved at most


@dataclass(frozen=True)
class EqualizeChannels(Pass):
    """Balances the channel ranges of layers that follow each other through ReLU.

    Attributes:
        rounds: How often all pairs are gone through; a layer in the middle of two pairs settles.
    """

    name: ClassVar[str] = "equalize-channels"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    rounds: int = 2

    def run(self, program: Program) -> PassResult:
        """Return the program with its channels equalized."""
        result = program.copy()
        changed = False
        for _ in range(self.rounds):
            for node in result.graph.nodes:
                before = own_weights(node) if node.op == "call_function" else None
                if before is None or before.axis != 0:
                    continue
                after = _behind(node)
                changed |= bool(after) and _balance(result, before, after)
        return PassResult(result if changed else program, changed)


def _behind(node: fx.Node) -> list[tuple[LayerWeights, bool]]:
    """Return the layers that a tensor's channels end in, each with whether it is depthwise.

    Empty where a channel is also read otherwise.
    """
    found: list[tuple[LayerWeights, bool]] = []
    for user in node.users:
        if user.op != "call_function":
            return []
        layer = own_weights(user)
        if layer is not None:
            kind = _reads_channels(node, user, layer)
            if not kind:
                return []
            found.append((layer, kind == "depthwise"))
            continue
        further = _behind(user) if _keeps_channels(user) else []
        if not further:
            return []
        found += further
    return found


def _reads_channels(node: fx.Node, user: fx.Node, layer: LayerWeights) -> str:
    """Return how a layer reads axis 1 of its operand: ``dense``, ``depthwise``, or not at all."""
    form: Any = table.integer_form(user)
    assert isinstance(form, Layer)
    if form.operands(user)[0] is not node or form.swapped or form.transposed:
        return ""
    if not form.spatial:
        return "dense" if len(shape_of(node)) == 2 else ""
    groups, shape = arguments(user)["groups"], shape_of(layer.weight)
    if groups == 1:
        return "dense"
    return "depthwise" if groups == shape[0] and shape[1] == 1 else ""


def _keeps_channels(node: fx.Node) -> bool:
    """Whether every channel of axis 1 stays one, and is only multiplied by a factor with it."""
    form = table.integer_form(node)
    if isinstance(form, Clip | Lookup | Slope):
        return form.homogeneous(node)
    if isinstance(form, Mean):
        rank = len(shape_of(node.all_input_nodes[0]))
        return not form.obstacle(node) and all(d % rank > 1 for d in arguments(node)["dim"])
    if isinstance(form, AveragePool):
        return not form.obstacle(node)
    if node.target is aten.flatten.using_ints:
        return all(s == 1 for s in shape_of(node.all_input_nodes[0])[2:])
    return node.target in PER_CHANNEL


def _balance(program: Draft, before: LayerWeights, after: list[tuple[LayerWeights, bool]]) -> bool:
    """Scale one layer's rows and the columns behind it; return whether anything moved."""
    rows = _range(program.tensor(before.weight), 0)
    columns = torch.zeros_like(rows)
    for layer, depthwise in after:
        columns = torch.maximum(columns, _range(program.tensor(layer.weight), int(not depthwise)))
    alive = (rows > 0) & (columns > 0)
    if not bool(alive.any()):
        return False
    wanted = torch.zeros_like(rows)
    wanted[alive] = 0.5 * torch.log2(columns[alive] / rows[alive])
    wanted[alive] -= wanted[alive].median()  # what all channels share only moves an exponent
    power = wanted.round().clamp(-LARGEST, LARGEST)
    if not bool(power.any()):
        return False
    for node in (before.weight, before.bias):
        if node is not None:
            _multiply(program, node, 0, power)
    for layer, depthwise in after:
        _multiply(program, layer.weight, int(not depthwise), -power)
    return True


def _range(weight: Tensor, axis: int) -> Tensor:
    return weight.detach().double().abs().movedim(axis, 0).flatten(1).amax(1)


def _multiply(program: Draft, node: fx.Node, axis: int, power: Tensor) -> None:
    tensor = program.tensor(node).detach()
    factor = torch.exp2(power).to(tensor.dtype)
    shape = [-1 if a == axis else 1 for a in range(tensor.dim())]
    program.weights[str(node.target)] = tensor * factor.reshape(shape)
