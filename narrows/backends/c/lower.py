"""`sketch`: an integer program as steps on buffers; `plan` places the buffers in an arena."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from narrows.backends.c import choices, moves
from narrows.backends.c.layout import Buffer, View, channels_last, packed, row_major
from narrows.backends.c.memory import Block, Placement, place
from narrows.backends.c.rules import RULES
from narrows.backends.c.sketch import QUANTIZE, Pointers, Sketch, rounds_up
from narrows.backends.c.types import CODES
from narrows.backends.integers import of_narrows
from narrows.errors import LowerError
from narrows.ir.graph import interpret, live_nodes
from narrows.ir.integer.grid import Grid
from narrows.ir.meta import Meta, op_name, shape_of, where
from narrows.ir.program import Program

DEQUANTIZE = torch.ops.narrows.dequantize.default
CODED = (torch.uint8, torch.int16)
BYTES = (torch.uint8, torch.bool)  # what an input may hold that needs no grid


@dataclass(frozen=True)
class Port:
    """A tensor that goes in or comes out.

    Attributes:
        node: Its node in the program.
        name: Its name in C.
        shape: Its shape, as the program has it.
        order: Its axes as they lie in memory.
        dtype: What the program takes or returns: ``float32``, ``uint8`` or ``int64``.
        grid: What the codes stand for; ``None`` for whole numbers.
        rounding: How ties become codes, where it is an input.
        powers: What adds to the grid's exponent, per index of ``axis``, where that differs.
        axis: The axis of the program's tensor along which it does.
    """

    node: fx.Node
    name: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: str
    grid: Grid | None
    rounding: str = "half_even"
    powers: tuple[int, ...] = ()
    axis: int = 0

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def ctype(self) -> str:
        """The type of an element in C."""
        if self.dtype == "int64":
            return "int64_t"
        return CODES[2 if self.grid is not None and self.grid.wide else 1]

    @property
    def stored(self) -> tuple[int, ...]:
        """Its shape as it lies in memory."""
        return tuple(self.shape[a] for a in self.order)

    def to_json(self) -> dict[str, Any]:
        """Return what a session needs to know."""
        grid = self.grid
        codes = None if grid is None else [grid.exponent, grid.zero, grid.low, grid.high]
        told = {"order": list(self.order), "codes": codes, "rounding": self.rounding}
        if not self.powers:
            return told
        return {**told, "powers": list(self.powers), "axis": self.axis}


@dataclass(frozen=True)
class Drawn:
    """A program as steps.

    Attributes:
        sketch: The steps and what they need.
        inputs: What goes in.
        outputs: What comes out.
    """

    sketch: Sketch
    inputs: list[Port]
    outputs: list[Port]


def draw(program: Program, inputs: list[Any], outputs: list[fx.Node]) -> Drawn:
    """Return a program as steps.

    Args:
        program: An integer program.
        inputs: Flat inputs of the batch size to compile for; the program runs on them once.
        outputs: The nodes whose values are wanted.

    Raises:
        LowerError: Operators are left that compute in floating point; all of them are named.
    """
    sketch = Sketch(program, rounds_up(program))
    parts = _observe(sketch, inputs)
    live = list(live_nodes(program.graph))
    _refuse(sketch, live)
    ports = [_enter(sketch, n) for n in program.placeholders if n in sketch.shapes]
    for node in live:
        if node.op == "call_function" and node not in sketch.fixed and node not in sketch.views:
            _write(sketch, node, parts)
    return Drawn(sketch, ports, _leave(sketch, outputs))


def _observe(sketch: Sketch, inputs: list[Any]) -> set[fx.Node]:
    """Run the program; note shapes, and values that no input decides. Returns the splits."""
    parts: set[fx.Node] = set()

    def observe(node: fx.Node, value: Any) -> None:
        if node.op == "output":
            return
        if isinstance(value, Tensor):
            sketch.shapes[node] = tuple(value.shape)
        elif isinstance(value, tuple | list):
            parts.add(node)
        loose = node.op == "placeholder" or any(n not in sketch.fixed for n in node.all_input_nodes)
        if not isinstance(value, Tensor | tuple | list) or not loose:
            sketch.fixed[node] = value

    program = sketch.program
    with torch.no_grad():
        interpret(program.graph, inputs, program.weights, observe=observe)
    return parts


def _refuse(sketch: Sketch, live: list[fx.Node]) -> None:
    """Raise `LowerError` if not every operator works on codes."""
    coded = {n for n in live if n.op == "placeholder" and Meta(n).dtype in BYTES}
    wrong: list[tuple[fx.Node, str]] = []
    for node in live:
        if node.op != "call_function" or node in sketch.fixed:
            continue
        reason = _obstacle(sketch, node, coded)
        if reason is not None:
            wrong.append((node, reason))
        elif node.target is not DEQUANTIZE:
            coded.add(node)
    if not wrong:
        return
    wrong = [(n, reason) for n, reason in wrong if reason] or [(n, "float") for n, _ in wrong]
    groups: dict[str, list[fx.Node]] = defaultdict(list)
    for node, reason in wrong:
        groups[f"{op_name(node)} ({reason})"].append(node)
    lines = [f"{what}, {len(nodes)}x, first {where(nodes[0])}" for what, nodes in groups.items()]
    names = ", ".join(sorted({op_name(n) for n, _ in wrong}))
    islands = any(d is not None and d.is_floating_point for d in (Meta(n).dtype for n, _ in wrong))
    raise LowerError(
        f"{sketch.program.name} does not compute in integers everywhere: {names}",
        where="; ".join(lines),
        why="the c target has no floating-point operators",
        hint="narrows.quantize(..., strict=True) names what has no integer form; replace it, or "
        "take the target onnx, which keeps float islands"
        if islands
        else "let the model end before it, and compute it from the outputs; or take onnx",
    )


def _obstacle(sketch: Sketch, node: fx.Node, coded: set[fx.Node]) -> str | None:
    """Return why a node cannot be written; ``None`` if it can, empty if that is another's fault."""
    operands = [n for n in node.all_input_nodes if n not in sketch.fixed]
    held = all(n in coded for n in operands)
    if node.target is QUANTIZE:
        return None if operands[0].op == "placeholder" else ""
    if of_narrows(node):
        name = str(node.target._opname)  # type: ignore[union-attr]
        return (None if held else "") if name in RULES or node.target is DEQUANTIZE else "no rule"
    if op_name(node) == "embedding.default":
        table, indices = node.args[:2]
        plain = isinstance(indices, fx.Node) and indices.op == "placeholder"
        fixed = isinstance(table, fx.Node) and sketch.fixed.get(table) is not None
        quantized = fixed and sketch.fixed[table].dtype in CODED  # type: ignore[index]
        return None if plain and quantized else "its indices are computed, or its table is float"
    if held and (moves.is_move(node) or choices.find(sketch, node) is not None):
        return None
    entry = any(n.op == "placeholder" or n.target is DEQUANTIZE for n in operands)
    return "floating-point" if entry or not moves.is_move(node) else ""


