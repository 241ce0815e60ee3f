"""`Sketch`: a program on its way to C: buffers, constants, and the steps that run one by one.

The rules in `narrows.backends.c.rules` and `narrows.backends.c.moves` add to it. A step knows which
buffers it reads and writes; its text is written when `narrows.backends.c.memory` has placed them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from narrows.backends.c.layout import (
    Buffer,
    Loop,
    View,
    channels_last,
    copy_loops,
    loops,
    packed,
    row_major,
)
from narrows.backends.c.types import CODES, Types
from narrows.backends.integers import of_narrows
from narrows.errors import LowerError
from narrows.files.quoting import c_name
from narrows.ir.integer.grid import HALF_UP
from narrows.ir.meta import Meta, where
from narrows.ir.ops.args import arguments
from narrows.ir.program import Program

Pointers = Callable[[View], str]

CTYPES = {"int8_t": np.int8, "uint8_t": np.uint8, "int16_t": np.int16, "uint16_t": np.uint16,
          "int32_t": np.int32, "uint32_t": np.uint32, "int64_t": np.int64,
          "number": np.int64}  # fmt: skip

INT32 = 2**31
INT64 = 2**62

QUANTIZE = torch.ops.narrows.quantize.default


@dataclass(eq=False)
class Step:
    """One call in the body of the function.

    Attributes:
        node: What it stems from.
        writes: The buffer that gets the result.
        reads: The buffers it reads.
        code: Returns its lines, given the C expression of a view.
        over: Buffers that the result may lie over, element by element, if nobody reads them again.
        scratch: What it needs besides, for itself.
        macs: Multiplications that are added up.
    """

    node: fx.Node
    writes: Buffer
    reads: tuple[Buffer, ...]
    code: Callable[[Pointers], list[str]]
    over: tuple[Buffer, ...] = ()
    scratch: Buffer | None = None
    macs: int = 0


@dataclass
class Constant:
    """A ``static const`` array.

    Attributes:
        name: Its name in C.
        ctype: The type of an element.
        values: Its elements.
        pad: How many zeros follow, which only vectors read.
        remark: What a person should know of it.
        powers: What stands in its place in a build by shifts and additions.
    """

    name: str
    ctype: str
    values: np.ndarray
    pad: int
    remark: str
    powers: np.ndarray | None = None


@dataclass
class Sketch:
    """Collects what becomes of a program; see the module's text.

    Attributes:
        program: The program.
        half_up: Whether ties are rounded up.
        shapes: The shape of every tensor at the batch size that is compiled for.
        views: Where the value of a node lies; the parts of a split have a tuple.
        fixed: Values that no input decides.
        steps: The steps, in order.
        constants: The arrays, by name.
        records: Parameters of layers, as C definitions.
        kernels: The C functions that are called.
        typed: Those that are called with codes of other types.
        wide: Why sums take 64 bits; empty where 32 do.
        signed_shifts: Whether a layer shifts to the left.
        layers: How many layers there are; ``shift_layers``: how many can do without products.
    """

    program: Program
    half_up: bool
    shapes: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    views: dict[fx.Node, Any] = field(default_factory=dict)
    fixed: dict[fx.Node, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)
    records: list[str] = field(default_factory=list)
    kernels: set[str] = field(default_factory=set)
    typed: dict[tuple[str, Types], None] = field(default_factory=dict)
    wide: str = ""
    signed_shifts: bool = False
    layers: int = 0
    shift_layers: int = 0
    _taken: set[str] = field(default_factory=set)
    _pooled: dict[tuple[Any, ...], str] = field(default_factory=dict)
    _copies: dict[tuple[Any, ...], View] = field(default_factory=dict)

    # ------------------------------------------------------------------ reading a node

    def given(self, node: fx.Node) -> dict[str, Any]:
        """Return a node's arguments by name; what no input decides stands there as its value."""
        return {k: map_arg(v, lambda n: self.fixed.get(n, n)) for k, v in arguments(node).items()}

    def view(self, value: Any) -> View:
        """Return where an operand lies; a constant one becomes an array."""
        if isinstance(value, fx.Node):
            return self.views[value]
        assert isinstance(value, Tensor), value
        array = value.detach().contiguous().numpy()
        symbol = self.constant("codes", array, CODES[array.itemsize])
        buffer = Buffer(symbol, array.nbytes, "constant", symbol, array.itemsize)
        return View(buffer, 0, array.shape, packed(array.shape, row_major(array.ndim)))

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return the shape of a node's value."""
        return self.shapes[node]

    def refuse(self, node: fx.Node, what: str, why: str, hint: str = "") -> LowerError:
        """Return the error for a node that cannot be expressed."""
        return LowerError(what, where=where(node), why=why, hint=hint)

    # ------------------------------------------------------------------ memory

    def fresh(self, name: str) -> str:
        """Return an unused C name that begins with ``name``."""
        base = c_name(name)
        found, count = base, 1
        while found in self._taken:
            found, count = f"{base}_{count}", count + 1
        self._taken.add(found)
        return found

    def constant(
        self,
        name: str,
        values: np.ndarray,
        ctype: str,
        *,
        pad: int = 0,
        remark: str = "",
        powers: np.ndarray | None = None,
    ) -> str:
        """Return the name of an array; equal ones stand once."""
        values = np.ascontiguousarray(values).astype(CTYPES[ctype]).reshape(-1)
        key = (ctype, pad, values.tobytes(), None if powers is None else powers.tobytes())
        if key not in self._pooled:
            made = self.fresh(name)
            self._pooled[key] = made
            self.constants[made] = Constant(made, ctype, values, pad, remark, powers)
        return self._pooled[key]

    def record(self, kind: str, name: str, text: str, types: Types | None = None) -> str:
        """Return the name of a new ``static const struct kind`` with these fields."""
        made = self.fresh(f"{name}_layer")
        kind += "" if types is None else types.suffix
        self.records.append(f"static const struct {kind} {made} = {{{text}}};")
        return made

    def result(
        self, node: fx.Node, shape: Sequence[int], order: Sequence[int], unit: int = 0
    ) -> View:
        """Return a new view without gaps for a node's result; ``unit`` is for other elements."""
        unit = unit or (2 if Meta(node).dtype is torch.int16 else 1)
        buffer = Buffer(node.name, math.prod(shape) * unit, unit=unit)
        return View(buffer, 0, tuple(shape), packed(shape, order))

    def scratch(self, node: fx.Node, size: int, unit: int = 1) -> View:
        """Return memory for so many elements that a node needs while it runs."""
        buffer = Buffer(f"scratch of {node.name}", size * unit, unit=unit)
        return View(buffer, 0, (size,), (1,))

    def step(
        self,
        node: fx.Node,
        kernel: str,
        result: View,
        reads: Iterable[View],
        code: Callable[[Pointers], list[str]],
        *,
        scratch: View | None = None,
        in_place: bool = False,
        macs: int = 0,
        sums: str = "",
    ) -> View:
        """Add a step and return its result.

        Args:
            node: What it stems from.
            kernel: The C function it calls, if any.
            result: What it writes.
            reads: What it reads, the operands first.
            code: As in `Step`.
            scratch: What it needs besides.
            in_place: Whether it goes element by element.
            macs: Multiplications that are added up.
            sums: The type of its sums, where codes have 16 bits.
        """
        reads = list(reads)
        over = [
            v.buffer for v in reads
            if in_place and v.buffer.kind == "arena" and v.buffer.size == result.buffer.size
            and v.buffer.unit == result.buffer.unit
            and all(_alike(r, result) for r in reads if r.buffer is v.buffer)
        ]  # fmt: skip
        types = Types.of(kernel, result, reads, sums)
        if types is not None:
            self.typed[kernel, types] = None
            code = _renamed(code, kernel, kernel + types.suffix)
        elif kernel:
            self.kernels.add(kernel)
        self.steps.append(
            Step(node, result.buffer, tuple(v.buffer for v in reads), code, tuple(over),
                 None if scratch is None else scratch.buffer, macs)
        )  # fmt: skip
        return result

    # ------------------------------------------------------------------ forms of a tensor

    def stored(self, node: fx.Node, view: View, order: Sequence[int]) -> View:
        """Return a tensor without gaps in an order of its axes: as it is, or a copy."""
        strides = packed(view.shape, order)
        if view.lies(order):
            return View(view.buffer, view.offset, view.shape, strides)
        key = (view, tuple(order))
        if key not in self._copies:
            target = self.result(node, view.shape, order, view.buffer.unit)
            self._copies[key] = self.copied(node, view, target)
        return self._copies[key]

    def images(self, node: fx.Node, view: View) -> View:
        """Return a tensor with its channels, axis 1, stored last."""
        return self.stored(node, view, channels_last(len(view.shape)))

    def copied(self, node: fx.Node, view: View, target: View) -> View:
        """Add a copy to another view of the same shape."""
        made = loops([target, view], target.order())

        def code(at: Pointers) -> list[str]:
            return nest([at(target), at(view)], made, lambda p, s, n:
                        f"copy({p[0]}, {s[0]}, {p[1]}, {s[1]}, {n});")  # fmt: skip

        return self.step(node, "copy", target, [view], code)

    def gathered(self, node: fx.Node, source: Buffer, addresses: Tensor, target: View) -> View:
        """Add a copy of the elements at these addresses."""
        first, made = copy_loops(target, addresses)
        origin = View(source, first, target.shape, target.strides)
        tables = {
            i: self.constant(f"places_{node.name}", np.asarray(loop.table), "int32_t")
            for i, loop in enumerate(made) if loop.table is not None
        }  # fmt: skip

        def code(at: Pointers) -> list[str]:
            return nest([at(target), at(origin)], made, lambda p, s, n:
                        f"copy({p[0]}, {s[0]}, {p[1]}, {s[1]}, {n});", tables)  # fmt: skip

        return self.step(node, "copy", target, [origin], code)

    # ------------------------------------------------------------------ numbers

    def shift(self, node: fx.Node, by: int, bound: int) -> int:
        """Return a shift that does the same to numbers up to ``bound`` and stays within 32 bits.

        Beyond what makes everything 0, or everything but 0 the largest code, it need not go. Where
        numbers leave 32 bits all the same, the model's sums become wide.
        """
        by = max(min(by, bound.bit_length() + 1), -10)
        top = bound << -by if by < 0 else bound + (1 << by >> 1)
        if top >= INT32 or by > 30:
            self.widen(node)
        return by

    def long_shift(self, node: fx.Node, by: int, bound: int) -> tuple[int, str]:
        """Return as `shift`, for codes of 16 bits: the shift, and the type of the numbers."""
        by = max(min(by, bound.bit_length() + 1), -18)
        top = bound << -by if by < 0 else bound + (1 << by >> 1)
        if top >= INT64:
            raise self.refuse(
                node, f"{node.name} computes numbers up to {top:,}", "64 bits do not hold them",
                "quantize with other exponents",
            )  # fmt: skip
        return by, "int64_t" if top >= INT32 or by > 30 else "int32_t"

    def widen(self, node: fx.Node) -> None:
        """Take 64 bits for sums, because of a node."""
        self.wide = self.wide or node.name


