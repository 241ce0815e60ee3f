"""Where gates sit: channels of named weights, and the parameters that a mask of them multiplies.

A mask multiplies parameters, never activations: the columns through which a consumer reads a
channel; or the gain and bias of the norm behind a producer, or the producer's rows where no norm
follows. That is what `narrows.ChannelPlan` means by a mask, so a gated model and the masked program
are one function. Start at `gates_of`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

import torch
from torch import Tensor, fx

from narrows.errors import PlanUsageError, suggest
from narrows.ir.couplings import Coupling, Member
from narrows.ir.labels import varying
from narrows.ir.meta import Meta, where
from narrows.ir.ops import table
from narrows.ir.ops.args import arguments, is_tensor
from narrows.ir.program import Program
from narrows.ir.structure import Structure, structure_of
from narrows.ir.structure.layers import Layer
from narrows.passes.plans.masking import followers
from narrows.passes.plans.naming import find_layers

GLOB = frozenset("*?[")

Names = str | Sequence[str]


@dataclass(frozen=True, eq=False)
class Place:
    """A parameter whose entries belong to channels.

    Attributes:
        parameter: The parameter's name.
        channels: The channel of every entry, int64, of the parameter's shape; axes along which it
            is the same have size 1.
        shape: The parameter's shape.
    """

    parameter: str
    channels: Tensor
    shape: tuple[int, ...]

    def spread(self, mask: Tensor) -> Tensor:
        """Return a mask ``[width]`` as a factor that broadcasts to the parameter."""
        return mask[self.channels.to(mask.device)]

    @cached_property
    def _order(self) -> Tensor:
        return self.channels.expand(self.shape).flatten().argsort(stable=True)

    def rows(self, values: Tensor, width: int) -> Tensor:
        """Return a tensor of the parameter's shape as ``[width, entries of a channel]``."""
        return values.flatten()[self._order.to(values.device)].view(width, -1)

    def sums(self, values: Tensor, width: int) -> Tensor:
        """Return the sum of each channel's entries of a tensor of the parameter's shape."""
        index = self.channels.to(values.device).expand(self.shape).flatten()
        return values.new_zeros(width).index_add(0, index, values.flatten())


@dataclass(frozen=True, eq=False)
class Side:
    """A side of a weight whose channels a gate opens and closes.

    Attributes:
        weight: The weight's name.
        side: ``inputs`` or ``outputs``.
        channels: The gate's channel of each of the side's.
        layer: The layer; of a weight that several layers read, the first.
    """

    weight: str
    side: str
    channels: Tensor
    layer: Layer


@dataclass(frozen=True, eq=False)
class Output:
    """The tensor in which an activation's channels are gated: what a module returns.

    Attributes:
        module: The path of the module.
        axis: The tensor's axis of the channels.
    """

    module: str
    axis: int