def _enter(sketch: Sketch, node: fx.Node) -> Port:
    """Enter an input and the codes that it becomes; returns the port."""
    shape, rank = sketch.shape(node), len(sketch.shape(node))
    readers = [u for u in node.users if u.target is QUANTIZE]
    symbol = sketch.fresh(f"in_{node.name}")
    order = row_major(rank)
    if any(_images(u) for r in (*readers, node) for u in r.users):
        order = channels_last(rank)
    dtype = str(Meta(node).dtype).removeprefix("torch.")
    if not dtype.startswith("float") and dtype not in ("uint8", "bool", "int64"):
        why = "the c target takes codes, truth values and int64 indices"
        raise sketch.refuse(node, f"the input {node.name} is {dtype}", why)
    wide = bool(readers) and Meta(readers[0]).dtype is torch.int16
    unit = 8 if dtype == "int64" else 2 if wide else 1
    buffer = Buffer(node.name, math.prod(shape) * unit, "input", symbol, unit)
    view = View(buffer, 0, shape, packed(shape, order))
    if not readers:  # a float one is then read by nobody, and any grid will do
        sketch.views[node] = view
        grid = Grid(0) if dtype.startswith("float") else Meta(node).grid
        return Port(node, symbol, shape, order, dtype, grid)
    kinds = {tuple(sketch.given(r).items())[1:] for r in readers}
    if len(kinds) > 1:
        raise sketch.refuse(
            node, f"the input {node.name} becomes codes in {len(kinds)} ways",
            "the caller hands over one tensor of codes per input",
        )  # fmt: skip
    given = sketch.given(readers[0])
    for reader in readers:
        sketch.views[reader] = view
    grid = Meta(readers[0]).grid
    return Port(node, symbol, shape, order, dtype, grid, given["rounding"])


def _images(node: fx.Node) -> bool:
    """Whether an operator works on tensors with the channels last."""
    name = op_name(node)
    return (
        name.startswith(("conv", "average_pool", "max_pool", "resample"))
        and len(shape_of(node) or ()) > 2
    )


