"""`rapq`: power-of-two grids and learned rounding, block by block; the result is a `QuantPlan`.

The method is after RAPQ (Rescuing Accuracy for Power-of-Two Low-bit Post-training Quantization,
Yao et al., IJCAI 2022). Per block, from the inputs to the outputs:

1. Exponents are chosen by the block's loss, its input's among them (`reconstruct.choose_steps`).
   They are whole numbers all along, so there is nothing to snap.
2. The rounding of its weights, and its biases, are learned on these grids (`reconstruct.learn`).
3. Its activations' exponents are tried once more.

At the end every activation's exponent is tried again by the loss at the outputs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from narrows.ir.integer.codes import WeightCodes
from narrows.ir.integer.grid import WeightGrid
from narrows.ir.meta import shape_of
from narrows.ir.ops import table
from narrows.ir.ops.args import arguments
from narrows.ir.program import Note, Program
from narrows.passes.quant import resume
from narrows.passes.quant.calibrate import calibrate
from narrows.passes.quant.learning import Learning
from narrows.passes.quant.options import Quantization
from narrows.passes.quant.plan import QuantPlan
from narrows.passes.quant.reconstruct import (
    POWERS_OF_TWO,
    Block,
    Steps,
    Values,
    apart,
    choose_activation,
    choose_steps,
    correct_biases,
    learn,
    loss_of,
    on,
)
from narrows.passes.quant.scale_parts import ScaleParts
from narrows.passes.quant.survey import Survey, survey
from narrows.passes.quant.trial import Site, Span, Trial, exponent_of
from narrows.passes.quant.walk import holding, spans_of, split, walk

PER_BLOCK = 500  # iterations, where no budget is given
LEARNING = 0.85  # the share of a time that blocks get; the rest is for the last look
SEARCHED = 64  # samples by which exponents are tried


def rapq(
    program: Program,
    prepared: Program,
    data: Iterable[Any] | None,
    settings: Quantization,
    learning: Learning,
) -> QuantPlan:
    """Return the plan of a prepared program: exponents, codes of the weights, offsets of biases.

    Args:
        program: The program before preparation, for the norms it had.
        prepared: The prepared program.
        data: As for `narrows.quantize`; it is kept in memory.
        settings: Bits, what stays floating-point, rounding.
        learning: How long and how.

    Raises:
        UsageError: There is no data, it does not fit, or the checkpoint is of another run.
        PassError: As `narrows.passes.quant.calibrate.calibrate`.
    """
    items = list(data) if data is not None else None
    start = settings.unlearned(method="mse", correct_bias=False)
    plan = calibrate(prepared, items, start)
    assert items is not None
    prepared = ScaleParts(plan).run(prepared).program
    return Reconstruction(program, prepared, items, plan, settings, learning).run()


class Reconstruction:
    """A network on its way from one plan to a better one.

    Args:
        program: The program before preparation.
        prepared: The prepared program.
        items: Calibration data.
        plan: The grids to begin with.
        settings: As for `rapq`.
        learning: As for `rapq`.
        steps: Which steps are tried. With others than powers of two there is no plan at the end;
            this is for comparing.
    """

    def __init__(
        self,
        program: Program,
        prepared: Program,
        items: Sequence[Any],
        plan: QuantPlan,
        settings: Quantization,
        learning: Learning,
        steps: Steps = POWERS_OF_TWO,
    ) -> None:
        self.prepared, self.plan, self.settings = prepared, plan, settings
        self.learning, self.steps = learning, steps
        device = learning.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.found = survey(prepared, floats=plan.floats)
        bare = dataclasses.replace(plan, offsets={}, codes={})  # both are what is looked for
        self.trial = Trial(prepared, bare, self.found, torch.device(device))
        self.inputs = split(prepared, items, learning.batch)
        self.powers = _norm_powers(program) if learning.loss == "norm" else {}
        self.spans = spans_of(self.trial, self.found)
        self.groups = _groups(self.trial, self.found, settings)
        plain = dataclasses.replace(learning, budget=None, checkpoint=None, device=None)
        given = settings.unlearned(levels=False)  # they come afterwards
        self.key = resume.key(prepared, self.inputs, repr((given, plain, steps)))
        self.searched = holding(self.inputs, SEARCHED)
        self.told = 0.0

    def run(self) -> QuantPlan:
        """Return the plan; what a checkpoint holds is not done again."""
        with _full_precision(self.trial.device):
            self.reconstruct()
        return self.result()

    def reconstruct(self) -> None:
        """Do all blocks, and leave the result in ``trial``."""
        begun = time.monotonic()
        done = self._resume()
        if done > len(self.spans):
            return
        costs = [_cost(span, self.trial) for span in self.spans]
        used: set[fx.Node] = set()
        for index, given in enumerate(walk(self.trial, self.spans, self.inputs)):
            if index >= done:
                share = costs[index] / max(sum(costs[index:]), 1)
                left = self._left(begun, share)
                self._one(index, self._open(given, used), left)
                self._save(index + 1)
            used |= {n for n in given.span.nodes if n in self.trial.sites}
        self._finish(begun)
        self._save(len(self.spans) + 1)

    # ------------------------------------------------------------------ a block

    def _open(self, block: Block, used: set[fx.Node]) -> Block:
        """Return a block with what is open in it: grids that no other has used, and roundings."""
        nodes = set(block.span.nodes)
        groups = [
            group for group in self.groups
            if all(site.node in nodes and site.node not in used for site in group)
        ]  # fmt: skip
        open_ = [k for n, k in self.trial.kernels.items() if n in nodes and k.codes is None]
        powers = [self.powers[k.name] for k in open_ if k.name in self.powers]
        kernels = list(dict.fromkeys(open_))
        power = powers[-1] if powers else 2.0
        return dataclasses.replace(block, groups=groups, kernels=kernels, power=power)

    def _one(self, index: int, block: Block, left: tuple[int, float | None]) -> None:
        trial, learning = self.trial, self.learning
        name = block.span.exit.name
        self._tell(index, name, "exponents")
        searched = range(self.searched)
        started = time.monotonic()
        choose_steps(trial, block, searched, self.steps)
        many = range(min(len(block.targets), 4 * self.searched))
        if self.settings.correct_bias:
            correct_biases(trial, block, many)
        iterations, seconds = left
        if seconds is not None:
            seconds = max(0.0, seconds - (time.monotonic() - started))
        if iterations:
            learn(
                trial, block, iterations, learning.seed + index, share=learning.drop,
                biases=self.settings.correct_bias, seconds=seconds,
                tell=lambda i, n: self._tell(index, name, f"iteration {i:,} of {n:,}"),
            )  # fmt: skip
        if self.settings.correct_bias:
            correct_biases(trial, block, many)
        best = loss_of(trial, block, searched)
        for group in block.groups:
            best = choose_activation(
                group, self.steps, best, lambda: loss_of(trial, block, searched)
            )
        self._tell(index, name, f"loss {best:.3g}", end=True)

    def _finish(self, begun: float) -> None:
        """Try every activation's exponent by the loss at the outputs, from the inputs on."""
        seconds = self.learning.seconds
        end = math.inf if seconds is None else begun + seconds
        trial, output = self.trial, self.trial.output
        exits = [span.exit for span in self.spans]
        names = [trial.named[n.name] for n in self.prepared.placeholders]
        items = self.inputs[: self.searched]
        values: list[Values] = [on(dict(zip(names, item, strict=True)), trial) for item in items]
        whole = trial.span(output, [])
        with torch.no_grad():
            targets = [trial.run(whole, v, "float") for v in values]
            left = list(self.groups)
            for index in range(len(self.spans) + 1):
                rest = trial.span(output, exits[:index])
                here = self.spans[index].nodes if index < len(self.spans) else rest.nodes
                nodes = set(here)
                groups = [g for g in left if any(s.node in nodes for s in g)]
                left = [g for g in left if g not in groups]
                self._tell(index, "outputs", f"exponents of {len(groups)} activations")

                def loss(rest: Span = rest) -> float:
                    pairs = zip(values, targets, strict=True)
                    return sum(apart(trial.run(rest, v, "hard"), t) for v, t in pairs)

                best = loss() if groups else 0.0
                for group in groups:
                    if time.monotonic() < end:
                        best = choose_activation(group, self.steps, best, loss)
                if index < len(self.spans):
                    for held in values:
                        held[exits[index]] = trial.run(self.spans[index], held, "hard")

    def _left(self, begun: float, share: float) -> tuple[int, float | None]:
        """Return how many iterations a block may take, and how long."""
        seconds, budget = self.learning.seconds, self.learning.budget
        if seconds is not None:
            spent = time.monotonic() - begun
            return 10**9, share * max(0.0, LEARNING * seconds - spent)
        learned = sum(1 for s in self.spans if any(n in self.trial.kernels for n in s.nodes))
        if budget is None:
            return PER_BLOCK, None
        return int(budget) // max(learned, 1), None

    def _tell(self, index: int, name: str, what: str, end: bool = False) -> None:
        now = time.monotonic()
        if not sys.stderr.isatty() or (now - self.told < 0.2 and not end):
            return
        self.told = now
        text = f"\rblock {index + 1} of {len(self.spans)}, {name}: {what}"
        print(f"{text:<79}", end="\n" if end else "", file=sys.stderr, flush=True)

    # ------------------------------------------------------------------ the result

    def result(self) -> QuantPlan:
        """Return what was found as a plan."""
        trial = self.trial
        activations = dict(self.plan.activations)
        for site in trial.sites.values():
            old = activations[site.name]
            activations[site.name] = dataclasses.replace(old, exponent=_exponent(site.step))
        trial.make_room(activations)
        weights, codes = dict(self.plan.weights), {}
        offsets: dict[str, tuple[int, ...]] = {}
        for kernel in trial.kernels.values():
            old = weights[kernel.name]
            steps = kernel.steps.flatten().tolist()
            weights[kernel.name] = WeightGrid(tuple(map(_exponent, steps)), old.bits, old.axis)
            if kernel.codes is not None:
                codes[kernel.name] = WeightCodes.of(kernel.codes)
            if kernel.bias is not None and kernel.shift is not None:
                unit = kernel.bias_steps().double()
                whole = (kernel.bias.double() / unit).round()
                moved = ((kernel.bias + kernel.shift).double() / unit).round()
                offsets[kernel.name] = tuple((moved - whole).long().tolist())
        text = f"in {len(self.spans)} blocks, {len(codes)} of {len(weights)} weights"
        return dataclasses.replace(
            self.plan,
            activations=activations,
            weights=weights,
            codes=codes,
            offsets={n: o for n, o in offsets.items() if any(o)},
            notes=(*self.plan.notes, Note(self.prepared.name, "reconstructed", text)),
        )

    def _save(self, done: int) -> None:
        if self.learning.checkpoint is not None:
            resume.save(self.learning.checkpoint, self.trial, self.key, done)

    def _resume(self) -> int:
        """Take over what a checkpoint holds; return how many steps are done."""
        path = self.learning.checkpoint
        if path is None or not Path(path).exists():
            return 0
        return resume.load(path, self.trial, self.key)


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Keep CUDA from rounding float32 to fewer bits: what a block is held to has to be exact."""
    if device.type != "cuda":
        yield
        return
    libraries: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    held = [library.allow_tf32 for library in libraries]
    try:
        for library in libraries:
            library.allow_tf32 = False
        yield
    finally:
        for library, allowed in zip(libraries, held, strict=True):
            library.allow_tf32 = allowed


def _exponent(step: float) -> int:
    exponent = exponent_of(step)
    assert exponent is not None, step
    return exponent


def _groups(trial: Trial, found: Survey, settings: Quantization) -> list[list[Site]]:
    """Return the sites that change together, in execution order."""
    by_name: dict[str, Site] = {s.name: s for s in trial.sites.values()}
    groups: list[list[Site]] = []
    for group in found.shared_grids() if settings.align else ():
        sites = [by_name[n.name] for n in group]
        for low in (True, False):
            alike = [s for s in sites if (s.low < 0) is low]
            groups += [alike] if len(alike) > 1 else []
    taken = {s for g in groups for s in g}
    groups += [[s] for s in trial.sites.values() if s not in taken]
    return sorted(groups, key=lambda g: min(trial.order[s.node] for s in g))


def _cost(span: Span, trial: Trial) -> float:
    """Return roughly how long an iteration of a block takes, in multiplications."""
    total = 0.0
    for node in span.nodes:
        size = _size(node)
        total += 8 * size  # rounding and dropping
        kernel = trial.kernels.get(node)
        if kernel is not None:
            total += size * kernel.weight[0].numel()
    return total if any(n in trial.kernels for n in span.nodes) else 0.0


def _size(node: fx.Node) -> int:
    shape = shape_of(node)
    return 0 if shape is None else int(torch.Size(shape).numel())


def _norm_powers(program: Program) -> dict[str, float]:
    """Return ``p`` per weight whose layer a batch norm follows: ``1 + 2 sigmoid((sum g - 1) / C)``.

    The gains ``g`` of its ``C`` channels say how widely the outputs spread.
    """
    powers: dict[str, float] = {}
    for node in program.graph.nodes:
        if not table.is_affine(node):
            continue
        given = arguments(node)
        weights = [n for n in given["input"].all_input_nodes if n.op == "get_attr"]
        if not weights or given["weight"] is None:
            continue
        gains = program.tensor(given["weight"]).detach().double()
        powers[str(weights[0].target)] = 1 + 2 * float(
            torch.sigmoid((gains.sum() - 1) / gains.numel())
        )
    return powers


__all__ = ["Learning", "Reconstruction", "rapq"]
