"""`choose_levels`: where each level of an activation begins, by what its block computes.

An activation of few bits need not be cut into steps of equal width to have results of equal
distance: N2UQ (*Nonuniform-to-Uniform Quantization*, Liu et al., CVPR 2022) trains the thresholds.
Here nothing is trained. They begin even, on codes of 8 bits, and each is moved as long as the
error at the end of its block falls. For the tensor alone even ones are the best there are; what a
block makes of it weighs errors otherwise, and sums those that go together.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from narrows.errors import UsageError
from narrows.ir.integer.grid import EXPONENTS, Grid, Levels
from narrows.ir.meta import Meta
from narrows.ir.program import Note, Program
from narrows.passes.quant.options import LEVEL_BITS
from narrows.passes.quant.plan import QuantPlan
from narrows.passes.quant.reconstruct import GAIN, Block, Values, apart, distance, on
from narrows.passes.quant.survey import survey
from narrows.passes.quant.trial import Site, Trial
from narrows.passes.quant.walk import given, holding, spans_of, split, walk

FINE = 8  # bits of the codes that thresholds lie between
MOVES = (4, 8)  # thresholds move by these parts of an even level's width, the larger first
SAMPLES = 64  # by which they are chosen
BATCH = 32


def choose_levels(prepared: Program, plan: QuantPlan, items: Sequence[Any]) -> QuantPlan:
    """Return the plan with levels of unequal width where those lower the error of a block.

    Blocks are taken in order, so that each sees the levels before it. An activation takes up
    to ``4 * 2**bits`` runs of its block on `SAMPLES` samples. Its levels stay if the outputs, too,
    are closer to those of the floating-point network, on other samples if there are. Tensors that
    share a grid, as what is concatenated does, keep theirs.

    Args:
        prepared: The prepared program.
        plan: Its plan, complete.
        items: Calibration data.

    Raises:
        UsageError: No activation has so few bits.
    """
    found = survey(prepared, floats=plan.floats)
    shared = {n.name for group in found.shared_grids() for n in group}
    names = {n for n, g in plan.activations.items() if fine(g) is not None} - shared
    if not names:
        raise UsageError(
            f"no activation of {prepared.name} can have levels",
            why=f"they are for {LEVEL_BITS} bits and fewer, of tensors that are not concatenated",
            hint="activations=4",
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trial = Trial(prepared, plan, found, device)
    exact = Trial(prepared, dataclasses.replace(plan, offsets={}, codes={}), found, device)
    every = split(prepared, items, BATCH)
    count = holding(every, SAMPLES)
    inputs, others = every[:count], every[count:]
    open_ = {node: site for node, site in trial.sites.items() if site.name in names}
    error = _at_outputs(trial, exact, others[: holding(others, SAMPLES)] or inputs)
    best, fell = error(), dict[str, float]()
    for block in walk(trial, spans_of(trial, found), inputs, exact):
        for node in [n for n in block.span.nodes if n in open_]:
            site = open_.pop(node)
            _tell(f"levels: {len(names) - len(open_)} of {len(names)} activations")
            left = _place(trial, block, site, plan.activations[site.name])
            now = error() if site.levels is not None else math.inf
            if now < GAIN * best:
                best, fell[site.name] = now, left
            else:
                site.levels = None
    made = {s.name: s.levels for s in trial.sites.values() if s.levels is not None}
    _tell(f"levels: {len(made)} of {len(names)} activations have unequal ones\n")
    sources = {n.name: Meta(n).source for n in prepared.graph.nodes}
    notes = [
        Note(name, "levels", f"the error of its block fell by {1 - left:.1%}", 0, sources[name])
        for name, left in fell.items()
    ]
    if not made:
        notes = [Note(prepared.name, "levels", "those of unequal width lower no error")]
    return dataclasses.replace(
        plan,
        activations={**plan.activations, **{n: own for n, (own, _) in made.items()}},
        levels={n: levels for n, (_, levels) in made.items()},
    ).with_notes(*notes)


def fine(grid: Grid) -> Grid | None:
    """Return the grid of 8 bits that reaches as far, if a grid may have levels and there is one."""
    exponent = grid.exponent + FINE - grid.bits
    if grid.bits > LEVEL_BITS or exponent not in EXPONENTS:
        return None
    return Grid(exponent, grid.zero, FINE)


def even(grid: Grid) -> list[int]:
    """Return the codes of `fine` at which the codes of a grid begin; ties go up."""
    width = 1 << FINE - grid.bits
    return [width * k - width // 2 for k in range(1, 1 << grid.bits)]


def _place(trial: Trial, block: Block, site: Site, grid: Grid) -> float:
    """Give a site levels if the block's error falls; return the share of it that is left."""
    own, source = fine(grid), site.node.all_input_nodes[0]
    assert own is not None
    rest = trial.span(block.span.exit, [*block.span.reads, source])
    values = [_until(trial, block, source, held) for held in block.rounded]

    def loss() -> float:
        pairs = zip(values, block.targets, strict=True)
        with torch.no_grad():
            return sum(
                float(distance(trial.run(rest, on(v, trial), "hard"), t.to(trial.device), 2.0))
                for v, t in pairs
            )

    before = loss()
    begins = even(grid)
    site.levels = own, Levels(grid, tuple(begins))
    best = loss()
    for part in MOVES:
        by = (1 << FINE - grid.bits) // part
        for i in range(len(begins)):
            for step in (by, -by):
                low = begins[i - 1] if i else 0
                high = begins[i + 1] if i + 1 < len(begins) else own.high
                held = begins[i]
                if not low <= held + step <= high:
                    continue
                begins[i] += step
                site.levels = own, Levels(grid, tuple(begins))
                now = loss()
                if now < best:
                    best = now
                    break
                begins[i] = held
    site.levels = own, Levels(grid, tuple(begins))
    if before <= 0 or best >= GAIN * before:
        site.levels = None
        return 1.0
    return best / before


def _at_outputs(trial: Trial, exact: Trial, inputs: Sequence[list[Any]]) -> Callable[[], float]:
    """Return what tells how far the outputs are from those of the floating-point network."""
    whole, plain = trial.span(trial.output, []), exact.span(exact.output, [])
    values = [on(v, trial) for v in given(trial, inputs)]
    with torch.no_grad():
        targets = [exact.run(plain, on(v, exact), "float") for v in given(exact, inputs)]

    def error() -> float:
        pairs = zip(values, targets, strict=True)
        with torch.no_grad():
            return sum(apart(trial.run(whole, v, "hard"), t) for v, t in pairs)

    return error


def _until(trial: Trial, block: Block, source: fx.Node, held: Values) -> Values:
    """Return what a block reads, and a tensor in it before that is rounded."""
    if source in held:
        return held
    before = trial.span(source, block.span.reads)
    with torch.no_grad():
        return {**held, source: trial.run(before, on(held, trial), "hard")}


def _tell(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text}", end="", file=sys.stderr, flush=True)


__all__ = ["choose_levels"]
