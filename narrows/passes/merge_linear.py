"""`MergeLinear`: two convolutions, or two linear layers, with nothing between them become one.

With strides ``s``, dilations ``d`` and kernels of sizes ``k``, position ``u`` of the second kernel
and ``v`` of the first meet at one of the merged kernel (Fu et al., DepthShrinker, ICML 2022; Kim
et al., Efficient latency-aware CNN depth compression via two-stage dynamic programming, ICML
2023)::

    (W2 * (W1 * x + b1)) + b2  =  W * x + (sum_u W2[u] b1 + b2)
    W[u d2 s1 + v d1] = sum over all such u, v of W2[u] W1[v]
    size (k2 - 1) d2 s1 + (k1 - 1) d1 + 1, stride s1 s2

What the first one pads with zeros the merged one pads as well. What the second one pads with zeros
would have been computed from the first one's padding and its bias: that is zero, too, where the
first one has no bias and is padded by all of its kernel but one position (or has only one).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from narrows.ir.editing import add_weight, drop_unread
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops import dialect, table
from narrows.ir.ops.args import arguments
from narrows.ir.program import Draft, Note, Program
from narrows.passes.base import Fidelity, Pass, PassResult
from narrows.passes.fold_batch_norm import layer_row, unfit

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class MergeLinear(Pass):
    """Merges each layer into the one of its kind that alone reads it, where that is exact.

    Batch norms between are in the way until they are folded: ``fold-batch-norm, merge-linear``. A
    pair stays, with a note that says why, where it would not compute the same, or more: two 3x3
    convolutions multiply less than the 5x5 that they are.

    Attributes:
        larger: Whether to merge pairs, too, whose merged layer multiplies more than both do.
    """

    name: ClassVar[str] = "merge-linear"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    larger: bool = False

    def run(self, program: Program) -> PassResult:
        """Return the program with its pairs merged."""
        result = program.copy()
        notes, remarks = [], {}
        for second in list(result.graph.nodes):
            first = _before(second)
            if first is None:
                continue
            note = _obstacle(result, first, second, self.larger)
            if note is not None:
                notes.append(note)
                continue
            remarks[second.name] = f"merged {first.name}"
            _merge(result, first, second)
        return PassResult(result if remarks else program, bool(remarks), tuple(notes), {}, remarks)


@dataclass(frozen=True)
class Window:
    """How a convolution moves over its input, an entry per axis; a linear layer has none."""

    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes

    @property
    def extent(self) -> Sizes:
        """How many positions of the input it spans."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    def then(self, other: Window) -> Window:
        """Return that of this one and another after it; dilations are in the kernel."""
        rows = zip(
            self.extent, other.extent, self.stride, other.stride, self.padding, other.padding,
            strict=True,
        )  # fmt: skip
        found = [((e2 - 1) * s1 + e1, s1 * s2, p1 + p2 * s1, 1) for e1, e2, s1, s2, p1, p2 in rows]
        kernel, stride, padding, dilation = zip(*found, strict=True) if found else ((), (), (), ())
        return Window(kernel, stride, padding, dilation)


def merged(first: Tensor, second: Tensor, one: Window, two: Window) -> Tensor:
    """Return the weight of two layers in a row, ``[outputs, inputs, ...]`` in float64.

    Args:
        first: The first one's weight, ``[middle, inputs, ...]``.
        second: The other's, ``[outputs, middle, ...]``.
        one: How the first one moves.
        two: How the other does.
    """
    a, b = first.detach().double(), second.detach().double()
    result = a.new_zeros(len(b), a.shape[1], *one.then(two).kernel)
    for u in itertools.product(*map(range, two.kernel)):
        starts = [i * d * s for i, d, s in zip(u, two.dilation, one.stride, strict=True)]
        place = tuple(
            slice(start, start + extent, d)
            for start, extent, d in zip(starts, one.extent, one.dilation, strict=True)
        )
        result[(slice(None), slice(None), *place)] += torch.einsum(
            "om,mi...->oi...", b[(..., *u)], a
        )
    return result


def _before(second: fx.Node) -> fx.Node | None:
    """Return the layer of its kind that feeds a layer directly."""
    row = table.layer_of(second)
    if row is None:
        return None
    first = arguments(second)[row.x]
    before = table.layer_of(first) if isinstance(first, fx.Node) else None
    return first if before is not None and before.spatial == row.spatial else None


