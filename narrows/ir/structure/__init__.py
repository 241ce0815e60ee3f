"""`Structure`: who makes channels, who reads them, and which of them live or die together.

It is found once per program, and asked by everything that chooses channels: criteria and plans
(layers), constrained plans, the model of latency and padding (ties). `narrows.ir.structure.spaces`
has the tensors that have the same channels once some are masked, for who chooses among forms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from narrows.ir.couplings import Coupling, couplings
from narrows.ir.meta import shape_of
from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer, layers_of

# Ties by their number, each with how many channels of a tensor or a weight one of its channels is.
Holds = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Structure:
    """Who makes a program's channels, who reads them, and what lives or dies together.

    Attributes:
        layers: Per weight its layers, both in execution order.
        ties: The couplings: channels that live or die together, with the weight axes that follow
            them and what bars them, in the graph's order.
    """

    layers: Mapping[str, tuple[Layer, ...]]
    ties: tuple[Coupling, ...]

    @cached_property
    def held(self) -> Mapping[str, Holds]:
        """Per node the ties whose channels its tensor holds."""
        found: dict[str, list[tuple[int, int]]] = {}
        for number, tie in enumerate(self.ties):
            for node in dict.fromkeys(tie.nodes):
                found.setdefault(node, []).append((number, 1))
        return {node: tuple(holds) for node, holds in found.items()}

    @cached_property
    def layer_at(self) -> Mapping[str, Layer]:
        """Per node that makes channels of a weight, by name, its layer."""
        return {layer.node.name: layer for found in self.layers.values() for layer in found}

    def made(self, node: fx.Node) -> Holds:
        """Return the ties whose channels an operator makes or hands on."""
        layer = self.layer_at.get(node.name)
        along = None if layer is None else self.along(layer, "outputs")
        return self.held.get(node.name, ()) if along is None else along

    def read(self, node: fx.Node) -> Holds:
        """Return the ties whose channels an operator reads.

        A layer that sums reads what its weight follows on that side. What hands channels on reads
        what it makes, and what makes other ones reads those of its first operand that has any.
        """
        layer = self.layer_at.get(node.name)
        if layer is not None and layer.sums:
            return self.along(layer, "inputs") or ()
        made = self.made(node)
        if made or layer is not None:
            return made
        tensors = (n.name for n in node.all_input_nodes if shape_of(n) is not None)
        return next((self.held[n] for n in tensors if n in self.held), ())

    def along(self, layer: Layer, side: str) -> Holds | None:
        """Return the ties that a layer's weight follows on a side; ``None`` if it follows none."""
        role = "in" if side == "inputs" else "out"
        return self._along.get((layer.weight, layer.axis(side), role))

    @cached_property
    def _along(self) -> Mapping[tuple[str, int, str], Holds]:
        found: dict[tuple[str, int, str], dict[int, int]] = {}
        for number, tie in enumerate(self.ties):
            for member in tie.members:
                key = member.weight, member.axis, member.role
                found.setdefault(key, {})[number] = member.positions.shape[1]
        return {key: tuple(holds.items()) for key, holds in found.items()}


def structure_of(program: Program) -> Structure:
    """Return the structure of a program, found once."""
    return program.memo("structure", lambda: Structure(layers_of(program), couplings(program)))


__all__ = ["Holds", "Layer", "Structure", "layers_of", "structure_of"]
