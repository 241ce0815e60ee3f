"""`in_rounds`: budgets met in steps, by what the outputs lose, the rest repaired after each.

What a channel costs depends on which others are there. So each round measures the network as it is
by then, and what is kept is counted in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from glob import escape

from narrows.passes.choosing.budgets.base import Goal
from narrows.passes.choosing.compensations.least_squares import QUICK
from narrows.passes.choosing.left import Left
from narrows.passes.choosing.losses import Losses
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.products import ON_THE_WAY
from narrows.passes.choosing.reads import reads_of
from narrows.passes.choosing.repair import repaired
from narrows.passes.choosing.statistics import pieces
from narrows.passes.plans.plan import ChannelPlan, fingerprint
from narrows.passes.plans.setting import Setting

ROUNDS = 3


def in_rounds(
    setting: Setting,
    goals: Sequence[Goal],
    once: Callable[[Setting, Sequence[Goal]], ChannelPlan],
) -> ChannelPlan:
    """Return a plan that meets goals.

    Args:
        setting: The setting, with data.
        goals: The goals.
        once: Returns the plan of one round, of a program with the weights that it has by then and
            with a criterion in nats.
    """
    base = current = prepared(setting.program)
    reads = reads_of(base)
    parts = pieces(base, setting.batches())
    # What a shared weight reads is not measured, and stays.
    shared = {p.layer.weight for p in reads.products if len(base.users_of(p.layer.weight)) > 1}
    options = setting.options
    options = replace(options, exclude=(*options.exclude, *map(escape, sorted(shared))))
    made = setting.plan
    for turn in range(1, ROUNDS + 1):
        steps = [replace(g, share=1 - (1 - g.share) * turn / ROUNDS, asked=g.share) for g in goals]
        losses = Losses.of(current, parts, setting.choosing.outputs)
        asked = replace(options, criterion=losses)
        now = replace(setting, program=current, options=asked, parts=tuple(parts))
        made = once(now, steps)
        if turn < ROUNDS:
            left = Left.by(reads, made)
            current = repaired(base, current, reads, left, parts, QUICK, rows=ON_THE_WAY)
        told = ", ".join(f"{step.share:.3f} of the {step.budget.name}" for step in steps)
        setting.tell(f"round {turn} of {ROUNDS}: {told}", turn, ROUNDS)
    return replace(made, fingerprint=fingerprint(setting.program)).with_notes(*reads.notes)


__all__ = ["in_rounds"]
