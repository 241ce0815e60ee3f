"""`FoldBatchNorm`: a batch norm in eval mode becomes part of the convolution before it.

With ``scale = gamma / sqrt(var + eps)``, one number per output channel::

    norm(W x + b) = (scale W) x + (scale (b - mean) + beta)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from narrows.ir.editing import drop_unread
from narrows.ir.meta import Meta, copy_meta, shape_of
from narrows.ir.ops import table
from narrows.ir.ops.args import arguments, changed
from narrows.ir.ops.contract import Contract
from narrows.ir.program import Draft, Note, Program
from narrows.ir.structure.computed import settled
from narrows.passes.base import Fidelity, Pass, PassResult

BLOCK = 1 << 18  # elements of a weight that are scaled at a time


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Folds each batch norm into the convolution or linear layer that alone feeds it.

    The folded weights stand under their old names; a bias that was missing becomes
    ``<module>.bias``. A norm stays, with a note that says why, where its producer's output or
    weights are used elsewhere, too. A norm that no such layer feeds stays without a note.
    """

    name: ClassVar[str] = "fold-batch-norm"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def run(self, program: Program) -> PassResult:
        """Return the program with its batch norms folded."""
        result, folds, notes = fold(program)
        remarks = {f.layer: f"folded {f.norm}" for f in folds}
        return PassResult(result, bool(folds), notes, remarks=remarks)


@dataclass(frozen=True)
class Fold:
    """A norm that was folded.

    Attributes:
        norm: The name of its node.
        layer: The name of the layer's node that it became part of.
        bias: The name of that layer's bias afterwards.
    """

    norm: str
    layer: str
    bias: str


def fold(program: Program) -> tuple[Program, tuple[Fold, ...], tuple[Note, ...]]:
    """Return the program with its batch norms folded, what was, and why others were not."""
    norms = [n.name for n in program.graph.nodes if _feeds_norm(n)]
    if not norms:
        return program, (), ()
    result = settled(program).copy()
    by_name = {n.name: n for n in result.graph.nodes}
    folds, notes = [], []
    for name in norms:
        note = _obstacle(by_name[name])
        if note is None:
            layer = _fold(result, by_name[name])
            folds.append(
                Fold(name, layer.name, str(arguments(layer)[layer_row(layer).bias].target))
            )
        else:
            notes.append(note)
    if not folds:
        return program, (), tuple(notes)
    result.folded = (*program.folded, *(f.norm for f in folds))
    return result.seal(), tuple(folds), tuple(notes)


def _feeds_norm(node: fx.Node) -> bool:
    """Whether ``node`` is a batch norm over a layer that it could fold into."""
    if not table.is_affine(node):
        return False
    before = arguments(node)["input"]
    while table.is_affine(before):
        before = arguments(before)["input"]  # norms in a row fold one after the other
    return table.layer_of(before) is not None


def _obstacle(norm: fx.Node) -> Note | None:
    """Return why ``norm`` cannot be folded, or ``None``."""
    given = arguments(norm)
    layer = given["input"]

    def note(reason: str, message: str) -> Note:
        return Note(norm.name, reason, f"not folded: {message}", 0, Meta(norm).source)

    row = table.layer_of(layer)
    if row is None:
        return note("norm", f"{layer.name} before it was not folded")
    if given["training"] or given["running_mean"] is None or given["running_var"] is None:
        return note("training", "it normalises by the statistics of its input")
    if any(user is not norm for user in layer.users):
        others = [user for user in layer.users if user is not norm]
        return note("branch", f"the output of {layer.name} is also read by {_named(others)}")
    rank = len(shape_of(layer) or ())
    if rank != row.spatial + 2:
        return note("axis", f"it normalises another axis than the output channels of {layer.name}")
    why = unfit(layer, row)
    if why is not None:
        return note(*why)
    for role in ("weight", "bias", "running_mean", "running_var"):
        source = given[role]
        if source is not None and source.op != "get_attr":
            return note("computed", f"its {role} is computed by {source.name}")
    return None


def unfit(layer: fx.Node, row: Contract) -> tuple[str, str] | None:
    """Return why a layer's weight and bias cannot take others' numbers: a note's reason and
    message."""
    for role, argument in (("weight", row.weight), ("bias", row.bias)):
        why = _held(layer, role, argument)
        if why is not None:
            return why
    given = arguments(layer)
    bias = given[row.bias]
    vector = bias is None or len(shape_of(bias)) == 1
    if vector and given.get("alpha", 1) == 1 and given.get("beta", 1) == 1:
        return None  # W x + b with one number of b per channel; addmm may be more
    return "bias", f"{layer.name} multiplies its terms, or its bias is no vector"


