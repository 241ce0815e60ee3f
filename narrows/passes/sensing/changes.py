"""Which changes there are of a network: couplings by ratios, and quantizers by bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from narrows.errors import PlanError
from narrows.ir.program import Program
from narrows.ir.structure.layers import SIDES, layers_of
from narrows.passes.choosing.criteria.base import GRADIENTS, Remembered
from narrows.passes.choosing.criteria.catalog import find, measures
from narrows.passes.choosing.evidence import informed
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.reads import reads_of
from narrows.passes.plans.plan import ChannelPlan, refuse_nan
from narrows.passes.plans.rank import Candidate, Options, Ranking
from narrows.passes.quant.measure import activation_quantizers, weight_quantizers
from narrows.passes.quant.options import Quantization
from narrows.passes.quant.quantization import quantize
from narrows.passes.quant.survey import survey
from narrows.passes.sensing.jobs import Change, Masked, Rounded
from narrows.passes.sensing.options import Sensing
from narrows.passes.sensing.table import Row


@dataclass(frozen=True)
class Changes:
    """What is to be tried.

    Attributes:
        rows: Each change with its row, whose numbers are not known yet.
        skipped: What cannot be changed, or is not, each with the reason.
        prepared: Per number of bits the network as it is rounded.
    """

    rows: tuple[tuple[Change, Row], ...]
    skipped: dict[str, str]
    prepared: dict[int, Program]

    @staticmethod
    def of(program: Program, data: Sequence[Any], options: Sensing) -> Changes:
        """Return the changes that options ask for.

        Args:
            program: The network.
            data: Batches as a person gave them: criteria look at them, and grids are chosen on
                them.
            options: What is asked for.
        """
        refuse_nan(program)
        rows: list[tuple[Change, Row]] = []
        skipped: dict[str, str] = {}
        grids: dict[int, Program] = {}
        if options.ratios:
            rows += _pruned(program, data, options, skipped)
        for bits in options.bits:
            rows += _rounded(program, data, bits, skipped, grids)
        if not rows:
            why = "; ".join(f"{name}: {text}" for name, text in [*skipped.items()][:5])
            raise PlanError("nothing of the network can be changed", why=why)
        return Changes(tuple(rows), skipped, grids)


def _pruned(
    program: Program, data: Sequence[Any], options: Sensing, skipped: dict[str, str]
) -> Iterator[tuple[Change, Row]]:
    """Yield the channels of every coupling, or of what every layer reads, ratio by ratio."""
    sides = SIDES if options.constrained else ("inputs",)
    criterion = find(options.criterion)
    if measures(criterion):
        probed = getattr(criterion, "data", "") == GRADIENTS  # the others do not look at outputs
        outputs = options.outputs if probed else "auto"
        criterion = informed(program, criterion, data, None, sides, outputs)
    nothing = ChannelPlan.given(program)
    settings = Options(Remembered(criterion), (), (), (), 1, "local")
    chooser = Ranking(program, layers_of(program), nothing, nothing, settings)
    if options.constrained:
        candidates, kind = chooser.coupled(program.couplings()), "coupling"
    else:
        candidates, kind = chooser.single(("inputs",)), "reads"
    skipped |= dict(f"{kind} {text}".split(": ", 1) for text in chooser.skipped)
    reads = reads_of(prepared(program))
    whole = reads.whole(reads.macs)
    for candidate in candidates:
        name, width = _name(candidate), len(candidate.scores)
        for ratio in options.ratios:
            (gone,) = chooser.lowest_each([replace(candidate, ratio=ratio)])
            if not len(gone):
                skipped[f"{kind} {name} -{ratio:g}"] = f"that is none of {width} channels"
                continue
            reasons = {part.use.weight: criterion.name for part in candidate.parts}
            plan = chooser.plan_of([candidate], [gone], reasons)
            left = reads.cost(reads.left_by(plan), reads.macs)
            yield Masked.of(plan), Row(
                kind, name, float(ratio), width, len(gone), left / whole if whole else None,
                None, None, None,
            )  # fmt: skip


def _name(candidate: Candidate) -> str:
    coupling = candidate.coupling
    return candidate.parts[0].use.weight if coupling is None else coupling.name


def _rounded(
    program: Program,
    data: Sequence[Any],
    bits: int,
    skipped: dict[str, str],
    grids: dict[int, Program],
) -> Iterator[tuple[Change, Row]]:
    """Yield every weight and every activation that quantization to so many bits rounds.

    Grids are those that it chooses with all of them at work.
    """
    settings = Quantization(weights=bits, activations=bits, method="mse", first_last=None)
    made = quantize(program, data, settings)
    grids[bits] = made.prepared
    floats = made.plan.floats.items()
    skipped |= {f"{bits} bits {name}": f"stays floating-point: {why}" for name, why in floats}
    weights = weight_quantizers(made.fake, survey(made.prepared, floats=made.plan.floats))
    found = [("weight", name, node) for name, node in weights.items()]
    found += [
        ("activation", name, nodes[0])
        for name, nodes in activation_quantizers(made.fake, made.plan).items()
    ]
    order = {node: i for i, node in enumerate(made.fake.graph.nodes)}
    for kind, name, node in sorted(found, key=lambda entry: order[entry[2]]):
        target: Any = node.target
        assert isinstance(target, torch._ops.OpOverload)
        grid = tuple(tuple(a) if isinstance(a, list | tuple) else a for a in node.args[1:])
        weight, place = (name, "") if kind == "weight" else ("", name)
        change = Rounded(bits, weight, place, target._opname, grid)
        yield change, Row(kind, name, float(bits), 0, 0, None, None, None, None)


__all__ = ["Changes"]