def _write(sketch: Sketch, node: fx.Node, parts: set[fx.Node]) -> None:
    """Enter the steps of one node."""
    shape = sketch.shapes.get(node, (1,))
    if node not in parts and 0 in shape:
        raise sketch.refuse(node, f"{node.name} has no elements", f"its shape is {list(shape)}")
    if node.target is DEQUANTIZE:
        sketch.views[node] = sketch.views[node.all_input_nodes[0]]
    elif of_narrows(node):
        rule = RULES[str(node.target._opname)]  # type: ignore[union-attr]
        sketch.views[node] = rule(sketch, node, sketch.given(node))
    elif (rule := choices.find(sketch, node)) is not None:
        sketch.views[node] = rule(sketch, node, sketch.given(node))
    else:
        moves.write(sketch, node)


def _leave(sketch: Sketch, outputs: list[fx.Node]) -> list[Port]:
    """Let the outputs be written straight to the caller's memory; returns their ports."""
    ports = []
    for node in outputs:
        source = node.all_input_nodes[0] if node.target is DEQUANTIZE else node
        if node in sketch.fixed and getattr(sketch.fixed[node], "dtype", None) not in CODED:
            raise sketch.refuse(
                node, f"the output {node.name} is a number that depends on no input",
                "the c target returns codes", "return it from Python",
            )  # fmt: skip
        symbol = sketch.fresh(f"out_{source.name}")
        view = sketch.view(sketch.fixed[node]) if node in sketch.fixed else sketch.views[node]
        rank = len(view.shape)
        order = channels_last(rank) if view.lies(channels_last(rank)) else row_major(rank)
        whole = view.size * view.buffer.unit == view.buffer.size
        if view.buffer.kind != "arena" or not whole or not view.lies(order):
            target = sketch.result(node, view.shape, order, view.buffer.unit)
            view = sketch.copied(node, view, target)
        view.buffer.kind, view.buffer.symbol = "output", symbol
        dtype = "uint8" if node in sketch.fixed else str(Meta(node).dtype).removeprefix("torch.")
        apart = sketch.given(node) if node.target is DEQUANTIZE else {"powers": (), "axis": 0}
        place = tuple(apart["powers"]), apart["axis"]
        grid = None if Meta(node).dtype is torch.bool else _grid(source)
        ports.append(Port(node, symbol, view.shape, order, dtype, grid, "half_even", *place))
    return ports


def _grid(node: fx.Node) -> Grid | None:
    while Meta(node).grid is None and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return Meta(node).grid


# ------------------------------------------------------------------ memory


@dataclass(frozen=True)
class Arena:
    """Where the buffers of a sketch lie.

    Attributes:
        placement: The blocks' offsets, the size and its lower bound.
        offsets: The offset of every buffer in the arena.
        shared: How many results lie over an operand.
    """

    placement: Placement
    offsets: dict[Buffer, int]
    shared: int

    def pointer(self, arena: str, words: str) -> Pointers:
        """Return what writes a view's place as a C expression.

        Args:
            arena: The arena as bytes.
            words: The arena as elements of 16 bits.
        """

        def at(view: View) -> str:
            if view.buffer in self.offsets:
                unit = view.buffer.unit  # blocks begin at whole words
                place = self.offsets[view.buffer] // unit + view.offset
                return f"{arena if unit == 1 else words} + {place}"
            symbol = view.buffer.symbol
            return f"{symbol} + {view.offset}" if view.offset else symbol

        return at


def plan(sketch: Sketch) -> Arena:
    """Return where every buffer lies."""
    last: dict[Buffer, int] = {}
    for i, step in enumerate(sketch.steps):
        for buffer in (*step.reads, step.writes):
            last[buffer] = i
    owner: dict[Buffer, Buffer] = {}  # who lies in the block of another
    spans: dict[Buffer, list[int]] = {}
    shared = 0
    for i, step in enumerate(sketch.steps):
        if step.scratch is not None:
            spans[step.scratch] = [i, i]
        made = step.writes
        if made.kind != "arena" or made in spans or made in owner:
            continue
        under = next((b for b in step.over if last[b] == i and b.kind == "arena"), None)
        if under is None:
            spans[made] = [i, last[made]]
            continue
        shared += 1
        root = owner.get(under, under)
        owner[made] = root
        spans[root][1] = last[made]
    blocks = [Block(b.name, b.size, *span) for b, span in spans.items()]
    placement = place(blocks)
    offsets = dict(zip(spans, placement.offsets, strict=True))
    offsets |= {b: offsets[root] for b, root in owner.items()}
    return Arena(placement, offsets, shared)
