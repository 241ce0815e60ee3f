"""Random unconstrained masks over the weights of a captured program."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import fx

from narrows.ir.program import Program

aten = torch.ops.aten
Masks = dict[str, tuple[int, ...]]

CONVOLUTIONS = {
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
}  # fmt: skip
TRANSPOSED = {
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
}  # fmt: skip
PRODUCTS = {aten.matmul.default}


@dataclass(frozen=True)
class Contraction:
    """A weight that a program contracts with, and how many channels go in and out."""

    weight: str
    inputs: int
    outputs: int


def _groups(node: fx.Node, position: int) -> int:
    value = node.kwargs.get("groups", node.args[position] if len(node.args) > position else 1)
    assert isinstance(value, int)
    return value


def contraction(program: Program, node: fx.Node) -> Contraction | None:
    """Return what a convolution, linear or matmul contracts with, if it reads a weight directly."""
    if node.op != "call_function" or len(node.args) < 2:
        return None
    read = node.args[1]
    if not isinstance(read, fx.Node) or read.op != "get_attr":
        return None
    name = str(read.target)
    shape = tuple(program.weights[name].shape)
    if node.target in CONVOLUTIONS:
        return Contraction(name, shape[1] * _groups(node, 6), shape[0])
    if node.target in TRANSPOSED:
        return Contraction(name, shape[0], shape[1] * _groups(node, 6))
    if node.target is aten.linear.default:
        return Contraction(name, shape[1], shape[0])
    if node.target in PRODUCTS and len(shape) == 2:
        return Contraction(name, shape[0], shape[1])
    return None


def contractions(program: Program) -> list[Contraction]:
    """Return what the program contracts with, each weight once."""
    found: dict[str, Contraction] = {}
    for node in program.graph.nodes:
        entry = contraction(program, node)
        if entry is not None:
            found.setdefault(entry.weight, entry)
    return list(found.values())


def random_masks(program: Program, amount: float, side: str, seed: int = 0) -> tuple[Masks, Masks]:
    """Return ``(keep_inputs, keep_outputs)``: sorted kept indices by weight.

    Every weight is masked on its own; about ``amount`` of its channels go, and one stays at least.

    Args:
        program: The captured program.
        amount: The share of channels to remove.
        side: ``input``, ``output`` or ``both``.
        seed: Fixes the choice.
    """
    draw = random.Random(f"{seed}-{amount}")

    def keep(width: int) -> tuple[int, ...]:
        count = max(1, width - round(amount * width))
        return tuple(sorted(draw.sample(range(width), count)))

    inputs: Masks = {}
    outputs: Masks = {}
    for entry in contractions(program):
        if side in ("input", "both"):
            inputs[entry.weight] = keep(entry.inputs)
        if side in ("output", "both"):
            outputs[entry.weight] = keep(entry.outputs)
    return inputs, outputs


# ------------------------------------------------------------------ masks of several kinds

KINDS = ("input", "output", "both", "heads", "one", "all but one", "emptied")


def draw_masks(program: Program, kind: str, seed: int) -> tuple[Masks, Masks]:
    """Return ``(keep_inputs, keep_outputs)`` of a kind; the seed fixes them.

    Args:
        program: The captured program.
        kind: ``input``, ``output`` or ``both`` sides at random; ``heads``: whole blocks of channels
            of every weight, as heads are; ``one``: one channel of one weight; ``all but one``: of
            about half of the weights; ``emptied``: one weight keeps no output, the others lose
            some.
        seed: Fixes the choice.
    """
    draw = random.Random(f"{kind} {seed}")
    if kind in ("input", "output", "both"):
        return random_masks(program, draw.choice((0.2, 0.5, 0.8, 0.95)), kind, seed)
    entries = contractions(program)
    inputs: Masks = {}
    outputs: Masks = {}
    chosen = draw.choice(entries) if entries else None
    for entry in entries:
        for masks, width in ((inputs, entry.inputs), (outputs, entry.outputs)):
            keep = _kept(draw, kind, width, entry is chosen)
            if keep is not None:
                masks[entry.weight] = keep
    if kind == "one" and chosen is not None:  # a side of one is enough
        (inputs, outputs)[draw.randrange(2)].clear()
    if kind == "emptied" and chosen is not None:
        outputs[chosen.weight] = ()
    return inputs, outputs


def _kept(draw: random.Random, kind: str, width: int, chosen: bool) -> tuple[int, ...] | None:
    """Return what one side of a weight keeps, or ``None`` for no mask."""
    if kind == "heads":
        sizes = [n for n in range(2, width) if width % n == 0]
        if not sizes or draw.random() < 0.3:
            return None
        each = draw.choice(sizes)
        heads = [h for h in range(width // each) if draw.random() < 0.6]
        heads = heads or [draw.randrange(width // each)]
        return tuple(c for h in heads for c in range(h * each, (h + 1) * each))
    if kind == "one":
        gone = draw.randrange(width)
        return tuple(c for c in range(width) if c != gone) if chosen and width > 1 else None
    if kind == "all but one":
        return (draw.randrange(width),) if draw.random() < 0.5 else None
    gone = draw.randrange(width)
    return tuple(c for c in range(width) if c != gone) if width > 1 else None
