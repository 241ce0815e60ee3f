"""Plans that come down to a share of the multiply-accumulates, or of the weights.

With data it is searched by what the network's own outputs lose (`searched`); a criterion's ranking
is cut where the share is met (`bisected`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from narrows.errors import PlanError
from narrows.ir.couplings import Coupling
from narrows.ir.program import Note, Program
from narrows.ir.structure import structure_of
from narrows.ir.structure.layers import layers_of
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.reads import Floats, Reads, reads_of
from narrows.passes.choosing.repair import Progress
from narrows.passes.choosing.search import Search
from narrows.passes.plans.options import Choosing
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.plans.rank import Options, Ranking, ranked
from narrows.passes.quant.batches import CHOOSING, batches

TURNS = 12  # halvings of the ratio
NEAR = 0.002  # of the share: close enough

Cost = Callable[[Reads], Floats]

COSTS: dict[str, tuple[str, Cost]] = {
    "macs": ("multiply-accumulates", lambda reads: reads.macs),
    "params": ("weights", lambda reads: reads.parameters),
}


def searched(
    program: Program,
    given: ChannelPlan,
    plan: ChannelPlan,
    options: Options,
    choosing: Choosing,
    progress: Progress | None,
) -> ChannelPlan:
    """Return the plan of a search by what the outputs lose; see `narrows.passes.choosing.search`.

    Args:
        program: The program as captured.
        given: The masks that were given; their layers are left alone. `plan`: they, and what is
            zero anyway.
        options: Which layers may lose channels, and how many stay at least.
        choosing: The budget, the data, and what the outputs are.
        progress: Told what is done, how far it is and of how much.
    """
    name, share = choosing.aim
    what, cost = COSTS[name]

    base = prepared(program)
    ties = structure_of(base).ties
    chooser = Ranking(base, layers_of(base), given, plan, options)
    candidates = chooser.coupled(ties) if choosing.constrained else chooser.single(("inputs",))
    chooser.refuse_none(candidates)
    open_ties = {id(c.coupling) for c in candidates}
    open_weights = {part.use.weight for c in candidates for part in c.parts}

    def free(weight: str, tie: Coupling) -> bool:
        return id(tie) in open_ties if choosing.constrained else weight in open_weights

    search = Search(
        program, [*batches(program, choosing.data, "choosing", CHOOSING)], cost,
        constrained=choosing.constrained, free=free, plan=plan, least=choosing.min_width,
        outputs=choosing.outputs, progress=progress,
    )  # fmt: skip
    found = search.to(share)
    made = ChannelPlan.given(program, found.keep_inputs(), None, f"{name} {share:g}")
    curve = ", ".join(f"{left:.3f}: {far:.3g}" for left, far in found.curve)
    told = f"share of the {what} left: divergence from the unpruned outputs, repaired: {curve}"
    return (plan | made).with_notes(Note(program.name, "curve", told), *found.reads.notes)


def bisected(
    program: Program,
    given: ChannelPlan,
    plan: ChannelPlan,
    options: Options,
    choosing: Choosing,
    progress: Progress | None,
) -> ChannelPlan:
    """Return the plan of the smallest ratio by a criterion that comes to the share.

    The ratio is of all channels together (AdaPruner's bisection, over any criterion).
    """
    name, share = choosing.aim
    what, cost = COSTS[name]
    reads = reads_of(prepared(program))
    each = cost(reads)
    sides = None if choosing.constrained else ("inputs",)
    low, high, best, least = 0.0, 1.0, None, 1.0
    everything = replace(options, ratios=(("*", 1.0),), scope="global")
    ranked(program, given, plan, everything, sides)  # fails if there is nothing to choose from
    for turn in range(TURNS):
        ratio = (low + high) / 2
        overall = replace(options, ratios=(("*", ratio),), scope="global")
        try:
            made = ranked(program, given, plan, overall, sides)
        except PlanError:  # so small a ratio removes nothing
            made = plan
        left = reads.cost(reads.left_by(made), each) / reads.whole(each)
        least = min(least, left)
        if left > share:
            low = ratio
        else:
            high, best = ratio, made
        if progress is not None:
            progress(f"ratio {ratio:.4f}: {left:.3f} of the {what}", turn + 1, TURNS)
        if 0 <= share - left < NEAR:
            break
    if best is None:
        raise PlanError(
            f"a budget of {share:g} cannot be met: {least:.3f} is the least",
            why="every layer keeps a channel, and what inputs and outputs need stays",
            hint="a larger budget" + (", or constrained=False" if choosing.constrained else ""),
        )
    return best


__all__ = ["bisected", "searched"]
