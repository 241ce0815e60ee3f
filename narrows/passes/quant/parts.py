"""`Parts`: where the tensors that a concatenation joins go, and who reads them how.

Boxes of 0 to 640 beside scores of 0 to 1 have no common scale that serves both. As scales are
powers of two, each part may be multiplied by one before it is joined, exactly, if all that reads
the joined tensor makes up for it: a layer in the columns of its weight, anything else by the
inverse. What a positive factor passes through (ReLU, pooling, views, gates) hands it on.

The analysis gives every part a *label*, and follows which label each index along one axis of a
tensor has. Parts that something reads together, and that it cannot tell apart, get one factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from narrows.ir.meta import Meta, op_name, shape_of, where
from narrows.ir.ops.args import arguments
from narrows.ir.ops.integer import IntegerForm, LayerWeights, Moves, Relabel
from narrows.ir.ops.integer_averages import Mean
from narrows.ir.ops.integer_forms import Add, Concat, Layer, Mul
from narrows.ir.ops.integer_padding import Padding
from narrows.ir.program import Program
from narrows.passes.quant.survey import Survey

NOTHING = 0  # the label of zeros that padding puts in; parts count from 1


@dataclass(frozen=True)
class Labels:
    """Which part every index of an axis of a tensor belongs to."""

    axis: int
    along: tuple[int, ...]

    def tensor(self, shape: Sequence[int]) -> Tensor:
        """Return the label of every element; floats, so that any operator runs on them."""
        lie = [len(self.along) if a == self.axis else 1 for a in range(len(shape))]
        return torch.tensor(self.along, dtype=torch.float32).reshape(lie).expand(tuple(shape))


@dataclass
class Parts:
    """What `find_parts` found.

    Attributes:
        sources: Per label, from 1 on: the concatenation and which of its operands it is.
        labels: The tensors that hold several parts, and which.
        single: The tensors that hold one part of those alone again.
        absorbed: Layers that can make up for factors in their weights.
        read: Who reads such a tensor otherwise, and so wants its numbers as they are: the tensor
            and its reader.
        reasons: Per label that shares a factor with others, why.
    """

    sources: list[tuple[fx.Node, int]] = field(default_factory=list)
    labels: dict[fx.Node, Labels | list[Labels]] = field(default_factory=dict)
    single: dict[fx.Node, Labels] = field(default_factory=dict)
    absorbed: list[fx.Node] = field(default_factory=list)
    read: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    _leader: list[int] = field(default_factory=lambda: [NOTHING])

    def leader(self, label: int) -> int:
        """Return the label that stands for all that share its factor."""
        while self._leader[label] != label:
            label = self._leader[label]
        return label

    def of(self, node: fx.Node) -> Labels | None:
        """Return the labels of a tensor that holds several parts, or ``None``."""
        found = self.labels.get(node)
        return found if isinstance(found, Labels) else None

    def leaders(self, labels: Labels) -> tuple[int, ...]:
        """Return the leader of every index; zeros have none."""
        return tuple(map(self.leader, labels.along))

    def read_as_they_are(self) -> set[int]:
        """Return the leading labels of parts whose numbers something wants, factor or not."""
        held = [x for n, _ in self.read if (x := self.of(n)) is not None]
        held += [labels for n, labels in self.single.items() if n.users]
        return {leader for labels in held for leader in self.leaders(labels)} - {NOTHING}

    def read_at_all(self) -> set[int]:
        """Return the leading labels of parts that anything reads."""
        absorbed = [self.labels[n] for layer in self.absorbed for n in layer.all_input_nodes
                    if n in self.labels]  # fmt: skip
        led = {self.leader(x) for held in absorbed for x in _all(held)}
        return (led | self.read_as_they_are()) - {NOTHING}

    def new(self, node: fx.Node, index: int) -> int:
        """Return a new label, of an operand of a concatenation."""
        self.sources.append((node, index))
        self._leader.append(len(self.sources))
        return len(self.sources)

    def unite(self, labels: Iterable[int], reason: str) -> None:
        """Let parts share a factor."""
        named = sorted({self.leader(x) for x in labels} - {NOTHING})
        for label in named[1:]:
            self._leader[label] = named[0]
        for label in named if len(named) > 1 else ():
            self.reasons.setdefault(label, reason)


def find_parts(program: Program, found: Survey) -> Parts:
    """Return where the parts of concatenations go.

    Args:
        program: A prepared program.
        found: What works on codes in it.
    """
    parts = Parts()
    for node in program.graph.nodes:
        form = found.forms.get(node)
        mixed = [n for n in node.all_input_nodes if n in parts.labels]
        if isinstance(form, Concat):
            _join(parts, node, form)
        elif not mixed or Meta(node).size is not None:
            continue
        elif form is None:
            parts.read += [(n, node) for n in mixed]
        else:
            _follow(parts, program, node, form, mixed)
    return parts


def _join(parts: Parts, node: fx.Node, form: Concat) -> None:
    """Enter what a concatenation makes, or a stack."""
    axis, operands = joined_axis(node), form.operands(node)
    across = [_raised(parts.of(n), node) for n in operands]
    other = {x.axis for x in across if x is not None and x.axis != axis}
    if len(other) == 1 and all(x is not None and x.axis in other for x in across):
        # The same parts, one behind the other: they stay apart along their own axis.
        reason = f"{node.name} puts them side by side"
        for same in zip(*(x.along for x in across if x is not None), strict=True):
            parts.unite(same, reason)
        assert across[0] is not None
        _enter(parts, node, across[0])
        return
    along: list[int] = []
    widths = joined_widths(node, operands)
    for index, (operand, inner, width) in enumerate(zip(operands, across, widths, strict=True)):
        if inner is not None and inner.axis == axis:
            along += inner.along
            continue
        if inner is not None:
            _together(parts, [operand], node)
        along += [parts.new(node, index)] * width
    _enter(parts, node, Labels(axis, tuple(along)))


def joined_axis(node: fx.Node) -> int:
    """Return the axis along which a concatenation or a stack joins."""
    return arguments(node)["dim"] % len(shape_of(node))


def joined_widths(node: fx.Node, operands: Sequence[fx.Node]) -> list[int]:
    """Return how wide each operand is along that axis, which a stack adds."""
    stacks = len(shape_of(operands[0])) < len(shape_of(node))
    return [1 if stacks else shape_of(n)[joined_axis(node)] for n in operands]


def _raised(labels: Labels | None, node: fx.Node) -> Labels | None:
    """Return an operand's labels by the axes of what it is joined to."""
    stacks = any(len(shape_of(n)) < len(shape_of(node)) for n in node.all_input_nodes)
    if labels is None or not stacks or labels.axis < joined_axis(node):
        return labels
    return Labels(labels.axis + 1, labels.along)


