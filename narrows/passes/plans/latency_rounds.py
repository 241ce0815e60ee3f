"""`in_rounds`: a latency reached in steps, by what the outputs lose, the rest repaired after each.

What a channel costs depends on which others are there. So each round measures the network as it is
by then, and the mass that the search keeps is in nats.
"""

from __future__ import annotations

from dataclasses import replace
from glob import escape

from narrows.ir.program import Program
from narrows.passes.choosing.losses import Losses
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.reads import reads_of
from narrows.passes.choosing.repair import Left, Progress, repaired
from narrows.passes.choosing.statistics import pieces
from narrows.passes.plans.latency import Aim, aimed
from narrows.passes.plans.options import Choosing
from narrows.passes.plans.plan import ChannelPlan, fingerprint
from narrows.passes.plans.rank import Options
from narrows.passes.quant.batches import CHOOSING, batches

ROUNDS = 3


def in_rounds(
    program: Program,
    given: ChannelPlan,
    plan: ChannelPlan,
    options: Options,
    aim: Aim,
    choosing: Choosing,
    progress: Progress | None,
) -> ChannelPlan:
    """Return a plan that reaches a latency.

    Args:
        program: The program as captured.
        given: The masks that were given; `plan`: they, and what is zero anyway.
        options: Which layers may lose channels, and how many stay at least.
        aim: The latency.
        choosing: The data, and what the outputs are.
        progress: Told what is done, how far it is and of how much.
    """
    base = current = prepared(program)
    reads = reads_of(base)
    parts = pieces(base, [*batches(program, choosing.data, "choosing", CHOOSING)])
    # What a shared weight reads is not measured, and stays.
    shared = {p.layer.weight for p in reads.products if len(base.users_of(p.layer.weight)) > 1}
    options = replace(options, exclude=(*options.exclude, *map(escape, sorted(shared))))
    made = plan
    for turn in range(1, ROUNDS + 1):
        share = 1 - (1 - aim.share) * turn / ROUNDS
        losses = Losses.of(current, parts, choosing.outputs)
        step = replace(aim, share=share)
        made = aimed(current, given, plan, replace(options, criterion=losses), step)
        if turn < ROUNDS:
            current = repaired(base, current, reads, Left.by(reads, made), parts)
        if progress is not None:
            progress(f"round {turn} of {ROUNDS}: {share:.3f} of the latency", turn, ROUNDS)
    return replace(made, fingerprint=fingerprint(program)).with_notes(*reads.notes)


__all__ = ["in_rounds"]
