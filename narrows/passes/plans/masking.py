"""The masked program: what a plan means, with the original shapes.

An input mask zeroes the weights through which a consumer reads a channel. An output mask zeroes a
channel's contribution: the result of the norm that reads the producer, or, where another operator
reads it, too, the producer's own weights and bias. A tensor that is read in several places is
changed only where the plan means it. Start at `mask_program`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.editing import add_weight
from narrows.ir.labels import Bools, compact, varying
from narrows.ir.meta import Meta, copy_meta, shape_of
from narrows.ir.ops import dialect, table
from narrows.ir.ops.args import arguments, call, changed, first_tensor, is_tensor
from narrows.ir.program import Draft, Program
from narrows.ir.structure.layers import Layer, positions

Ints = tuple[int, ...]
Zero = Callable[[Tensor], Tensor]


@dataclass
class Slot:
    """One argument of one node that holds a weight, and what is to be zero of it there.

    Attributes:
        node: The node.
        argument: The argument's name.
        root: The weight's ``get_attr`` node.
        chain: The layout operators in between.
        key: Equal for slots that zero the same entries; ``None`` for one that zeroes nothing.
        zero: Returns a copy of the weight with the entries zero.
        inputs: The input channels that are zero, if those are all of the entries.
    """

    node: fx.Node
    argument: str
    root: fx.Node
    chain: tuple[fx.Node, ...] = ()
    key: Any = None
    zero: Zero | None = None
    inputs: Bools | None = None


@dataclass
class Edits:
    """What masking does to a program, collected before any of it is done.

    Attributes:
        readers: Per weight, the nodes that read it.
        slots: Per weight, the slots that the plan may speak of.
        gates: Per node, a mask that multiplies its result.
        biases: Per node and argument, a mask that multiplies a bias computed from weights.
    """

    readers: Mapping[str, set[fx.Node]]
    slots: dict[str, list[Slot]] = field(default_factory=dict)
    gates: dict[fx.Node, Tensor] = field(default_factory=dict)
    biases: dict[tuple[fx.Node, str], Tensor] = field(default_factory=dict)

    def add(self, slot: Slot) -> None:
        """Add a slot under its weight's name."""
        self.slots.setdefault(str(slot.root.target), []).append(slot)


@dataclass(frozen=True, eq=False)
class Mask:
    """The channels of one use that count as zero."""

    use: Layer
    inputs: Ints = ()
    outputs: Ints = ()


def mask_program(program: Program, masks: Sequence[Mask]) -> Program:
    """Return the program with the masked channels zero, and everything else shared."""
    edits = Edits(_readers(program))
    for mask in masks:
        _collect(edits, mask)
    return _apply(program, edits, None)


def split_masks(program: Program, masks: Sequence[Mask]) -> tuple[Program, dict[str, Bools]]:
    """Return the masked program but for input masks of weights that one layer alone reads.

    Those come beside it, by the layer's node name: the channels that count as zero. A rewrite
    slices the weight anyway, so nobody has to make a masked copy of it first.
    """
    edits = Edits(_readers(program))
    for mask in masks:
        _collect(edits, mask)
    ignored: dict[str, Bools] = {}
    return _apply(program, edits, ignored), ignored


# ------------------------------------------------------------------ what to change


