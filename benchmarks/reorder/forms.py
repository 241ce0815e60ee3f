"""The forms that are made with narrows: the unpruned model, narrows itself, and the common mask.

A form is a function from a `Source` and a runtime to a program; to add one, write it and name it in
`FORMS`. Norms are folded into the convolutions before them in every form, and nodes that do nothing
are dropped, so that forms differ by what was made of the masks and by nothing else; but in eager
PyTorch ``narrows`` has its kernels chosen, too (``narrows-masks`` is the same without that).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import narrows
from benchmarks.reorder.case import Keep
from narrows.api import rewrite
from narrows.backends import costs_of
from narrows.backends.base import target_names
from narrows.ir.choices import Choices
from narrows.ir.program import Program
from narrows.ir.rewrite import demand_of, facts_of
from narrows.passes.choose_kernels import ChooseKernels
from narrows.passes.forms.common import common as common_mask
from narrows.passes.pipeline import Pipeline, PipelineResult
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.pruning.form import emit
from narrows.passes.pruning.stages import prune

TIDY = "fold-batch-norm, eliminate-dead"
PLAIN = f"prune-channels, {TIDY}"
STEP = 16  # channels

# The runtimes by the names of this benchmark, and as targets of narrows.
TARGETS = {"onnx": "onnx", "eager": "torch"}


@dataclass(frozen=True)
class Source:
    """What a form is made of.

    Attributes:
        program: The model as it was captured.
        keep: The masks: kept input channels by weight.
        pipeline: The spelling of the pipeline of the form ``narrows``; empty for the usual one.
        batch: The number of examples to choose reads and widths for.
    """

    program: Program
    keep: Keep
    pipeline: str = ""
    batch: int = 1

    def plan(self) -> ChannelPlan:
        """Return the plan of the masks alone."""
        return narrows.plan(self.program, keep_inputs=self.keep, zeros=False)


def tidied(program: Program) -> Program:
    """Return a program with norms folded and idle nodes dropped."""
    return Pipeline.parse(TIDY).run(program).program


def unpruned(source: Source, runtime: str) -> Program:
    """Return the model without masks."""
    return tidied(source.program)


def compiled(source: Source, runtime: str) -> Program:
    """Return what narrows makes of the masks for a runtime."""
    return rewritten(source, runtime).program


def rewritten(source: Source, runtime: str) -> PipelineResult:
    """Return what the pipeline makes of the masks, with a report per pass."""
    options: dict[str, Any] = {"pipeline": source.pipeline} if source.pipeline else {}
    if TARGETS[runtime] in target_names():  # passes ask it what is cheap
        options |= {"target": TARGETS[runtime], "batch": source.batch}
    return rewrite(source.program, source.plan(), check=False, **options)


def masks_alone(source: Source, runtime: str) -> Program:
    """Return what narrows makes of the masks for a runtime, every operator as it was called."""
    usual = Pipeline.default(costs=costs_of(TARGETS[runtime])).passes
    pipeline = ", ".join(p.name for p in usual if p.name != ChooseKernels.name)
    return compiled(replace(source, pipeline=source.pipeline or pipeline), runtime)


def plain(source: Source, runtime: str) -> Program:
    """Return the pruned model with a copy wherever a consumer reads a part of a tensor."""
    return narrows.apply(source.program, source.plan(), pipeline=PLAIN)


def common(source: Source, runtime: str) -> Program:
    """Return the model without the channels that all their consumers mask, widths rounded up.

    The other masked channels stay, as zero columns of the consumers that mask them.
    """
    pruning = prune(source.program, source.plan()).pruning
    least = demand_of(pruning.choose(Choices()))
    return tidied(emit(pruning.choose(common_mask(facts_of(pruning), least, STEP))))


FORMS: dict[str, Callable[[Source, str], Program]] = {
    "unpruned": unpruned,
    "narrows": compiled,
    "narrows-masks": masks_alone,
    "narrows-plain": plain,
    "common-16": common,
}
# What depends on narrows' passes under development; the other forms are kept from run to run.
CHANGING = ("narrows", "narrows-masks", "narrows-plain")
PEERS = ("upscale-default", "upscale-narrow", "torch-pruning", "torch-pruning-16")
SAME_FUNCTION = (*FORMS, "upscale-default", "upscale-narrow")
