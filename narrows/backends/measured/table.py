"""`CostTable`: seconds of an operator at given sizes, from measurements of one runtime on one CPU.

A table is data: measured grids over the sizes that time depends on, and single works that were
measured exactly. This module is the arithmetic between them, for a runtime that computes every
operator in the plain layout.
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
from typing import Any, Self

import numpy as np

from narrows.backends.measured import file
from narrows.backends.measured.grid import Grid
from narrows.backends.measured.layout import Layout
from narrows.backends.measured.sizes import read_window, sizes_of, windowed_grid
from narrows.backends.measured.sizes import window as window_of
from narrows.ir.costs import Costs, copied
from narrows.ir.work import CONVOLUTIONS, Work

__all__ = ["CostTable", "Grid", "Layout"]


@dataclass(frozen=True)
class CostTable(Costs):
    """What operators cost in one runtime on one machine; all times are of one thread's CPU.

    Attributes:
        name: The runtime, ``onnxruntime``.
        runtime: Its version.
        cpu: The processor's name.
        layout: What the runtime does with layouts.
        overhead: Seconds that every operator takes whatever its size.
        grids: Measured times by what was measured: ``plain conv 3x3/1``, ``pointwise relu``.
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

    @property
    def origin(self) -> str:
        """The runtime, its version, the processor, when and how."""
        return f"{self.name} {self.runtime} on {self.cpu} ({self.made})"

    # ------------------------------------------------------------------ one operator

    def seconds(self, work: Work, *, alone: bool = False) -> float:
        """Return the seconds of one call; ``alone``, without changes of layout around it."""
        if work.kind == "view":
            return self.overhead
        known = self._memo.get((work, alone))
        if known is None:
            known = self._memo[work, alone] = self._seconds(work, alone)
        return known

    def _seconds(self, work: Work, alone: bool) -> float:
        return self._known(work)

    @property
    def least_seconds(self) -> float:
        """The seconds that a call takes however little it does."""
        return self.overhead

    def fuses(self, work: Work) -> bool:
        """Whether a convolution, or a norm, takes in an operator that follows it."""
        return work.op in self.layout.fused

    @property
    def fuses_sums(self) -> bool:
        """Whether the sum of a convolution's result and another tensor has a time of its own."""
        return True

    def fused_seconds(self, work: Work) -> float:
        """Return what an operator costs inside a convolution: what was measured, or nothing."""
        return self._inside(f"plain fused {work.op}", work.elements)

    def _inside(self, name: str, elements: int) -> float:
        return self.grids[name].at({"elements": elements}) * 1e-6 if name in self.grids else 0.0

    @property
    def least_step(self) -> int:
        """What a width that is less than a `step` should be a multiple of."""
        return self.layout.align

    def copy_seconds(
        self,
        kind: str,
        have: int,
        take: int,
        space: Sequence[int],
        batch: int = 1,
        *,
        plain: bool = False,
    ) -> float:
        """Return what a copy of channels costs; see `Costs.copy_seconds`."""
        key = (kind, have, take, tuple(space), batch)
        time = self._memo.get(key)
        if time is None:
            time = self._memo[key] = self._moved(copied(*key))
        return time

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
        """Return where a work lies among those of its kind; what lies together costs the same."""
        return (0.0, math.log(work.inputs), math.log(work.outputs), math.log(work.batch))

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
        return self._windowed("plain", work)

    def _windowed(self, form: str, work: Work) -> float:
        """Return the time of a convolution by the grid of its window, or of the nearest one."""
        if work.batch > 1:
            one = dataclasses.replace(work, batch=1)
            return work.batch * self._windowed(form, one) * self._batched(form, work)
        name = windowed_grid(form, work)
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
        name = windowed_grid(form, work)
        if f"x8 {name}" not in self.grids:
            return 1.0
        several = self.grids[f"x8 {name}"]
        sizes = sizes_of(work)
        share = several.at(sizes) / self._like(name, several).at(sizes) / 8
        return share ** min(1.0, math.log(work.batch) / math.log(8))

    @cached_property
    def _alike(self) -> dict[str, Grid]:
        return {}

    def _like(self, name: str, other: Grid) -> Grid:
        """Return a grid at the points of another."""
        cache = self._alike
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
        return self._first(work, [f"{work.kind} {work.op}", work.kind])

    def _first(self, work: Work, names: list[str]) -> float:
        """Return the time by the first grid that there is of these."""
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
        time = self._microseconds(name, work) * 1e-6
        return max(self.overhead, time * (work.groups if work.kind == "grouped" else 1))

    def _microseconds(self, name: str, work: Work) -> float:
        return self.grids[name].at(sizes_of(work))

    # ------------------------------------------------------------------ keeping

    def with_works(self, works: Mapping[Work, float]) -> Self:
        """Return the table with more exact measurements, in seconds."""
        return dataclasses.replace(self, works={**self.works, **works})

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON data; times are microseconds there."""
        return file.encode(self)

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Return the table of JSON data; `UsageError` if it is not one."""
        return cls(**file.decode(data))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table as JSON and return its path; ``-`` is standard output."""
        return file.write(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return the table of a file; `UsageError` if there is none."""
        return cls(**file.read(path))


def _family(work: Work) -> Work:
    """Return what works must have in common to tell something of each other."""
    return dataclasses.replace(
        work, batch=1, inputs=1, outputs=1, groups=1 if work.kind != "grouped" else 2
    )
