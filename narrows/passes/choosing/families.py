"""`Family`: channels that a layer reads, each as what it is made of, so that they can be compared.

Without data, all that is known of a channel is its filter: the numbers that its input is multiplied
with, the norm behind it folded in. A *family* are the channels of one coupling in one layer that
differ in nothing but their filters: the same layers make them, and what lies between does the same
to each. One of them may stand for another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from narrows.ir.labels import Bools, Ints
from narrows.ir.ops import table
from narrows.ir.ops.args import is_tensor
from narrows.ir.program import Note, Program
from narrows.passes.choosing.criteria.chains import batch_norm
from narrows.passes.choosing.products import Product
from narrows.passes.choosing.reads import Reads
from narrows.passes.fold_batch_norm import parts_of


@dataclass(frozen=True, eq=False)
class Family:
    """Channels of a layer's input that may stand for one another.

    Attributes:
        layer: The layer, by number.
        reads: The reads that they are.
        makers: Per read its makers, in execution order; of the same layers for all.
        columns: Per read the layer's input channels, one after another for each that it is.
        there: Per read whether it is kept.
        filters: What each is multiplied from, ``[reads, numbers]``, float64.
        constants: What is added, ``[reads, places]``, float64.
        settled: Whether a norm lies between, whose scale and shift are in the filters.
    """

    layer: int
    reads: Ints
    makers: tuple[tuple[int, ...], ...]
    columns: Ints
    there: Bools
    filters: Tensor
    constants: Tensor
    settled: bool

    def added(self, product: Product, matrix: Tensor, source: Tensor, shares: Tensor) -> None:
        """Add what read the dropped channels to what reads the kept ones, in place.

        Args:
            product: The layer.
            matrix: Its weights, ``[groups, outputs, columns + 1]``, changed.
            source: Its weights before anything was dropped.
            shares: How much of each dropped one (rows) every kept one (columns) stands for.
        """
        kept, gone = self.columns[self.there], self.columns[~self.there]
        for at in range(self.columns.shape[1]):  # each in its group of the layer
            into, out_of = places(product, kept[:, at]), places(product, gone[:, at])
            group, columns = out_of
            moved = source[group[:, None], :, columns]  # [gone, taps, outputs]
            summed = torch.einsum("gk,gto->kto", shares, moved)
            group, columns = into
            matrix[group[:, None], :, columns] += summed


def places(product: Product, channels: Ints) -> tuple[Tensor, Tensor]:
    """Return groups ``[n]`` and columns ``[n, taps]`` of a layer's matrix for input channels."""
    group, own = np.divmod(channels, product.inputs)
    columns = own[:, None] * product.taps + np.arange(product.taps)
    return torch.as_tensor(group), torch.as_tensor(columns)


def families_of(
    program: Program, reads: Reads, there: Bools, *, together: bool = False
) -> tuple[list[Family], list[Note]]:
    """Return the families of which some channels are gone, and which channels have none.

    Args:
        program: The program, prepared.
        reads: Its reads.
        there: Per read whether it is there.
        together: Whether a channel is described by the layers that make its coupling anywhere, side
            by side, rather than by those that make what this layer reads. It is the same for all
            readers then.
    """
    found: list[Family] = []
    notes: list[Note] = []
    own_makers, all_makers = _makers(reads)
    for j, product in enumerate(reads.products):
        own = reads.of_layer[j]
        if there[own].all():
            continue
        why = _obstacle(reads, j)
        for group in _alike(reads, own, own_makers) if not why else ():
            if there[group].all() or not there[group].any():
                continue
            keys = [(int(reads.tie[r]), int(reads.channel[r])) for r in group]
            makers = [all_makers[k] for k in keys] if together else [own_makers[r] for r in group]
            family = _family(program, reads, j, group, makers, there, joined=together)
            if family is None:
                why = "a depthwise layer makes them of the network's input"
            else:
                found.append(family)
        if why:
            text = f"what {product.layer.weight!r} does not read is not made up for: {why}"
            notes.append(Note(product.layer.node.name, "no family", text))
    return found, notes


