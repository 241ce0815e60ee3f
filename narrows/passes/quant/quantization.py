"""`quantize`: a program and calibration data become an integer program, in four steps.

1. *Prepare*, exactly: fold norms, take attention apart, put clips where codes end.
2. *Calibrate*: stream the data and choose a grid for every tensor: the `QuantPlan`. Or
   *reconstruct*, block by block, which chooses the codes of the weights, too.
3. *Quantize*: round to the grids; the fake-quantized program.
4. *Fold*: turn scales into shifts; the integer program, equal to the fake-quantized one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from narrows.errors import PassError, UsageError
from narrows.ir.meta import Meta
from narrows.ir.program import Program
from narrows.passes.convert_batch_norm import ConvertBatchNorm
from narrows.passes.decompose_attention import DecomposeAttention
from narrows.passes.eliminate_dead import EliminateDead
from narrows.passes.fold_batch_norm import FoldBatchNorm
from narrows.passes.pipeline import Instrument, PassReport, Pipeline
from narrows.passes.quant.batches import kept
from narrows.passes.quant.calibrate import calibrate
from narrows.passes.quant.choose_levels import choose_levels
from narrows.passes.quant.choose_method import choose_method
from narrows.passes.quant.equalize_channels import EqualizeChannels
from narrows.passes.quant.exactness import assert_exact
from narrows.passes.quant.fold_shifts import FoldShifts
from narrows.passes.quant.fold_weights import FoldWeights
from narrows.passes.quant.learning import Learning
from narrows.passes.quant.measure import SAMPLES, measure
from narrows.passes.quant.options import AUTO, Quantization
from narrows.passes.quant.plan import Preparation, QuantPlan
from narrows.passes.quant.quantize import Quantize
from narrows.passes.quant.rapq import rapq
from narrows.passes.quant.record import record
from narrows.passes.quant.report import QuantReport
from narrows.passes.quant.scale_parts import ScaleParts
from narrows.passes.quant.survey import survey
from narrows.passes.quant.widen_clips import WidenClips


@dataclass(frozen=True)
class Quantized:
    """What `narrows.quantize` made.

    Attributes:
        program: The integer program: the reference for every backend. Lower this one.
        plan: The grids and what rounding made of the weights, as data; `QuantPlan.save` keeps them.
        fake: The fake-quantized program, floating-point; ``program`` equals it bit for bit.
        prepared: The float program that the plan is for.
        passes: What every pass did, from preparation to shifts.
    """

    program: Program
    plan: QuantPlan
    fake: Program
    prepared: Program
    passes: tuple[PassReport, ...] = ()

    def report(self, data: Iterable[Any], *, samples: int = SAMPLES) -> QuantReport:
        """Return what quantization costs: ranges, clipping, errors and ratios, tensor by tensor.

        >>> report = quantized.report([images])
        >>> print(report)
        >>> report.save("out.report")        # text, JSON, and a page with plots

        Args:
            data: Batches as for `narrows.quantize`, streamed once.
            samples: On how many samples each quantizer is switched off in turn, to see what it
                costs the outputs; 0 leaves that out. It takes half a run per quantizer.

        Raises:
            UsageError: There is no data, or an argument is out of range.
            ProgramError: The data does not fit the program.
            PassError: It gives NaN or infinity.
        """
        return measure(self.prepared, self.fake, self.program, self.plan, data, samples)


def preparation(bits: int = 8, *, equalize: bool = False) -> Pipeline:
    """Return the passes that run before calibration.

    Args:
        bits: How many bits activations will have.
        equalize: Whether to balance the channel ranges of layers that follow each other.
    """
    folds = FoldWeights(), FoldBatchNorm(), ConvertBatchNorm()
    balance = (EqualizeChannels(),) if equalize else ()
    return Pipeline(
        (*folds, DecomposeAttention(), WidenClips(bits=bits), *balance, EliminateDead())
    )


def quantize(
    program: Program,
    calibration: Iterable[Any] | None,
    settings: Quantization,
    *,
    plan: QuantPlan | None = None,
    instruments: Iterable[Instrument] = (),
    learning: Learning | None = None,
) -> Quantized:
    """Return a program quantized; `narrows.quantize` tells of the arguments.

    Args:
        program: A captured or pruned program in float32 or float64.
        calibration: Its inputs, batch by batch.
        settings: The options.
        plan: A plan to use in place of calibration and options.
        instruments: What watches the passes.
        learning: How ``rapq`` learns, in place of what the options say; for experiments.

    Raises:
        PassError: The program is quantized already, or cannot be.
        UsageError: There is no calibration data, or it does not fit; or there is something beside a
            plan that it leaves nothing to say about.
        PlanError: The plan is of another program.
    """
    if any(Meta(n).grid is not None for n in program.graph.nodes):
        raise PassError(f"{program.name} is quantized already", hint="quantize the float program")
    _refuse_halves(program)
    _refuse_idle(plan, settings, calibration)
    how = _how(plan, settings)
    watches = list(instruments)
    begun = preparation(how.bits, equalize=how.equalize).run(program, watches)
    stored: list[Any] = []
    if plan is not None:
        chosen = plan
    elif settings.method == "rapq" or settings.levels:
        stored = kept(calibration)
        chosen = _reconstructed(
            program, begun.program, stored, settings, learning or settings.learning
        )
    else:
        chosen = _calibrated(begun.program, calibration, settings)
    scale = [ScaleParts(chosen)] if chosen.parts else []
    prepared = Pipeline(scale).run(begun.program, watches)
    fake = Pipeline([Quantize(chosen)]).run(prepared.program, watches)
    folded = Pipeline([FoldShifts()]).run(fake.program, watches)
    if stored:
        assert_exact(fake.program, folded.program, stored[0])
    if chosen.record is None:
        found = survey(prepared.program, floats=chosen.floats)
        made = record(chosen, found, fake.program, folded.program)
        chosen = replace(chosen, record=made, preparation=how)
    reports = (*begun.reports, *prepared.reports, *fake.reports, *folded.reports)
    return Quantized(folded.program, chosen, fake.program, prepared.program, reports)


def _refuse_idle(plan: QuantPlan | None, settings: Quantization, calibration: Any) -> None:
    """Raise `UsageError` for what would have no effect beside a plan.

    A plan that does not say how a program is prepared leaves that to the settings.
    """
    if plan is None:
        return
    if calibration is not None:
        raise UsageError(
            "calibration would have no effect beside a plan",
            why="grids are measured on data, or read from a plan",
            hint="leave out one of them; Quantized.report(data) measures what a plan costs",
        )
    settings.refuse_idle(("activations", "equalize") if plan.preparation is None else ())


def _how(plan: QuantPlan | None, settings: Quantization) -> Preparation:
    """Return how to prepare a program: as the plan says, or as the settings ask for."""
    if plan is not None and plan.preparation is not None:
        return plan.preparation
    bits = settings.activations if isinstance(settings.activations, int) else 8
    return Preparation(bits, settings.equalize)


def _refuse_halves(program: Program) -> None:
    """Raise `PassError` for a program whose weights or inputs are 16 bits wide."""
    held = [*program.weights.values(), *(e for e in program.examples if isinstance(e, Tensor))]
    found = {t.dtype for t in held if t.is_floating_point() and t.dtype.itemsize < 4}
    if found:
        raise PassError(
            f"{program.name} is in {' and '.join(sorted(map(str, found)))}",
            why="grids are measured and chosen in float32, or finer",
            hint="narrows.quantize(program.to(torch.float32), data), with data in float32",
        )


def _calibrated(prepared: Program, data: Iterable[Any] | None, settings: Quantization) -> QuantPlan:
    """Return the plan of a method that streams the data, or of the best of them."""
    choose = choose_method if settings.method == AUTO else calibrate
    return choose(prepared, data, settings)


def _reconstructed(
    program: Program,
    prepared: Program,
    data: list[Any],
    settings: Quantization,
    learning: Learning | None,
) -> QuantPlan:
    """Return the plan of the methods that look at what blocks compute, and keep the data for it."""
    if settings.method == "rapq":
        plan = rapq(program, prepared, data, settings, learning or Learning())
    else:
        plan = _calibrated(prepared, data, settings)
    fitting = ScaleParts(plan).run(prepared).program
    return choose_levels(fitting, plan, data) if settings.levels else plan


__all__ = ["Quantized", "preparation", "quantize"]
