"""`CostTable`: seconds of an operator at given sizes, from measurements of one runtime on one CPU.

A table is data: measured grids over the sizes that time depends on, what the runtime does with
layouts, and single works that were measured exactly. This module is the arithmetic between them. A
target makes, keeps and loads tables; `narrows.ir.account` adds up a whole program.

Blocked layouts make time a staircase: a convolution that runs blocked computes whole blocks of
channels, and takes them in sets, so that its width is rounded up before a grid is read. What does
not fit (a width off the alignment) runs in the plain layout, on grids of its own.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from narrows.ir import costfile
from narrows.ir.account import OpCost, account
from narrows.ir.grid import Grid, Layout
from narrows.ir.kernels import SPELLINGS, faster, read_window, sizes_of
from narrows.ir.kernels import window as window_of
from narrows.ir.program import Program
from narrows.ir.work import CONVOLUTIONS, Work
from narrows.ir.workload import work_of

__all__ = ["CostTable", "Grid", "Layout", "Work", "work_of"]


@dataclass(frozen=True)
class CostTable:
    """What operators cost in one runtime on one machine; all times are of one thread's CPU.

    Attributes:
        name: The runtime, ``onnxruntime``.
        runtime: Its version.
        cpu: The processor's name.
        layout: What the runtime does with layouts.
        overhead: Seconds that every operator takes whatever its size.
        grids: Measured times by what was measured (see `grid_of`).
        works: Works that were measured at exactly their sizes, in seconds.
        threads: How many threads the runtime had.
        made: When and how, for a person.
    """

    name: str
    runtime: str
    cpu: str
    layout: Layout
    overhead: float
    grids: Mapping[str, Grid]
    works: Mapping[Work, float] = field(default_factory=dict)
    threads: int = 1
    made: str = ""

    # ------------------------------------------------------------------ one operator

    def form(self, work: Work) -> str:
        """Return how the runtime computes a convolution or pooling.

        ``blocked``; ``direct`` (reads the plain layout, writes blocks: few input channels);
        ``plain`` for all else.
        """
        block, align = self.layout.block, self.layout.align
        if block == 1 or len(work.space) != 2:
            return "plain"
        if work.kind == "conv":
            if work.inputs < block:
                return "direct"
            return "plain" if work.inputs % align else "blocked"
        if work.kind == "depthwise":
            fits = work.outputs == work.inputs and work.outputs % align == 0
            return "blocked" if fits else "plain"
        if work.kind == "grouped":
            per = (work.inputs // work.groups, work.outputs // work.groups)
            return "plain" if any(p % block for p in per) else "blocked"
        if work.kind == "pool":
            return "plain" if work.inputs % align else "blocked"
        return "plain"

    def step(self, work: Work) -> tuple[int, int]:
        """Return the steps that the widths should meet: of the inputs, of the outputs."""
        block = self.layout.block
        if work.kind == "grouped":
            return block * work.groups, block * work.groups
        if work.kind == "conv":
            return (1 if work.inputs < block else block), block
        return (block, block) if work.kind == "depthwise" else (1, 1)

    def seconds(self, work: Work, *, alone: bool = False) -> float:
        """Return the time of one call.

        Unless ``alone``, an operator that cannot run in the blocked layout, but whose like does,
        pays for the change of layout before and after it, as it does among blocked convolutions.
        """
        if work.kind == "view":
            return self.overhead
        known = self._memo.get((work, alone))
        if known is None:
            known = self._memo[work, alone] = self._seconds(work, alone)
        return known

    def _seconds(self, work: Work, alone: bool) -> float:
        time = self._known(work)
        if not alone and len(work.space) == 2 and not self.runs_blocked(work):
            time += self.reorder_seconds(work, out=True)
            if self.form(work) != "direct":  # which writes blocks itself
                time += self.reorder_seconds(work, out=False)
        return time

    @cached_property
    def has_spellings(self) -> bool:
        """Whether the runtime has other kernels for other spellings of an operator."""
        return any(name.startswith(SPELLINGS) for name in self.grids)

    def spelling(self, work: Work) -> str:
        """Return how a work is spelled for the fastest kernel: see `narrows.ir.kernels`.

        Empty for the usual spelling. The seconds of a work are those of its fastest one.
        """
        name = f"{work.kind} {work.op} {window_of(work)}"
        if work.kind in CONVOLUTIONS:
            work = dataclasses.replace(work, batch=1)  # each example is computed by itself
            name = _windowed_grid(self.form(work), work)
        return faster(self.grids, self.layout, name, work)[0] if name in self.grids else ""

    def runs_blocked(self, work: Work) -> bool:
        """Whether the operator itself takes and gives blocks (a concat: if its operands do)."""
        if self.layout.block == 1 or len(work.space) != 2:
            return self.layout.block == 1
        if work.kind in (*CONVOLUTIONS, "pool"):
            return self.form(work) == "blocked"
        if work.kind == "reduce":
            return work.inputs % self.layout.align == 0
        if work.kind == "concat":
            return work.outputs % self.layout.block == 0
        return work.kind == "scale" or work.op in (*self.layout.fused, *self.layout.blocked)

    def reorder_seconds(self, work: Work, *, out: bool) -> float:
        """Return the time to bring what ``work`` reads out of blocks, or its result into them."""
        if self.layout.block == 1:
            return 0.0
        if out:  # out of blocks, before the operator
            positions = math.prod(work.source) if work.source else work.positions
            return self._elements("reorder out", work.batch * positions * work.inputs)
        return self._elements("reorder in", work.elements)

    def copy_seconds(
        self,
        kind: str,
        channels_from: int,
        channels_to: int,
        space: Sequence[int],
        batch: int = 1,
        *,
        blocked: bool = True,
    ) -> float:
        """Return what a copy of channels costs.

        Args:
            kind: ``gather``, ``pick``, ``slice`` or ``concat``.
            channels_from: How many there are (of a concat: over all operands).
            channels_to: How many are taken.
            space: The positions, ``(height, width)``.
            batch: The number of examples.
            blocked: Whether it stands among blocked convolutions, and so has to leave the blocked
                layout and come back.
        """
        size, blocked = tuple(space), blocked and self.layout.block > 1
        key = (kind, channels_from, channels_to, size, batch, blocked)
        time = self._memo.get(key)
        if time is None:
            work = Work(
                kind,
                batch=batch,
                inputs=channels_from,
                outputs=channels_to,
                space=size,
                source=size,
            )
            time = self._moved(work)
            if blocked:
                time += self.reorder_seconds(work, out=True) + self.reorder_seconds(work, out=False)
            self._memo[key] = time
        return time

    # ------------------------------------------------------------------ whole programs

    def predict(self, program: Program, batch: int | None = None) -> list[tuple[str, float]]:
        """Return the seconds of every node of a program, changes of layout included.

        Args:
            program: The program, before lowering; what the runtime folds or fuses costs nothing.
            batch: The number of examples; that of the program's example inputs by default.
        """
        return [(op.node, op.total) for op in self.account(program, batch)]

    def account(self, program: Program, batch: int | None = None) -> list[OpCost]:
        """Return the same with its parts: the operator itself, its layout, how it is computed."""
        return account(self, program, batch)

    # ------------------------------------------------------------------ reading the grids

    @cached_property
    def _memo(self) -> dict[Any, float]:
        """What was computed before: choosing widths asks for the same works again and again."""
        return {}

    def _known(self, work: Work) -> float:
        """Return the time by the grids, corrected by the exact measurements nearby."""
        near = self._near.get(_family(work))
        if near is None:
            return self._estimate(work)
        at = self._place(work)
        total = weight = 0.0
        for place, correction in near:
            distance = math.dist(at, place)
            if distance < 1e-9:
                total, weight = correction, 1.0
                break
            share = 1.0 / distance**2
            total, weight = total + share * correction, weight + share
        return self._estimate(work) * math.exp(total / weight)

    @cached_property
    def _near(self) -> dict[Work, list[tuple[tuple[float, ...], float]]]:
        found: dict[Work, list[tuple[tuple[float, ...], float]]] = {}
        for work, seconds in self.works.items():
            correction = math.log(seconds / self._estimate(work))
            found.setdefault(_family(work), []).append((self._place(work), correction))
        return found

    def _place(self, work: Work) -> tuple[float, ...]:
        # Widths on one stair are one place; a stair of the plain layout is a place of its own.
        form = 0.0 if self.form(work) == "plain" else 10.0
        pad = self.layout.padded if form else int
        return (form, math.log(pad(work.inputs)), math.log(pad(work.outputs)), math.log(work.batch))

    def _estimate(self, work: Work) -> float:
        if work.kind in ("linear", "matmul"):
            return self._product(work.kind, work)
        if work.kind == "attention":
            return self._attention(work)
        if work.kind in CONVOLUTIONS:
            return self._convolution(work)
        if work.kind == "conv_transpose":
            flat = dataclasses.replace(work, kind="grouped" if work.groups > 1 else "conv")
            scale = work.macs / max(1, flat.macs)
            return self._windowed("plain", flat) * scale
        return self._moved(work)

    def _convolution(self, work: Work) -> float:
        form, pad = self.form(work), self.layout.padded
        if form == "plain":
            return self._windowed("plain", work)
        if work.kind == "depthwise":
            work = dataclasses.replace(
                work, inputs=pad(work.inputs), outputs=pad(work.outputs), groups=pad(work.outputs)
            )
            return self._windowed("blocked", work)
        if work.kind == "grouped":
            one = dataclasses.replace(
                work,
                kind="conv",
                groups=1,
                inputs=work.inputs // work.groups,
                outputs=work.outputs // work.groups,
            )
            return self.overhead + work.groups * (self._convolution(one) - self.overhead)
        if form == "blocked":
            work = dataclasses.replace(work, inputs=pad(work.inputs))
        return self._in_sets(form, work)

    def _in_sets(self, form: str, work: Work) -> float:
        """Return the time of a convolution whose kernel makes several blocks of outputs at once.

        A last set that is not full takes a share of a full one's time, as it does on its own.
        """
        block, most = self.layout.block, self.layout.sets

        def of(blocks: int) -> float:
            return self._windowed(form, dataclasses.replace(work, outputs=blocks * block))

        blocks = self.layout.padded(work.outputs) // block
        rest = blocks % most
        if blocks <= most or not rest:
            return of(blocks)
        share = (of(rest) - self.overhead) / max(1e-9, of(most) - self.overhead)
        whole = of(blocks - rest)
        return whole + min(1.0, max(0.0, share)) * (of(blocks - rest + most) - whole)

    def _windowed(self, form: str, work: Work) -> float:
        """Return the time of a convolution by the grid of its window, or of the nearest one."""
        if work.batch > 1:
            one = dataclasses.replace(work, batch=1)
            return work.batch * self._windowed(form, one) * self._batched(form, work)
        name = _windowed_grid(form, work)
        if name in self.grids:
            return self._grid(name, work)
        start = f"{form} {work.kind} "
        known = [n for n in self.grids if n.startswith(start)]
        if not known:
            start = f"plain {'depthwise' if work.kind == 'depthwise' else 'conv'} "
            known = [n for n in self.grids if n.startswith(start)]
        if not known:
            return self.overhead + work.macs * 1e-10

        def distance(name: str) -> tuple[float, float]:
            taps, stride = read_window(name.split()[-1])
            own = max(work.stride, default=1)
            return abs(math.log(taps / max(1, work.taps))), abs(math.log(stride / max(1, own)))

        # A 1x1 kernel is another algorithm: it stands in only where nothing else was measured.
        others = [n for n in known if read_window(n.split()[-1])[0] > 1]
        nearest = min(others if others and work.taps > 1 else known, key=distance)
        taps = read_window(nearest.split()[-1])[0]
        return max(self.overhead, self._grid(nearest, work) * work.taps / taps)

    def _batched(self, form: str, work: Work) -> float:
        """Return the share of its time alone that an example takes in a batch.

        It is less where a weight is read once for all, more where activations leave a cache.
        """
        name = _windowed_grid(form, work)
        if f"x8 {name}" not in self.grids:
            return 1.0
        several = self.grids[f"x8 {name}"]
        sizes = sizes_of(work)
        share = several.at(sizes) / self._like(name, several).at(sizes) / 8
        return share ** min(1.0, math.log(work.batch) / math.log(8))

    def _like(self, name: str, other: Grid) -> Grid:
        """Return a grid at the points of another."""
        cache: dict[str, Grid] = self.__dict__.setdefault("_alike", {})
        if name not in cache:
            names = [n for n, _ in other.axes]
            points = product(*(p for _, p in other.axes))
            us = [self.grids[name].at(dict(zip(names, p, strict=True))) for p in points]
            cache[name] = Grid(other.axes, np.reshape(us, other.us.shape))
        return cache[name]

    def _product(self, kind: str, work: Work) -> float:
        if kind == "linear":
            return self._grid(kind, work)
        one = self._grid(kind, dataclasses.replace(work, batch=1))
        return self.overhead + work.batch * max(1e-8, one - self.overhead)

    def _attention(self, work: Work) -> float:
        keys = work.taps
        scores = dataclasses.replace(work, kind="matmul", outputs=keys, kernel=())
        values = dataclasses.replace(work, kind="matmul", inputs=keys, kernel=())
        softmax = self._elements("softmax", work.batch * work.positions * keys)
        return self._product("matmul", scores) + softmax + self._product("matmul", values)

    def _moved(self, work: Work) -> float:
        block = self.runs_blocked(work) and self.layout.block > 1
        names = [f"{work.kind} {work.op}", work.kind]
        if block:
            names = [f"blocked {n}" for n in names] + names
            work = dataclasses.replace(
                work,
                inputs=self.layout.padded(work.inputs),
                outputs=self.layout.padded(work.outputs),
            )
        if work.kind == "pool":
            window = window_of(work)
            names = [f"{n} {window}" for n in names] + names
        if work.kind == "pick":  # a table may be older than that
            names.append("gather")
        return self._grid(next((n for n in names if n in self.grids), "copy"), work)

    def _elements(self, name: str, elements: float) -> float:
        key = (name, int(elements))
        known = self._memo.get(key)
        if known is None:
            known = self._memo[key] = self._grid(name, Work(name, outputs=max(1, int(elements))))
        return known

    def _grid(self, name: str, work: Work) -> float:
        if name not in self.grids:
            return self.overhead + 1e-10 * max(work.elements, work.inputs * work.batch)
        time = faster(self.grids, self.layout, name, work)[1] * 1e-6
        return max(self.overhead, time * (work.groups if work.kind == "grouped" else 1))

    # ------------------------------------------------------------------ keeping

    def with_works(self, works: Mapping[Work, float]) -> CostTable:
        """Return the table with more exact measurements, in seconds."""
        return dataclasses.replace(self, works={**self.works, **works})

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON data; times are microseconds there."""
        return costfile.encode(self)

    @classmethod
    def from_json(cls, data: Any) -> CostTable:
        """Return the table of JSON data; `UsageError` if it is not one."""
        return cls(**costfile.decode(data))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table as JSON and return its path; ``-`` is standard output."""
        return costfile.write(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CostTable:
        """Return the table of a file; `UsageError` if there is none."""
        return cls(**costfile.read(path))


def _family(work: Work) -> Work:
    """Return what works must have in common to tell something of each other."""
    return dataclasses.replace(
        work, batch=1, inputs=1, outputs=1, groups=1 if work.kind != "grouped" else 2
    )


def _windowed_grid(form: str, work: Work) -> str:
    """Return the name of the grid of a convolution that is computed in a form."""
    return f"{form} {work.kind} {window_of(work)}"