def _makers(
    reads: Reads,
) -> tuple[dict[int, tuple[int, ...]], dict[tuple[int, int], tuple[int, ...]]]:
    """Return the makers of every read, and those of every channel of every coupling."""
    of_read: dict[int, set[int]] = {}
    of_channel: dict[tuple[int, int], set[int]] = {}
    for read, maker in reads.pairs.T.tolist():
        of_read.setdefault(read, set()).add(maker)
        of_channel.setdefault((int(reads.tie[read]), int(reads.channel[read])), set()).add(maker)

    def order(makers: set[int]) -> tuple[int, ...]:
        return tuple(sorted(makers, key=lambda m: int(reads.maker_layer[m])))

    return (
        {r: order(m) for r, m in of_read.items()},
        {c: order(m) for c, m in of_channel.items()},
    )


def _alike(reads: Reads, own: Ints, makers: dict[int, tuple[int, ...]]) -> Iterator[Ints]:
    """Yield a layer's reads that are of one coupling, and made by the same layers."""
    groups: dict[object, list[int]] = {}
    for read in own.tolist():
        if made := makers.get(read):
            sizes = tuple((int(reads.maker_layer[m]), len(reads.rows[m])) for m in made)
            groups.setdefault((reads.tie[read], len(reads.columns[read]), sizes), []).append(read)
    yield from (np.array(group, dtype=np.int64) for group in groups.values())


def _obstacle(reads: Reads, j: int) -> str:
    """Return what lies before a layer that does not do the same to each channel, or nothing."""
    layers = {p.layer.node: p for p in reads.products}
    todo, seen = [reads.products[j].contraction.x], set()
    while todo:
        node = todo.pop()
        if node in seen or node.op == "get_attr":
            continue
        seen.add(node)
        product = layers.get(node)
        if product is not None and not product.depthwise:
            continue
        if node.op == "placeholder":
            return "they are an input of the network"
        row = table.find(node)
        same = row is not None and (row.passes_on or row.rearranges or row.concatenates)
        if product is None and not same:
            return f"{node.name} lies between, in which channels meet"
        read = node.all_input_nodes
        todo += [n for n in read if is_tensor(n) or table.find(n) is not None]
    return ""


def _family(
    program: Program,
    reads: Reads,
    j: int,
    group: Ints,
    makers: Sequence[tuple[int, ...]],
    there: Bools,
    *,
    joined: bool,
) -> Family | None:
    """Return a family; ``None`` where nothing says what its channels are made of."""
    filters: Tensor | None = None
    constants: Tensor | None = None
    for made in zip(*makers, strict=True):
        product = reads.products[reads.maker_layer[made[0]]]
        rows = torch.as_tensor(np.stack([reads.rows[m] for m in made]))  # [reads, each]
        weights, bias = _rows(program, product, rows)
        if product.depthwise and not joined:
            if filters is None or constants is None:
                return None
            constants = weights.sum(2) * constants.mean(1, keepdim=True) + bias
            filters = (weights[..., None] * filters[:, None, None]).flatten(1)
            continue
        weights = weights.flatten(1)
        filters = weights if filters is None else torch.cat([filters, weights], 1)
        fits = constants is not None and constants.shape == bias.shape
        constants = constants + bias if fits and constants is not None else bias
    if filters is None or constants is None:
        return None
    columns = np.stack([reads.columns[r] for r in group])
    norm = batch_norm(reads.products[j].layer, "inputs")
    if norm is not None and columns.shape[1] == 1 and not joined:
        parts = parts_of(program, norm)
        scale, shift = parts.scale[columns[:, 0]], parts.shift[columns[:, 0]]
        filters = filters * scale[:, None]
        constants = (constants - parts.mean[columns[:, 0]][:, None]) * scale[:, None]
        constants = constants + shift[:, None]
    return Family(
        j, group, tuple(makers), columns, there[group], filters, constants, norm is not None
    )


def _rows(program: Program, product: Product, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs of a layer as filters ``[reads, each, numbers]``, and biases.

    Outputs of different groups read different channels: their numbers stand at different places.
    """
    bias = program.weights[product.bias] if product.bias else None
    matrix = product.matrix(program.weights[product.layer.weight], bias)
    group, own = rows // product.outputs, rows % product.outputs
    picked = matrix[group, own]
    weights, added = picked[..., :-1], picked[..., -1]
    if product.groups == 1 or product.depthwise:
        return weights, added
    apart = weights.new_zeros(*weights.shape[:2], product.groups, weights.shape[2])
    apart.scatter_(2, group[..., None, None].expand(*group.shape, 1, weights.shape[2]),
                   weights[:, :, None])  # fmt: skip
    return apart.flatten(2), added


__all__ = ["Family", "families_of", "places"]