def _renamed(code: Callable[[Pointers], list[str]], old: str, new: str) -> Any:
    """Return what writes the same lines with another function's name."""
    call = re.compile(rf"\b{old}\(")
    return lambda at: [call.sub(f"{new}(", line) for line in code(at)]


def _alike(a: View, b: View) -> bool:
    """Whether elements at the same index lie at the same place of their buffers."""
    return (a.offset, a.shape, a.strides) == (b.offset, b.shape, b.strides)


def nest(
    pointers: Sequence[str],
    made: Sequence[Loop],
    call: Callable[[list[str], list[str], int], str],
    tables: dict[int, str] | None = None,
) -> list[str]:
    """Return nested loops around a call that does the innermost one itself.

    Args:
        pointers: The C expression of the first element, per tensor.
        made: The loops, the outermost first.
        call: Returns the call, given pointers, steps and the count.
        tables: The arrays of loops that go by a table, by their place.
    """
    tables = tables or {}
    made = list(made)
    inner = Loop(1, (1,) * len(pointers))
    if made and len(made) - 1 not in tables:
        inner = made.pop()
    lines, places = [], list(pointers)
    for i, loop in enumerate(made):
        lines.append(f"{'    ' * i}for (int i{i} = 0; i{i} < {loop.count}; i{i}++)")
        for j, step in enumerate(loop.steps):
            if i in tables and j == len(places) - 1:
                places[j] += f" + {tables[i]}[i{i}]"
            elif step:
                places[j] += f" {'+' if step > 0 else '-'} i{i} * {abs(step)}"
    steps = [str(s) for s in inner.steps]
    lines.append("    " * len(made) + call(places, steps, inner.count))
    return lines


def rounds_up(program: Program) -> bool:
    """Whether the shifts of an integer program round ties up; its inputs' codes never do."""
    calls = [n for n in program.graph.nodes if of_narrows(n) and n.target is not QUANTIZE]
    return any(arguments(n).get("rounding") == HALF_UP for n in calls)


def grid_text(node: fx.Node) -> str:
    """Return a node's grid for a comment."""
    grid = Meta(node).grid
    return "" if grid is None else f"  scale {grid}"