def _enter(parts: Parts, node: fx.Node, made: Labels | list[Labels]) -> None:
    """Note what a tensor holds; one that holds a single part is no mixture any more."""
    if isinstance(made, Labels) and len(set(parts.leaders(made)) - {NOTHING}) <= 1:
        parts.single[node] = made
    else:
        parts.labels[node] = made


def _together(parts: Parts, mixed: Sequence[fx.Node], reader: fx.Node) -> None:
    """Give all that is read here one factor."""
    labels = [x for n in mixed for x in _all(parts.labels[n])]
    parts.unite(labels, f"{op_name(reader)} reads them together: {where(reader)}")
    parts.read += [(n, reader) for n in mixed]


def _all(found: Labels | list[Labels]) -> list[int]:
    each = found if isinstance(found, list) else [found]
    return [x for labels in each for x in labels.along]


def _follow(
    parts: Parts, program: Program, node: fx.Node, form: IntegerForm, mixed: list[fx.Node]
) -> None:
    """Hand labels on to a node's result, or let its weights make up for factors, or neither."""
    if _absorbs(parts, node, form, mixed):
        parts.absorbed.append(node)
        return
    made = _handed_on(parts, program, node, form, mixed)
    if made is None:
        _together(parts, mixed, node)
    else:
        _enter(parts, node, made)


def _absorbs(parts: Parts, node: fx.Node, form: IntegerForm, mixed: list[fx.Node]) -> bool:
    """Whether a layer reads parts along the axis that it sums over."""
    if not isinstance(form, Layer):
        return False
    operand = form.operands(node)[0]
    labels = parts.of(operand)
    axis = 1 if form.spatial else len(shape_of(operand)) - 1
    return mixed == [operand] and labels is not None and labels.axis == axis


