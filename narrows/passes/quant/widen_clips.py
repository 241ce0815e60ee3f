"""`WidenClips`: a clip such as ReLU6 is moved to the top of the codes, where it costs nothing.

``clip(x, 0, 6)`` on a grid of powers of two ends at code 192 of 255: codes are wasted and a clip
has to be computed. Scaling the layer before by ``s = top / 6`` and the weights of the layers after
by ``1 / s``, with ``top = (2**bits - 1) 2**-e`` next above, leaves the network what it was and
makes the clip the end of the codes themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from narrows.ir.integer.grid import Grid
from narrows.ir.ops import dialect, table
from narrows.ir.ops.args import arguments
from narrows.ir.ops.integer import Clip, LayerWeights
from narrows.ir.ops.integer_forms import Layer
from narrows.ir.program import Draft, Program
from narrows.passes.base import Fidelity, Pass, PassResult


@dataclass(frozen=True)
class WidenClips(Pass):
    """Scales the two sides of every clip from 0 whose neighbours are layers with weights of their
    own.

    Attributes:
        bits: How many bits the codes will have.
    """

    name: ClassVar[str] = "widen-clips"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    bits: int = 8

    def run(self, program: Program) -> PassResult:
        """Return the program with its clips widened."""
        result = program.copy()
        remarks: dict[str, str] = {}
        for node in result.nodes:
            form = table.integer_form(node) if node.op == "call_function" else None
            if not isinstance(form, Clip):
                continue
            low, high = form.bounds(node)
            if low != 0 or not 0 < high < math.inf:
                continue
            before = _layer_before(node)
            after = _layers_after(node)
            if before is None or not after:
                continue
            codes = Grid.of(0, self.bits, negative=False).high
            top = codes * 2.0 ** -math.floor(math.log2(codes / high))
            if top == high:
                continue
            _scale(result, before, after, top / high)
            node.target, node.args, node.kwargs = (
                dialect.CLAMP, (form.operands(node)[0], 0.0, top), {},
            )  # fmt: skip
            remarks[node.name] = f"clipped at {top:g}, was {high:g}"
        done = bool(remarks)
        return PassResult(result if done else program, done, remarks=remarks)


def own_weights(node: fx.Node) -> LayerWeights | None:
    """Return a layer's weights if nothing else reads them."""
    form = table.integer_form(node) if node.op == "call_function" else None
    if not isinstance(form, Layer) or form.obstacle(node):
        return None
    layer: Any = form.weights(node)
    alone = all(len(n.users) == 1 for n in (layer.weight, layer.bias) if n is not None)
    return layer if alone and layer.weight is not layer.bias else None


def _layer_before(clip: fx.Node) -> LayerWeights | None:
    source: Any = next(iter(arguments(clip).values()))
    return own_weights(source) if len(source.users) == 1 else None


def _layers_after(node: fx.Node) -> list[LayerWeights]:
    """Return the layers that a tensor ends in, through what commutes with a factor; none if it
    also ends elsewhere."""
    found: list[LayerWeights] = []
    for user in node.users:
        if user.op != "call_function":
            return []
        form = table.integer_form(user)
        layer = own_weights(user)
        if layer is not None and node not in (layer.weight, layer.bias):
            found.append(layer)
            continue
        commutes = form is not None and not form.obstacle(user) and form.homogeneous(user)
        further = _layers_after(user) if commutes else []
        if not further:
            return []
        found += further
    return found


def _scale(program: Draft, before: LayerWeights, after: list[LayerWeights], factor: float) -> None:
    """Multiply a layer by a factor and the layers that read it by its inverse."""
    for node in (before.weight, before.bias):
        if node is not None:
            _multiply(program, node, factor)
    for layer in {layer.weight: layer for layer in after}.values():
        _multiply(program, layer.weight, 1 / factor)


def _multiply(program: Draft, node: fx.Node, factor: float) -> None:
    tensor = program.tensor(node)
    program.weights[str(node.target)] = (tensor.detach().double() * factor).to(tensor.dtype)
