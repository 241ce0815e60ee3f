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
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.channels import Facts, analyse
from narrows.ir.labels import Value
from narrows.ir.meta import shape_of
from narrows.ir.ops import table
from narrows.ir.ops.integer import LayerWeights
from narrows.ir.program import Draft, Program
from narrows.passes.base import Fidelity, Pass, PassResult
from narrows.passes.quant.widen_clips import own_weights

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
        facts = analyse(program)
        pairs = [
            (before, after)
            for node in program.graph.nodes
            if (before := _layer(node)) is not None and (after := _behind(facts, node))
        ]
        changed = False
        for _ in range(self.rounds):
            for before, after in pairs:
                changed |= _balance(result, before, after)
        return PassResult(result if changed else program, changed)


def _layer(node: fx.Node) -> LayerWeights | None:
    """Return the weights of a layer whose rows are its channels, if nothing else reads them."""
    weights = own_weights(node) if node.op == "call_function" else None
    return weights if weights is not None and weights.axis == 0 else None


def _behind(facts: Facts, node: fx.Node) -> list[tuple[LayerWeights, bool]]:
    """Return the layers that a tensor's channels end in, each with whether it is depthwise.

    Empty where a channel is also read otherwise.
    """
    found: list[tuple[LayerWeights, bool]] = []
    for user in node.users:
        if user.op != "call_function":
            return []
        layer = own_weights(user)
        if layer is not None:
            kind = _reads_channels(facts, user, layer)
            if not kind:
                return []
            found.append((layer, kind == "depthwise"))
            continue
        further = _behind(facts, user) if _keeps_channels(facts, user) else []
        if not further:
            return []
        found += further
    return found


def _reads_channels(facts: Facts, user: fx.Node, layer: LayerWeights) -> str:
    """Return how a layer reads the channels of its operand, which lie in their order: ``dense``,
    ``depthwise``, or not at all."""
    c = table.contraction(facts, user)
    if c is None or facts.flows[user].barrier or (c.out_axis, c.in_axis) != (0, 1):
        return ""
    columns, value = facts.flows[user].facts[1], facts.value(c.x)
    if len(columns) != 1 or not np.array_equal(columns[0], np.arange(value.count)):
        return ""
    if c.groups == 1:
        return "dense"
    return "depthwise" if shape_of(layer.weight)[:2] == (c.groups, 1) else ""


def _keeps_channels(facts: Facts, node: fx.Node) -> bool:
    """Whether every channel stays one, and is only multiplied by a factor with it."""
    form, flow = table.integer_form(node), facts.flows[node]
    if form is None or form.obstacle(node) or not form.homogeneous(node):
        return False
    if flow.barrier or len(flow.reads) != 1 or not isinstance(flow.value, Value):
        return False
    (read,) = flow.reads
    return read.straight and flow.value.count == facts.value(read.operand).count


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
