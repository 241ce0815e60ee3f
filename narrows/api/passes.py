"""The passes that `narrows.apply` and `narrows.compile` run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from narrows.api.planning import plan_for
from narrows.errors import UsageError

if TYPE_CHECKING:
    from narrows.ir.program import Program
    from narrows.passes.pipeline import Instrument, Pipeline


def passes_for(
    program: Program, plan: Any, target: Any, batch: Any, pipeline: Any, integers: bool
) -> Pipeline:
    """Return the pipeline that the arguments of `apply` ask for."""
    from narrows.backends import costs_of
    from narrows.passes.pipeline import pipeline_for

    idle = "batch" if batch is not None else "integers" if integers else ""
    if idle and target is None:
        raise UsageError(f"{idle} would have no effect without a target", hint='target="onnx"')
    if isinstance(plan, Mapping):
        batch = plan.get("batch") if batch is None else batch
        plan = plan_for(program, plan, target, integers)
    costs = None if target is None else costs_of(target, integers)
    if batch is not None and costs is None:
        raise UsageError(
            "batch would have no effect with a target that has no cost table",
            why="it says for how many examples reads and widths are chosen, by measured costs",
            hint="leave it out; a size that a target fixes is its own option: tvm{batch=4}",
        )
    batch = 1 if batch is None else batch
    return pipeline_for(plan, pipeline, costs, batch, fold=target is not None)


def checks_of(passes: Pipeline, check: bool, double: bool = False) -> list[Instrument]:
    """Return what watches passes for `apply` and `compile`: every one is verified and held to its
    reference, or it is noted that nobody did so."""
    from narrows.passes.instruments import Verify
    from narrows.passes.proof import Numerics, Unproven

    return [Verify(), Numerics(double=double)] if check else [Unproven(len(passes.passes))]