def _held(layer: fx.Node, role: str, argument: str) -> tuple[str, str] | None:
    """Return why a tensor of a layer stays as it is."""
    source = arguments(layer)[argument]
    if source is None:
        return None
    if source.op != "get_attr":
        return "computed", f"the {role} of {layer.name} is computed by {source.name}"
    readers = [u for u in source.users if u is not layer]
    uses = sum(a is source for a in arguments(layer).values())
    if readers:
        return "shared", f"{source.target} is also read by {_named(readers)}"
    return None if uses == 1 else ("shared", f"{layer.name} reads {source.target} twice")


def _named(nodes: Sequence[fx.Node]) -> str:
    """Return the names of some nodes, of many of them the first three."""
    names = [node.name for node in nodes]
    rest = names[3:]
    return ", ".join(names) if len(rest) < 2 else f"{', '.join(names[:3])} and {len(rest)} more"


def _fold(program: Draft, norm: fx.Node) -> fx.Node:
    """Fold ``norm`` into the layer before it, which is returned."""
    layer = arguments(norm)["input"]
    row, given = layer_row(layer), arguments(layer)
    weight_node, bias_node = given[row.weight], given[row.bias]
    weight = program.tensor(weight_node)
    parts = parts_of(program, norm)
    bias = torch.zeros_like(parts.mean) if bias_node is None else _double(program, bias_node)
    shifted = (bias - parts.mean) * parts.scale + parts.shift

    name = str(weight_node.target)
    program.weights[name] = scaled(layer, weight, parts.scale)
    if bias_node is None:
        bias_node = _add_bias(program, layer, name, weight.dtype, shifted)
        layer.args, layer.kwargs = changed(layer, {row.bias: bias_node})
    program.weights[str(bias_node.target)] = shifted.to(weight.dtype)

    norm.replace_all_uses_with(layer)
    sources = norm.all_input_nodes
    program.graph.erase_node(norm)
    drop_unread(program, sources)
    return layer


def layer_row(layer: fx.Node) -> Contract:
    """Return the row of a layer that a norm folds into."""
    row = table.layer_of(layer)
    assert row is not None
    return row


def _double(program: Program, node: fx.Node) -> Tensor:
    return program.tensor(node).detach().double()


@dataclass(frozen=True)
class Parts:
    """What a norm computes, per channel in float64: ``(x - mean) * gain / deviation + shift``.

    In float64 a fold rounds once: when its result is stored.
    """

    gain: Tensor
    shift: Tensor
    mean: Tensor
    deviation: Tensor

    @property
    def scale(self) -> Tensor:
        """What a channel is multiplied by."""
        return self.gain / self.deviation


def parts_of(program: Program, norm: fx.Node) -> Parts:
    """Return what a batch norm with fixed statistics computes."""
    given = arguments(norm)
    variance = _double(program, given["running_var"])

    def of(role: str, default: float) -> Tensor:
        node = given[role]
        return torch.full_like(variance, default) if node is None else _double(program, node)

    deviation = torch.sqrt(variance + given["eps"])
    return Parts(of("weight", 1.0), of("bias", 0.0), of("running_mean", 0.0), deviation)


def scaled(layer: fx.Node, weight: Tensor, scale: Tensor) -> Tensor:
    """Return the weight with every output channel multiplied by its scale in float64.

    It is rounded once, and some rows at a time: a whole copy in float64 is twice its size.
    """
    weight, rows = weight.detach(), len(weight)
    # [in, out / groups, ...]: the g-th block of input channels makes the g-th block of outputs.
    # Else every row is an output channel.
    groups = arguments(layer).get("groups", 1) if layer_row(layer).out_axis else rows
    factors = scale.view(groups, -1, *[1] * (weight.dim() - 2))
    step = max(1, BLOCK * rows // max(1, weight.numel()))
    made = torch.empty_like(weight)
    for start in range(0, rows, step):
        part = torch.arange(start, min(start + step, rows))
        made[part] = (weight[part].double() * factors[part * groups // rows]).to(made.dtype)
    return made


def _add_bias(
    program: Draft, layer: fx.Node, weight: str, dtype: torch.dtype, bias: Tensor
) -> fx.Node:
    """Give ``layer`` a bias that it did not have and return its node; the tensor is set later."""
    path, _, leaf = weight.rpartition(".")
    base = ".".join(filter(None, (path, "bias" if leaf == "weight" else f"{leaf}_bias")))
    taken = {*program.weights, *program.aliases}
    name, count = base, 1
    while name in taken:
        name, count = f"{base}_{count}", count + 1
    with program.graph.inserting_before(layer):
        node = program.graph.get_attr(name)
    copy_meta(layer, node)
    Meta(node).dynamic = ()
    Meta(node).shape, Meta(node).dtype = tuple(bias.shape), dtype
    return node