def _readers(program: Program) -> dict[str, set[fx.Node]]:
    found: dict[str, set[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            found.setdefault(str(node.target), set()).update(node.users)
    return found


def _collect(edits: Edits, mask: Mask) -> None:
    use = mask.use
    outputs: Ints = ()
    if mask.outputs:
        norms, others = followers(use)
        for norm, labels in norms:
            _mask_norm(edits, norm, labels, mask.outputs)
        outputs = mask.outputs if others or not norms else ()
    root = use.chain[0] if use.chain else use.node
    root = next(n for n in root.all_input_nodes if n.op == "get_attr" and n.target == use.weight)
    slot = Slot(use.node, use.argument, root, use.chain)
    if mask.inputs or outputs:
        geometry = (use.out_axis, use.in_axis, use.groups, use.transposed)
        slot.key = (geometry, mask.inputs, outputs)
        slot.zero = _zero_weight(use, mask.inputs, outputs)
        if not outputs:
            slot.inputs = np.zeros(use.inputs, dtype=bool)
            slot.inputs[list(mask.inputs)] = True
    edits.add(slot)
    if use.bias is not None:
        _mask_bias(edits, use, outputs)


def _zero_weight(use: Layer, inputs: Ints, outputs: Ints) -> Zero:
    grouped, other = (use.in_axis, use.out_axis) if use.transposed else (use.out_axis, use.in_axis)
    split, held = (inputs, outputs) if use.transposed else (outputs, inputs)
    if use.groups == 1 and grouped > other >= 0:
        grouped, other, split, held = other, grouped, held, split

    def zero(data: Tensor) -> Tensor:
        if (grouped, other) == (0, 1) and held:
            data = _without_columns(data, use.groups, held)
        elif held:
            data = data.index_fill(other, torch.tensor(held), 0)
        else:
            data = data.clone()
        return data.index_fill_(grouped, torch.tensor(split), 0) if split else data

    return zero


def _without_columns(data: Tensor, groups: int, dead: Ints) -> Tensor:
    """Return a weight ``[rows, columns, ...]`` with the columns ``dead`` zero, counted over groups.

    One product with a row of ones and zeros is several times as fast as writing zeros.
    """
    columns = data.shape[1]
    keep = torch.ones(groups * columns, dtype=data.dtype)
    keep[list(dead)] = 0
    row = keep.view(groups, 1, columns, 1).expand(-1, -1, -1, math.prod(data.shape[2:]))
    result = data.reshape(groups, -1, columns * row.shape[3]) * row.flatten(2)
    if not bool(result.sum().isfinite()):  # zero times infinity
        result = torch.where(row.flatten(2) == 0, 0, result)
    return result.view(data.shape)


def _zero_axis(axis: int, dead: Sequence[int]) -> Zero:
    return lambda data: data.index_fill(axis, torch.tensor(dead), 0)


def _mask_bias(edits: Edits, use: Layer, outputs: Ints) -> None:
    bias = use.bias
    assert bias is not None
    if bias.op == "get_attr":
        slot = Slot(use.node, use.bias_argument, bias)
        if outputs:
            slot.key, slot.zero = ("bias", outputs), _zero_axis(-1, outputs)
        edits.add(slot)
    elif outputs:
        keep = torch.ones(use.outputs)
        keep[list(outputs)] = 0
        edits.biases[use.node, use.bias_argument] = keep


def followers(use: Layer) -> tuple[list[tuple[fx.Node, Tensor]], bool]:
    """Return the norms that read what a use makes, and whether anything else reads it.

    Layout operators in between are looked through. Each norm comes with the channel that every
    element of its operand belongs to, as a compact label tensor.
    """
    norms: list[tuple[fx.Node, Tensor]] = []
    others = False
    queue = [(use.node, positions(shape_of(use.node), use.y_axis))]
    while queue:
        node, labels = queue.pop()
        for user in node.users:
            row = table.find(user)
            if table.keeps_all(user) or _joins_one(user):
                queue.append((user, call(user, {node: labels})))
            elif row is not None and row.gain and first_tensor(user) is node:
                norms.append((user, compact(labels)))
            else:
                others = True
    return norms, others


def _joins_one(node: fx.Node) -> bool:
    """Whether a node joins a single tensor, which is to pass it on."""
    return table.concatenates(node) and len(node.all_input_nodes) == 1


def _mask_norm(edits: Edits, norm: fx.Node, labels: Tensor, dead: Ints) -> None:
    gone = torch.isin(labels, torch.tensor(dead))
    slots = list(_parameters(norm, gone))
    if slots and all(_is_only_reader(edits, s) for s in slots):
        for slot in slots:
            edits.add(slot)
    else:
        edits.gates[norm] = (~gone).float()


def _parameters(norm: fx.Node, gone: Tensor) -> Iterator[Slot]:
    """Yield the slots of gain and bias, if zeroing entries of those is what the mask amounts to."""
    args, row = arguments(norm), table.find(norm)
    axes = varying(gone)
    assert row is not None
    if len(axes) != 1 or not is_tensor(args[row.gain]):
        return
    (axis,) = axes
    given = [p for p in (row.gain, "bias") if is_tensor(args.get(p))]
    for name in given:
        parameter = args[name]
        own = row.parameter_axis(axis, gone.dim(), len(shape_of(parameter)))
        if own is None or parameter.op != "get_attr":
            yield Slot(norm, "", parameter)  # nobody's slot: `_is_only_reader` refuses it
            return
        dead = torch.nonzero(gone.flatten()).flatten().tolist()
        yield Slot(norm, name, parameter, (), (own, tuple(dead)), _zero_axis(own, dead))


def _is_only_reader(edits: Edits, slot: Slot) -> bool:
    return bool(slot.argument) and edits.readers[str(slot.root.target)] == {slot.node}


# ------------------------------------------------------------------ changing it


def _apply(program: Program, edits: Edits, ignored: dict[str, Bools] | None) -> Program:
    zeroed: dict[str, Tensor] = {}
    copies: list[tuple[str, list[Slot]]] = []  # new weights, and who reads them
    for name, slots in edits.slots.items():
        whole, parts = _parted(slots, edits.readers[name])
        inputs = None if whole is None or ignored is None else _plain_inputs(slots)
        if whole is not None and ignored is not None and inputs is not None:
            ignored[whole.node.name] = inputs
        elif whole is not None:
            zeroed[name] = _zeroed(program.weights[name], whole)
        copies += [(name, part) for part in parts]
    masked = program.replace(weights={**program.weights, **zeroed}) if zeroed else program
    if not copies and not edits.gates and not edits.biases:
        return masked
    return _regraphed(masked, program.weights, copies, edits)


def _plain_inputs(slots: list[Slot]) -> Bools | None:
    """Return the mask, if it is of inputs alone and one layer reads the weight as it is."""
    (first, *others) = slots
    row = table.find(first.node)
    if others or first.chain or row is None or not row.reads_masked:
        return None
    return first.inputs


def _zeroed(data: Tensor, slot: Slot) -> Tensor:
    assert slot.zero is not None
    return slot.zero(data.detach())


def _parted(slots: list[Slot], readers: set[fx.Node]) -> tuple[Slot | None, list[list[Slot]]]:
    """Return the slot whose mask the weight itself takes, and the slots that need copies of it."""
    groups: dict[Any, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(slot.key, []).append(slot)
    plain = groups.pop(None, [])
    parts = list(groups.values())
    if not parts:
        return None, []
    if plain or not _are_all_readers(slots, readers):
        return None, parts
    return parts[0][0], parts[1:]


def _are_all_readers(slots: list[Slot], readers: set[fx.Node]) -> bool:
    """Whether nothing but these slots reads their weight."""
    known = {s.node for s in slots} | {c for s in slots for c in s.chain}
    return readers | {u for s in slots for c in s.chain for u in c.users} <= known


def _regraphed(
    program: Program,
    data: Mapping[str, Tensor],
    copies: list[tuple[str, list[Slot]]],
    edits: Edits,
) -> Program:
    """Return the program with weights untied and results multiplied by masks."""
    result = program.copy()
    new = dict(zip(program.graph.nodes, result.graph.nodes, strict=True))
    for name, slots in copies:
        copy = add_weight(result, f"{name}_masked", _zeroed(data[name], slots[0]), name)
        for slot in slots:
            _untie(slot, new, copy)
    for (node, argument), keep in edits.biases.items():
        source = new[arguments(node)[argument]]
        with result.graph.inserting_before(new[node]):
            gated = _gated(result, source, keep)
        _replace(new[node], {argument: gated})
    for node, keep in edits.gates.items():
        readers = list(new[node].users)
        with result.graph.inserting_after(new[node]):
            gated = _gated(result, new[node], keep)
        for reader in readers:
            reader.replace_input_with(new[node], gated)
    result.graph.lint()
    return result.seal()


def _untie(slot: Slot, new: Mapping[fx.Node, fx.Node], copy: fx.Node) -> None:
    """Let a slot read ``copy``, through a chain of its own."""
    node = new[slot.node]
    before = {new[slot.root]: copy}
    with node.graph.inserting_before(node):
        for step in slot.chain:
            made = node.graph.node_copy(new[step], lambda n: before.get(n, n))
            made.meta = dict(step.meta)
            before[new[step]] = copy = made
    _replace(node, {slot.argument: copy})


def _gated(program: Draft, source: fx.Node, keep: Tensor) -> fx.Node:
    """Add the product of a tensor and a mask where the graph is being written."""
    mask = add_weight(program, f"{source.name}_mask", keep.to(Meta(source).dtype))
    node = program.graph.create_node(
        "call_function", dialect.MULTIPLY, (source, mask), name=f"{source.name}_masked"
    )
    copy_meta(source, node)
    Meta(node).shape, Meta(node).dtype = shape_of(source), Meta(source).dtype
    return node


def _replace(node: fx.Node, changes: dict[str, Any]) -> None:
    node.args, node.kwargs = changed(node, changes)