def _obstacle(program: Program, first: fx.Node, second: fx.Node, larger: bool) -> Note | None:
    """Return why two layers cannot be merged, or ``None``."""

    def note(reason: str, message: str) -> Note:
        return Note(second.name, reason, f"not merged: {message}", 0, Meta(second).source)

    if any(user is not second for user in first.users):
        return note("branch", f"the output of {first.name} is also read elsewhere")
    for layer in (first, second):
        row, given = layer_row(layer), arguments(layer)
        if row.transposed or (row.out_axis, row.in_axis) != (0, 1):
            return note("transposed", f"the weight of {layer.name} is transposed")
        if given.get("groups", 1) != 1:
            return note("groups", f"{layer.name} has groups")
        why = unfit(layer, row)
        if why is not None:
            return note(*why)
        if _window(layer) is None:
            return note("padding", f"{layer.name} pads one side more than the other")
    one, two = _window(first), _window(second)
    assert one is not None
    assert two is not None
    full = all(p >= e - 1 for p, e in zip(one.padding, one.extent, strict=True))
    if any(two.padding) and not (full and not _bias(program, first).any()):
        return note(
            "padding", f"{second.name} pads with zeros what {first.name} would not make zero"
        )
    inputs, outputs = (_weight(program, n).shape[i] for n, i in ((first, 1), (second, 0)))
    both = sum(_weight(program, n).numel() * _positions(n) for n in (first, second))
    alone = outputs * inputs * math.prod(one.then(two).kernel) * _positions(second)
    if alone > both and not larger:
        return note(
            "larger", f"with {first.name} it would multiply {alone / both:.2f} times as much"
        )
    return None


def _merge(program: Draft, first: fx.Node, second: fx.Node) -> None:
    """Merge the first layer into the second."""
    row, given = layer_row(second), arguments(second)
    one, two = _window(first), _window(second)
    assert one is not None
    assert two is not None
    a, b = _weight(program, first), _weight(program, second)
    weight = merged(a, b, one, two)
    taps = b.detach().double().flatten(2).sum(2) if b.dim() > 2 else b.detach().double()
    bias = _bias(program, second) + taps @ _bias(program, first)
    name = str(given[row.weight].target)
    stem, _, leaf = name.rpartition(".")
    path = ".".join(filter(None, (stem, "merged")))
    made = add_weight(program, f"{path}_{leaf}", weight.to(b.dtype))
    shift = add_weight(program, f"{path}_bias", bias.to(b.dtype))
    sources = [*first.all_input_nodes, *second.all_input_nodes]
    x = arguments(first)[layer_row(first).x]
    window = one.then(two)
    if row.spatial:
        sizes = [list(s) for s in (window.stride, window.padding, window.dilation)]
        second.target = dialect.CONVOLUTION[row.spatial + 2]
        second.args, second.kwargs = (x, made, shift, *sizes, 1), {}
    else:
        second.args, second.kwargs = (x, made, shift), {}
    program.graph.erase_node(first)
    drop_unread(program, sources)


def _window(layer: fx.Node) -> Window | None:
    """Return how a layer moves; ``None`` where it pads one side more than the other."""
    row, given = layer_row(layer), arguments(layer)
    count = row.spatial
    if not count:
        return Window((), (), (), ())
    kernel = tuple(int(s) for s in shape_of(given[row.weight])[2:])
    stride, dilation = (_sizes(given.get(n, 1), count) for n in ("stride", "dilation"))
    padding = given.get("padding", 0)
    if isinstance(padding, str):
        whole = [(k - 1) * d if padding == "same" else 0
                 for k, d in zip(kernel, dilation, strict=True)]  # fmt: skip
        if any(w % 2 for w in whole):
            return None
        padding = [w // 2 for w in whole]
    return Window(kernel, stride, _sizes(padding, count), dilation)


def _sizes(given: int | list[int] | tuple[int, ...], count: int) -> Sizes:
    found = (given,) if isinstance(given, int) else tuple(given)
    return found * count if len(found) == 1 else found


def _weight(program: Program, layer: fx.Node) -> Tensor:
    return program.tensor(arguments(layer)[layer_row(layer).weight])


def _bias(program: Program, layer: fx.Node) -> Tensor:
    """Return a layer's bias in float64, zeros where it has none."""
    node = arguments(layer)[layer_row(layer).bias]
    weight = _weight(program, layer)
    if node is None:
        return torch.zeros(len(weight), dtype=torch.float64)
    return program.tensor(node).detach().double()


def _positions(layer: fx.Node) -> int:
    """Return at how many positions of the example a layer computes its channels."""
    shape, spatial = shape_of(layer), layer_row(layer).spatial
    channels = shape[-1 - spatial]
    return math.prod(shape) // channels


__all__ = ["MergeLinear", "Window", "merged"]
