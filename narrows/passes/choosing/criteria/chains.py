"""What follows a layer before its channels meet others: its norm, its activation."""

from __future__ import annotations

from torch import Tensor, fx

from narrows.ir.meta import shape_of
from narrows.ir.ops import table
from narrows.ir.ops.args import arguments, first_tensor, is_tensor
from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer
from narrows.passes.fold_batch_norm import Parts, parts_of


def after(layer: Layer) -> list[fx.Node]:
    """Return the nodes after a layer that do the same to each of its channels, first one first.

    The chain ends before a second reader, another layer, a move of channels or a second operand
    that is no weight. The last node holds a channel as the rest of the network sees it.
    """
    chain, node = [], layer.node
    while len(node.users) == 1:
        (user,) = node.users
        if not _alone(user, node):
            break
        chain.append(user)
        node = user
    return chain


def before(layer: Layer) -> list[fx.Node]:
    """Return the nodes before a layer that do the same to each channel it reads, last one first."""
    chain, node = [], layer.x
    while node is not None and node.op == "call_function":
        read = [n for n in node.all_input_nodes if is_tensor(n) and n.op != "get_attr"]
        if len(read) != 1 or not _alone(node, read[0]):
            break
        chain.append(node)
        node = read[0]
    return chain


def _alone(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node hands the channels of ``source`` on, and reads weights beside it at most."""
    row = table.find(node)
    if row is None or row.makes_channels or not row.passes_on or shape_of(node) != shape_of(source):
        return False
    return all(n is source or n.op == "get_attr" or not is_tensor(n) for n in node.all_input_nodes)


def batch_norm(layer: Layer, side: str) -> fx.Node | None:
    """Return the batch norm right after what makes a channel, or before what reads it, if any.

    It scales the axis of the layer's channels, by statistics that are fixed.
    """
    axis = layer.y_axis if side == "outputs" else layer.contraction and layer.contraction.x_axis
    for node in after(layer) if side == "outputs" else before(layer):
        if table.is_affine(node):
            return node if axis == 1 and _settled(node) else None
    return None


def _settled(norm: fx.Node) -> bool:
    given = arguments(norm)
    roles = ("weight", "bias", "running_mean", "running_var")
    nodes = [given[role] for role in roles if given[role] is not None]
    fixed = given["running_var"] is not None and not given["training"]
    return fixed and all(n.op == "get_attr" for n in nodes)


def gain(program: Program, norm: fx.Node) -> Tensor | None:
    """Return the magnitudes of a batch norm's gains in float64; ``None`` if it has none."""
    node = arguments(norm)["weight"]
    return None if node is None else program.tensor(node).detach().double().abs()


def folded(program: Program, layer: Layer) -> Parts | None:
    """Return what the batch norm after a layer does to its channels; ``None`` without one."""
    norm = batch_norm(layer, "outputs")
    fits = norm is not None and first_tensor(norm) is layer.node
    return parts_of(program, norm) if fits and norm is not None else None
