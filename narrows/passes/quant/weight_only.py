"""`quantize_weights`: the weights of linear layers in a few bits; all else stays floating-point.

For language models, whose speed and size are those of their weights. A scale and a zero point serve
a group of weights (`narrows.ir.integer.blocks`); along which axis groups lie is chosen layer by
layer, by the error of the layer's results (AdaDim, arXiv 2309.15531). Weights are rounded to the
nearest code, or one input after the other with the error made up for by those that follow (GPTQ,
arXiv 2210.17323).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from narrows.errors import PassError, PassUsageError
from narrows.ir.integer.blocks import Blocks, dequantize_blocks, round_blocks
from narrows.ir.meta import Meta, copy_meta, shape_of, where
from narrows.ir.ops import dialect
from narrows.ir.ops.args import arguments, changed
from narrows.ir.program import Note, Program
from narrows.passes.quant.batches import batches
from narrows.passes.quant.options import WeightOnly
from narrows.passes.quant.survey import SKIPPED, matches

DAMPING = 0.01  # of the mean of the diagonal, so that GPTQ's matrix has an inverse


@dataclass(frozen=True)
class Coded:
    """The codes of one weight, and what they cost.

    Attributes:
        blocks: How they are grouped.
        codes: uint8, ``[out, in]``.
        scale: float32, one per group.
        zero: uint8, one per group.
        error: The error of the layer's results, squared and summed over the data; of the weights
            themselves, without data.
    """

    blocks: Blocks
    codes: Tensor
    scale: Tensor
    zero: Tensor
    error: float

    @property
    def weight(self) -> Tensor:
        """The numbers that the codes stand for."""
        return dequantize_blocks(
            self.codes, self.scale, self.zero, self.blocks.axis, self.blocks.group
        )


def quantize_weights(program: Program, data: Iterable[Any] | None, options: WeightOnly) -> Program:
    """Return the program with coded weights; `narrows.quantize_weights` tells of the arguments."""
    options.check_data(data)
    bits, group = options.bits, options.group
    choices = [Blocks(bits, group, axis) for axis in options.axes]
    layers, notes = _layers(program, options.skip)
    if not layers:
        raise PassError(
            f"{program.name} has no linear layer to quantize",
            hint="narrows.quantize is for convolutions, with their activations",
        )
    moments = {} if data is None else _moments(program, layers, data)
    found = {}
    show = sys.stderr.isatty()
    for count, (name, nodes) in enumerate(layers.items(), start=1):
        if show:
            end = "\n" if count == len(layers) else ""
            print(f"\rweights: {count} of {len(layers)}", end=end, file=sys.stderr, flush=True)
        weight = program.weights[name].detach()
        tried = [_coded(weight, moments.get(name), b, options.method) for b in choices]
        found[name] = best = min(tried, key=lambda coded: coded.error)
        along = ("output channels", "inputs")[best.blocks.axis]
        text = f"{bits} bits, groups of {group} {along}"
        notes.append(Note(name, "weights", text, 0, Meta(nodes[0]).source))
    made = _rewritten(program, layers, found, options.activations == "dynamic")
    return made.replace(notes=(*made.notes, *notes))


def _layers(program: Program, skip: Sequence[str]) -> tuple[dict[str, list[fx.Node]], list[Note]]:
    """Return the linear layers by their weights, and notes on weights that stay."""
    layers: dict[str, list[fx.Node]] = {}
    notes: list[Note] = []
    unmatched = set(skip)
    for node in program.graph.nodes:
        if node.target is not dialect.LINEAR:
            continue
        weight = arguments(node)["weight"]
        globs = {glob for glob in skip if matches(node, glob)}
        unmatched -= globs
        if weight.op != "get_attr" or str(weight.target) in layers:
            continue
        name = str(weight.target)
        readers = program.users_of(name)
        others = [n for n in readers if n.target is not dialect.LINEAR]
        if globs or others:
            why = SKIPPED if globs else f"{others[0].name} reads it, too"
            notes.append(Note(name, "float", f"stays floating-point: {why}", 0, Meta(node).source))
            continue
        if not bool(program.weights[name].isfinite().all()):
            raise PassError(f"{name!r} holds NaN or infinity", where=where(node))
        layers[name] = readers
    if unmatched:
        raise PassUsageError(
            f"{min(unmatched)!r} matches no linear layer",
            hint="globs are held against node names, module paths and weight names",
        )
    return layers, notes


def _moments(
    program: Program, layers: dict[str, list[fx.Node]], data: Iterable[Any]
) -> dict[str, Tensor]:
    """Return ``sum x x^T`` of what every layer reads, in float64; ``[in, in]``."""
    reading: dict[fx.Node, list[str]] = {}
    for name, nodes in layers.items():
        for node in nodes:
            reading.setdefault(arguments(node)["input"], []).append(name)
    sums: dict[str, Tensor] = {}

    def observe(node: fx.Node, value: Any) -> None:
        for name in reading.get(node, ()):
            rows = value.detach().flatten(0, -2).double()
            moment = rows.T @ rows
            sums[name] = sums[name] + moment if name in sums else moment

    with torch.no_grad():
        for flat in batches(program, data, "calibrating"):
            program.run_flat(flat, observe=observe)
    for name, moment in sums.items():
        if not bool(moment.isfinite().all()):
            raise PassError("calibration met NaN or infinity", where=where(layers[name][0]))
    return sums


# ------------------------------------------------------------------ one weight


def _coded(weight: Tensor, moment: Tensor | None, blocks: Blocks, method: str) -> Coded:
    """Return a weight in codes, ``[out, in]``."""
    weight = weight.double()
    if method == "gptq":
        assert moment is not None
        codes, scale, zero = gptq(weight, moment, blocks)
    else:
        codes, scale, zero = nearest(weight, blocks)
    made = Coded(blocks, codes, scale, zero, 0.0)
    error = made.weight.double() - weight
    total = error.square() if moment is None else (error @ moment) * error
    return Coded(blocks, codes, scale, zero, float(total.sum()))


def nearest(weight: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nearest codes of a weight, the scales and the zero points."""
    parts = [_part(part, blocks) for part in _cut(weight, blocks)]
    codes, scale, zero = (torch.cat(list(side), blocks.axis) for side in zip(*parts, strict=True))
    return codes, scale, zero