def columns(form: Layer, layer: LayerWeights, node: fx.Node, powers: Sequence[int]) -> Tensor:
    """Return by which power each element of a layer's weight meets its input, to broadcast.

    Args:
        form: The layer's form.
        layer: Its weights.
        node: The layer.
        powers: Per input channel.
    """
    per_input = torch.tensor(powers, dtype=torch.float64)
    shape = shape_of(layer.weight)
    if layer.axis == 1:  # [in, out, ...]
        return per_input.reshape(-1, *[1] * (len(shape) - 1))
    groups = arguments(node)["groups"] if form.spatial else 1
    each = per_input.reshape(groups, -1).repeat_interleave(shape[0] // groups, 0)
    return each.reshape(shape[0], -1, *[1] * (len(shape) - 2))


# ------------------------------------------------------------------ what a factor passes through


def _handed_on(
    parts: Parts, program: Program, node: fx.Node, form: IntegerForm, mixed: list[fx.Node]
) -> Labels | list[Labels] | None:
    """Return the labels of a node's result, or ``None`` where a factor does not pass."""
    if isinstance(form, Add):
        return _sum(parts, node, mixed)
    if len(mixed) != 1:
        return None
    labels = parts.labels[mixed[0]]
    if isinstance(form, Moves) and not isinstance(form, Padding | Relabel):
        return _moved(parts, program, node, mixed[0])
    if not isinstance(labels, Labels):
        return None
    if isinstance(form, Mul):
        return _broadcast(node, mixed[0], labels)
    if isinstance(form, Padding):
        return None if form.value(node) else _padded(node, labels)
    if isinstance(form, Mean):
        return _averaged(node, form, labels)
    # Windows are taken over the last axes, each index of the others for itself.
    beside = len(shape_of(node)) - getattr(form, "spatial", 0)
    return labels if form.homogeneous(node) and labels.axis < beside else None


def _sum(parts: Parts, node: fx.Node, mixed: list[fx.Node]) -> Labels | None:
    """Return the labels of a sum of tensors that hold the same parts in the same places."""
    found = [parts.of(n) for n in mixed]
    first = found[0]
    if len(mixed) != len(set(node.all_input_nodes)) or first is None:
        return None
    alike = all(
        x is not None and x.axis == first.axis and parts.leaders(x) == parts.leaders(first)
        for x in found
    )
    return first if alike and len({tuple(shape_of(n)) for n in mixed}) == 1 else None


def _broadcast(node: fx.Node, operand: fx.Node, labels: Labels) -> Labels | None:
    """Return the labels of a product with a tensor that holds no parts."""
    axis = labels.axis + len(shape_of(node)) - len(shape_of(operand))
    same = shape_of(node)[axis] == len(labels.along)
    return Labels(axis, labels.along) if same and node.all_input_nodes != [operand] else None


def _padded(node: fx.Node, labels: Labels) -> Labels:
    pads = arguments(node)["pad"]
    at = 2 * (len(shape_of(node)) - 1 - labels.axis)
    before, after = pads[at : at + 2] if at < len(pads) else (0, 0)
    along = list(labels.along)
    along = [NOTHING] * before + along[max(-before, 0) :]
    along = along[: len(along) + min(after, 0)] + [NOTHING] * after
    return Labels(labels.axis, tuple(along))


def _averaged(node: fx.Node, form: Mean, labels: Labels) -> Labels | None:
    axes = form.axes(node)
    if labels.axis in axes:
        return None
    gone = 0 if arguments(node)["keepdim"] else sum(a < labels.axis for a in axes)
    return Labels(labels.axis - gone, labels.along)


def _moved(
    parts: Parts, program: Program, node: fx.Node, operand: fx.Node
) -> Labels | list[Labels] | None:
    """Return the labels of what an operator moves, by running it on them."""
    held = parts.labels[operand]
    if isinstance(held, list):  # one of the results of a split
        return held[node.args[1]]  # type: ignore[index]
    given = held.tensor(shape_of(operand))
    found = []
    # Where the largest of a window is one label whatever their order, the window holds one alone.
    for sign in (1, -1):

        def value(n: fx.Node, sign: int = sign) -> Any:
            if n is operand:
                return sign * given
            return program.tensor(n) if n.op == "get_attr" else Meta(n).size

        args, kwargs = map_arg((node.args, node.kwargs), value)
        with torch.no_grad():
            made: Any = node.target(*args, **kwargs)  # type: ignore[operator]
        found.append(made if isinstance(made, tuple | list) else [made])
    if not all(torch.equal(a, -b) for a, b in zip(*found, strict=True)):
        return None
    results = [_along(parts, x) for x in found[0]]
    if any(x is None for x in results):
        return None
    return results if shape_of(node) is None else results[0]  # type: ignore[return-value]


def _along(parts: Parts, made: Tensor) -> Labels | None:
    """Return the labels of a tensor by one axis; ``None`` where they differ along several."""
    table = torch.tensor([parts.leader(x) for x in range(len(parts.sources) + 1)])
    led = table[made.long()]
    differs = [a for a in range(made.dim()) if bool((led != led.narrow(a, 0, 1)).any())]
    if len(differs) > 1 or not made.dim():
        return None
    axis = differs[0] if differs else 0
    line = made.movedim(axis, 0).flatten(1)[:, 0]
    return Labels(axis, tuple(line.long().tolist()))


__all__ = [
    "NOTHING", "Labels", "Parts", "columns", "find_parts", "joined_axis", "joined_widths",
]  # fmt: skip