@dataclass(frozen=True, eq=False)
class Gate:
    """Channels that are opened and closed together with nothing else, one by one.

    Attributes:
        name: What it is called: ``conv1.weight outputs``.
        width: How many channels it has.
        sides: What a plan is told.
        weights: The weights that make its channels, or that read them.
        masked: The parameters that its mask multiplies.
    """

    name: str
    width: int
    sides: tuple[Side, ...]
    weights: tuple[Place, ...]
    masked: tuple[Place, ...]

    def rows(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the weights of each channel, ``[width, entries]``."""
        return torch.cat([p.rows(parameters[p.parameter], self.width) for p in self.weights], 1)

    def norms(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the Euclidean norm of each channel's weights, ``[width]``."""
        return torch.linalg.vector_norm(self.rows(parameters), dim=1)

    def sums(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return per channel the sum of what belongs to it of tensors in the masked parameters'
        shapes, ``[width]``."""
        parts = [p.sums(values[p.parameter], self.width) for p in self.masked]
        return torch.stack(parts).sum(0)


@dataclass(frozen=True)
class Sites:
    """The gates that globs ask for.

    Attributes:
        gates: The gates, those of outputs first, in the graph's order.
        skipped: Why some of what a glob matches has no gate, or none that it shares with others.
    """

    gates: tuple[Gate, ...]
    skipped: Mapping[str, str]


def listed(names: Names) -> tuple[str, ...]:
    """Return names or globs, of which a single one may be given as it is."""
    return (names,) if isinstance(names, str) else tuple(names)


def gates_of(program: Program, outputs: Names, inputs: Names = (), tied: bool = False) -> Sites:
    """Return the gates of weights.

    A name is gated whatever becomes of its channels, or an error; a glob leaves out what cannot be
    gated, and channels that a barrier holds, such as those of the model's output.

    Args:
        program: The model's program.
        outputs: Names and globs of weights whose output channels get a gate each.
        inputs: The same for the channels that a weight reads.
        tied: Whether producers whose channels live or die together, such as those of a residual
            stream, share one gate.

    Raises:
        PlanUsageError: A name is unknown, a glob matches nothing, nothing is left to gate, or a
            mask of the channels is no mask of the model's parameters.
    """
    structure = structure_of(program)
    gates: list[Gate] = []
    skipped: dict[str, str] = {}
    for side, globs in (("outputs", outputs), ("inputs", inputs)):
        for weight, glob in _matched(program, structure, listed(globs), side).items():
            layers = find_layers(program, {**structure.layers}, weight, side)
            name = f"{weight} {side}"
            if glob and (barrier := _barrier(structure, layers[0], side)):
                skipped[name] = f"no gate: {barrier}"
                continue
            try:
                gates.append(_gate(program, layers, side))
            except PlanUsageError as error:
                if not glob:
                    raise
                skipped[name] = f"no gate: {error.what.removeprefix(f'{name}: ')}"
    if tied:
        gates = _joined(structure, gates, skipped)
    if not gates:
        raise PlanUsageError(
            "there is nothing to gate",
            where=", ".join(skipped) or program.name,
            why="; ".join(dict.fromkeys(skipped.values()))
            or "neither outputs nor inputs of a weight are named",
            hint='outputs="*" gates what every producer makes, where it can go',
        )
    return Sites(tuple(gates), skipped)


def _matched(
    program: Program, structure: Structure, globs: Sequence[str], side: str
) -> dict[str, bool]:
    """Return the weights that names and globs mean, and whether only a glob means them."""
    found: dict[str, bool] = {}
    named: dict[str, bool] = {}
    for glob in globs:
        if not GLOB & set(glob):
            (layer, *_) = find_layers(program, {**structure.layers}, glob, side)
            named[layer.weight] = False
            continue
        matches = [
            name
            for name, layers in structure.layers.items()
            if fnmatchcase(name, glob) and layers[0].width(side)
        ]
        if not matches:
            raise PlanUsageError(
                f"{side}: {glob!r} matches no weight of a layer",
                where=program.name,
                why=f"its layers' weights are {', '.join(structure.layers)}",
                hint=suggest(glob, structure.layers) or f'{side}="*" matches all of them',
            )
        found.update(dict.fromkeys(matches, True))
    chosen = {**found, **named}
    return {name: chosen[name] for name in structure.layers if name in chosen}


def _barrier(structure: Structure, layer: Layer, side: str) -> str:
    """Return why none of the channels of a side can be removed, or an empty string."""
    holds = structure.along(layer, side)
    if not holds:
        return "the channel analysis does not follow them"
    return next((b for tie, _ in holds if (b := structure.ties[tie].barrier)), "")


# ------------------------------------------------------------------ one gate


def _gate(program: Program, layers: Sequence[Layer], side: str) -> Gate:
    layer = layers[0]
    name = f"{layer.weight} {side}"
    width = layer.width(side)
    if any(other.width(side) != width for other in layers):
        raise PlanUsageError(
            f"{name}: the weight is read in layers of several widths",
            where=where(layer.node),
            why="a gate has one mask for all of them",
            hint="gate the layers that feed it, or that read what it makes",
        )
    weight = _place_in_weight(program, layer, side)
    masked = [weight] if side == "inputs" else _behind(program, layers, weight)
    if weight in masked:
        own = {n for u in layers for n in (u.node, *u.chain)}
        _refuse_other_readers(program, name, layer.weight, own)
    sides = (Side(layer.weight, side, torch.arange(width), layer),)
    return Gate(name, width, sides, (weight,), tuple(masked))


def _place_in_weight(program: Program, layer: Layer, side: str) -> Place:
    """Return the channels of a weight's entries on a side."""
    shape = tuple(program.weights[layer.weight].shape)
    axis, width = layer.axis(side), layer.width(side)
    view = [1] * len(shape)
    view[axis] = shape[axis]
    if layer.spans_groups(side):
        return Place(layer.weight, torch.arange(width).view(view), shape)
    # Along the axis lie the channels of one group; which group, the other axis says.
    each, other = shape[axis], layer.in_axis + layer.out_axis - axis
    group = torch.arange(shape[other]) // (shape[other] // layer.groups)
    across = [1] * len(shape)
    across[other] = shape[other]
    return Place(layer.weight, (group * each).view(across) + torch.arange(each).view(view), shape)


def _behind(program: Program, layers: Sequence[Layer], weight: Place) -> list[Place]:
    """Return the parameters that make the contribution of a layer's outputs zero."""
    found: dict[str, Place] = {}
    for layer in layers:
        norms, others = followers(layer)
        for norm, labels in norms:
            for place in _of_norm(program, layer, norm, labels):
                _refuse_other_readers(program, f"{layer.weight} outputs", place.parameter, {norm})
                found[place.parameter] = place
        if norms and not others:
            continue
        found[weight.parameter] = weight
        if layer.bias is None:
            continue
        if layer.bias.op != "get_attr":
            raise PlanUsageError(
                f"{layer.weight} outputs: the bias is computed, and takes no mask",
                where=where(layer.node),
                why="a gate multiplies parameters, the bias among them",
                hint="gate the inputs of the layers that read the channels",
            )
        bias = str(layer.bias.target)
        _refuse_other_readers(program, f"{layer.weight} outputs", bias, {layer.node})
        found[bias] = Place(bias, torch.arange(layer.outputs), (layer.outputs,))
    return list(found.values())


def _of_norm(program: Program, layer: Layer, norm: fx.Node, labels: Tensor) -> list[Place]:
    """Return gain and bias of a norm; ``labels`` are the channels of its operand's elements."""
    args, row = arguments(norm), table.find(norm)
    axes = varying(labels)
    assert row is not None
    parameters = [args[n] for n in (row.gain, "bias") if is_tensor(args.get(n))]
    own = None
    if is_tensor(args.get(row.gain)) and len(axes) == 1:
        rank = len(Meta(parameters[0]).shape)
        own = row.parameter_axis(axes[0], labels.dim(), rank)
    if own is None or any(p.op != "get_attr" for p in parameters):
        raise PlanUsageError(
            f"{layer.weight} outputs: the norm behind them has no gain for each channel",
            where=where(norm),
            why="a mask of outputs multiplies the gain and bias of the norm that reads them",
            hint="give the norm a gain (affine=True), or gate the inputs of the layers behind it",
        )
    places = []
    for parameter in parameters:
        shape = tuple(program.tensor(parameter).shape)
        view = [1] * len(shape)
        view[own] = shape[own]
        places.append(Place(str(parameter.target), labels.flatten().clone().view(view), shape))
    return places


def _refuse_other_readers(program: Program, name: str, parameter: str, own: set[fx.Node]) -> None:
    """Raise unless some nodes alone read a parameter, and nothing else what they make of it."""
    readers = set(program.users_of(parameter))
    chains = {n for n in own if n in readers and table.keeps_all(n)}
    readers |= {u for n in chains for u in n.users}
    others = [n for n in program.nodes if n in readers - own]
    if others:
        raise PlanUsageError(
            f"{name}: {parameter!r} has another reader, which a gate would mask, too",
            where=where(others[0]),
            why="a gate multiplies the parameter, and a plan masks one use of it",
            hint="gate the inputs of the layers that read the channels",
        )


# ------------------------------------------------------------------ shared gates


def _joined(structure: Structure, gates: list[Gate], skipped: dict[str, str]) -> list[Gate]:
    """Return the gates with those of outputs that follow one tie made one."""
    found: dict[object, list[Gate]] = {}
    for gate in gates:
        side = gate.sides[0]
        holds = structure.along(side.layer, side.side) if side.side == "outputs" else None
        one = holds is not None and len(holds) == 1
        found.setdefault(holds[0][0] if one and holds else gate, []).append(gate)
        if side.side == "outputs" and not one:
            why = "they live or die with those of several other layers, part by part"
            skipped[gate.name] = f"a gate of its own: {why}"
    return [
        _merged(structure, tie, parts) if isinstance(tie, int) and len(parts) > 1 else parts[0]
        for tie, parts in found.items()
    ]


def _merged(structure: Structure, tie: int, gates: list[Gate]) -> Gate:
    """Return one gate for the producers of a tie."""
    coupling = structure.ties[tie]
    sides, weights = [], []
    masked: dict[str, Place] = {}
    for gate in gates:
        (side,) = gate.sides
        positions = member_of(coupling, side.layer).positions
        index = torch.zeros(gate.width, dtype=torch.int64)
        for channel, own in enumerate(side.layer.channels("outputs", positions)):
            index[torch.as_tensor(own)] = channel
        sides.append(dataclasses.replace(side, channels=index))
        places = [dataclasses.replace(p, channels=index[p.channels]) for p in gate.weights]
        weights += places
        for place in gate.masked:
            masked[place.parameter] = dataclasses.replace(place, channels=index[place.channels])
    name = f"{coupling.name} outputs"
    return Gate(name, coupling.width, tuple(sides), tuple(weights), tuple(masked.values()))


def member_of(coupling: Coupling, layer: Layer) -> Member:
    """Return how the outputs of a layer follow a coupling that has them."""
    key = layer.weight, layer.out_axis, "out"
    return next(m for m in coupling.members if (m.weight, m.axis, m.role) == key)


# ------------------------------------------------------------------ norms and activations


def gain_of(norm: fx.Node) -> str:
    """Return the name of a norm's gain, or an empty string."""
    row = table.find(norm)
    gain = arguments(norm).get(row.gain) if row is not None and row.gain else None
    return str(gain.target) if isinstance(gain, fx.Node) and gain.op == "get_attr" else ""


def gains_behind(gate: Gate) -> tuple[str, ...]:
    """Return the gains of the norms that read what a gate's layers make."""
    norms = [norm for side in gate.sides for norm, _ in followers(side.layer)[0]]
    return tuple(dict.fromkeys(name for norm in norms if (name := gain_of(norm))))


def output_of(gate: Gate) -> Output:
    """Return the module whose result has a gate's channels as the plan masks them.

    It is the norm that reads them, or else the layer itself.

    Raises:
        PlanUsageError: No module returns them: the layer is a function's, several norms or other
            operators read them, or the gate is one of inputs.
    """
    (side, *others) = gate.sides
    layer = side.layer
    norms, plain = followers(layer) if side.side == "outputs" else ([], False)
    found = None
    if norms and not plain and len(norms) == 1:
        ((node, labels),) = norms
        found = node, varying(labels)[0]
    elif not norms and side.side == "outputs":
        found = layer.node, layer.y_axis
    owner = gate.masked[0].parameter.rpartition(".")[0]
    if others or found is None or Meta(found[0]).module != owner:
        raise PlanUsageError(
            f"{gate.name}: no module returns these channels and nothing else",
            where=where(layer.node),
            why="the gate works on what a module returns: the norm behind a layer, or the layer",
            hint="spell the layer as a module (nn.Conv2d, nn.Linear), followed by one norm at most",
        )
    return Output(owner, found[1])


__all__ = [
    "Gate", "Names", "Output", "Place", "Side", "Sites", "gains_behind", "gates_of", "listed",
    "member_of", "output_of",
]  # fmt: skip