def _cut(weight: Tensor, blocks: Blocks) -> Iterator[Tensor]:
    yield from weight.split(blocks.group, blocks.axis)


def _part(part: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and zero points of a part that is one group long."""
    scale, zero = blocks.scales(part.movedim(blocks.axis, -1))
    scale, zero = scale.unsqueeze(blocks.axis), zero.unsqueeze(blocks.axis)
    return blocks.codes(part, scale, zero), scale, zero


def gptq(weight: Tensor, moment: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and zero points by GPTQ.

    Input by input, the error of what was rounded is taken from the weights of the inputs that
    follow, as the second moments of the inputs say.

    Args:
        weight: float64, ``[out, in]``.
        moment: ``sum x x^T``, ``[in, in]``.
        blocks: How they are grouped.
    """
    left, width = weight.clone(), weight.shape[1]
    upper = _inverse_factor(moment)
    codes = torch.zeros_like(weight, dtype=torch.uint8)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    for i in range(width):
        column = left[:, i : i + 1]
        if blocks.axis == 0:
            codes[:, i : i + 1], scale, zero = nearest(column, blocks)
            scales.append(scale)
            zeros.append(zero)
        else:
            if i % blocks.group == 0:
                _, scale, zero = _part(left[:, i : i + blocks.group], blocks)
                scales.append(scale)
                zeros.append(zero)
            codes[:, i : i + 1] = blocks.codes(column, scales[-1], zeros[-1])
        rounded = dequantize_blocks(
            codes[:, i : i + 1], scales[-1], zeros[-1], blocks.axis, blocks.group
        )
        error = (column - rounded) / upper[i, i]
        left[:, i + 1 :] -= error @ upper[i : i + 1, i + 1 :]
    return codes, torch.cat(scales, 1), torch.cat(zeros, 1)


def _inverse_factor(moment: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped second moments."""
    diagonal = moment.diagonal()
    damping = max(float(diagonal.mean()) * DAMPING, 1e-12)
    damped = moment + torch.diag(torch.where(diagonal > 0, damping, 1.0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


# ------------------------------------------------------------------ the program


def _rewritten(
    program: Program, layers: dict[str, list[fx.Node]], found: dict[str, Coded], dynamic: bool
) -> Program:
    """Return the program that reads codes; of what weights multiply, too, if ``dynamic``."""
    result = program.copy()
    rounded: dict[tuple[fx.Node, int], fx.Node] = {}
    weights = {n: t for n, t in program.weights.items() if n not in found}
    for name, coded in found.items():
        (old, *_) = (n for n in result.graph.nodes if n.op == "get_attr" and n.target == name)
        parts: list[fx.Node] = []
        for part in ("codes", "scale", "zero"):
            tensor = getattr(coded, part)
            key = f"{name}.{part}"
            weights[key] = tensor
            with result.graph.inserting_before(old):
                node = result.graph.get_attr(key)
            Meta(node).shape, Meta(node).dtype = tuple(tensor.shape), tensor.dtype
            parts.append(node)
        args = (*parts, coded.blocks.axis, coded.blocks.group)
        with result.graph.inserting_before(old):
            made = result.graph.create_node(
                "call_function", dequantize_blocks, args, name=f"{old.name}_float"
            )
        copy_meta(old, made)
        Meta(made).shape, Meta(made).dtype = shape_of(old), Meta(old).dtype
        for reader in [n for n in result.graph.nodes if n.target is dialect.LINEAR]:
            if str(getattr(arguments(reader)["weight"], "target", "")) == name:
                reader.args, reader.kwargs = changed(reader, {"weight": made})
                if dynamic:
                    x = _rounded(arguments(reader)["input"], coded.blocks.group, rounded)
                    reader.args, reader.kwargs = changed(reader, {"input": x})
    for node in [n for n in result.graph.nodes if n.op == "get_attr" and not n.users]:
        result.graph.erase_node(node)
    added = {n for n in weights if n not in program.weights}
    return result.seal().replace(
        weights=weights,
        buffers=program.buffers | added,
        stored=program.stored & weights.keys(),
        aliases={a: n for a, n in program.aliases.items() if n in weights},
        origins={n: o for n, o in program.origins.items() if n in weights},
    )


def _rounded(x: fx.Node, group: int, known: dict[tuple[fx.Node, int], fx.Node]) -> fx.Node:
    """Return what a layer multiplies once it is rounded; layers that read the same share it."""
    if (x, group) not in known:
        first = next(n for n in x.graph.nodes if n.op == "call_function")
        called = x.op == "call_function"
        with x.graph.inserting_after(x) if called else x.graph.inserting_before(first):
            made = x.graph.create_node(
                "call_function", round_blocks, (x, group), name=f"{x.name}_rounded"
            )
        copy_meta(x, made)
        known[x, group] = made
    return known[x, group]


__all__ = ["quantize_weights"]
