"""`Search`: from a program, data and a budget to what is kept, by descent and repair in turns.

A round measures the network as it is by now, goes a step down toward the budget, and repairs what
is left. So every choice is made for a network that works, and one search passes every larger
budget on its way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from narrows.ir.couplings import Coupling
from narrows.ir.labels import Bools
from narrows.ir.program import Program
from narrows.ir.structure import structure_of
from narrows.ir.structure.branches import Branches
from narrows.passes.choosing.budgets.base import SLACK, nothing_to_cut, unreachable
from narrows.passes.choosing.compensations.least_squares import QUICK
from narrows.passes.choosing.descent import together
from narrows.passes.choosing.joint import descend_all
from narrows.passes.choosing.judged import Judged
from narrows.passes.choosing.left import Left
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.products import ON_THE_WAY
from narrows.passes.choosing.reads import Floats, Reads, reads_of
from narrows.passes.choosing.repair import Progress, repaired
from narrows.passes.choosing.scales import few, scales
from narrows.passes.choosing.statistics import (
    Batch,
    Statistics,
    at_least,
    measured,
    pieces,
    split,
)
from narrows.passes.choosing.surgeon import surgeons_of
from narrows.passes.plans.plan import ChannelPlan

STEP = 0.1  # of the cost goes in a round at most
ENOUGH = 256  # examples for a repair on the way; what comes after the search has all
MEMORY = 0.5  # of the factors of the rounds before: what is measured of one layer scatters


@dataclass(frozen=True)
class Chosen:
    """What a search has come to.

    Attributes:
        program: The unpruned program, prepared, with the weights that are left, solved for.
        reads: Its reads.
        there: Per read whether it is there.
        factors: Per layer what its costs are multiplied with; ``None`` before the first round.
        curve: After every round the share of the first cost that is left, and how far the outputs
            are from the unpruned network's on the data.
    """

    program: Program
    reads: Reads
    there: Bools
    factors: Floats | None = None
    curve: tuple[tuple[float, float], ...] = ()

    def keep_inputs(self) -> dict[str, list[int]]:
        """Return per weight the input channels that are left, where some are gone."""
        result = {}
        for product, own in zip(self.reads.products, self.reads.of_layer, strict=True):
            if self.there[own].all():
                continue
            gone = {int(c) for r in own[~self.there[own]] for c in self.reads.columns[r]}
            stays = [c for c in range(product.layer.inputs) if c not in gone]
            result[product.layer.weight] = stays
        return result


class Search:
    """A search, as far as it has come.

    Attributes:
        base: The unpruned program, prepared.
        divergence: How outputs are compared.
        state: What it has come to. It may be set back to an earlier one.
    """

    def __init__(
        self,
        program: Program,
        batches: Sequence[Batch],
        costs: Mapping[str, Callable[[Reads], Floats]],
        *,
        constrained: bool = False,
        free: Callable[[str, Coupling], bool] = lambda weight, coupling: True,
        plan: ChannelPlan | None = None,
        least: int = 1,
        outputs: str = "auto",
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """Begin with everything.

        Args:
            program: The program as captured.
            batches: Flat inputs, batch by batch; no labels.
            costs: The costs to come down by name, each per layer of one input channel for one
                output channel: ``Reads.macs``.
            constrained: Whether channels go from all that read them at once.
            free: Whether the layer of a weight may lose channels of a coupling. With
                ``constrained`` all that read it have to.
            plan: What is masked from the beginning.
            least: How many channels every layer reads at least.
            outputs: How outputs are compared: ``logits``, ``values`` or ``auto``.
            seed: Of the probes.
            progress: Told what is done, how far it is and of how much.
        """
        self.base = base = prepared(program)
        ties = structure_of(base).ties
        reads = _limited(reads_of(base), ties, free)
        self.names = [*costs]
        self.each = [cost(reads) for cost in costs.values()]
        self.full = [reads.whole(each) for each in self.each]
        for name, full in zip(self.names, self.full, strict=True):
            if not full:
                raise nothing_to_cut(name)
        self.halves = split(base, pieces(base, batches))
        self.batches = [*self.halves[0], *self.halves[1]]
        self.some = at_least(base, self.batches, ENOUGH)
        self.open_past = Branches(base, ()).open_past
        self.judged = Judged.of(base, self.batches, outputs)
        self.divergence = self.judged.divergence
        barred = [bool(tie.barrier) for tie in ties]
        self.group = together(reads, barred) if constrained else None
        self.least, self.seed = least, seed
        self.tell = progress if progress is not None else lambda what, done, of: None
        self.begun = Left.of(reads, reads.all())
        self.state = Chosen(base, reads, reads.all())
        if plan is not None and plan.removed:
            self.begun = Left.by(reads, plan)
            weights = self.begun.masked(reads.products, base.weights)
            self.state = Chosen(base.with_weights(weights), reads, reads.left_by(plan))

    def down(self, *shares: float) -> Chosen:
        """Go a round down to a share of each cost, or as far as it goes."""
        now, reads = self.state, self.state.reads
        step = f"round {len(now.curve) + 1}, to {', '.join(f'{share:.3f}' for share in shares)}"
        seed = self.seed + len(now.curve)
        parts = [measured(now.program, reads, h, self.divergence, seed) for h in self.halves]
        self.tell(f"{step}: layers measured", 1, 4)
        folds = [(parts[i], few(now.program, self.halves[1 - i], reads)) for i in (0, 1)]
        factors = scales(now.program, reads, folds, self.divergence, now.there)
        if now.factors is not None:
            factors = now.factors**MEMORY * factors ** (1 - MEMORY)
        self.tell(f"{step}: what their errors do, measured", 2, 4)
        surgeons = surgeons_of(now.program, reads, Statistics.mean(parts), now.there)
        goals = [full * share for full, share in zip(self.full, shares, strict=True)]
        costs = list(zip(self.each, self.full, goals, strict=True))
        there = descend_all(
            reads, surgeons, factors, now.there, costs, self.group, self.least, self.open_past
        )
        self.tell(f"{step}: chosen", 3, 4)
        left_over = self.begun & Left.of(reads, there)
        program = repaired(
            self.base, now.program, reads, left_over, self.some, QUICK, rows=ON_THE_WAY
        )
        left = self.left(there)[0]
        curve = (*now.curve, (left, self.judged.far(program)))
        self.state = Chosen(program, reads, there, factors, curve)
        self.tell(f"{step}: {left:.3f} left, divergence {curve[-1][1]:.4g}", 4, 4)
        return self.state

    def to(self, *shares: float, rounds: int = 0) -> Chosen:
        """Go down to a share of each cost in equal steps, of `STEP` at most.

        Args:
            shares: The shares that may be left.
            rounds: In how many steps, in place of that.

        Raises:
            PlanError: One of them cannot be reached.
        """
        begun = self.left(self.state.there) if self.state.curve else [1.0 for _ in shares]
        most = max(b - share for b, share in zip(begun, shares, strict=True))
        rounds = rounds or max(1, math.ceil(most / STEP - 1e-9))
        for turn in range(1, rounds + 1):
            pairs = zip(begun, shares, strict=True)
            found = self.down(*(b - (b - share) * turn / rounds for b, share in pairs))
        lefts = self.left(self.state.there)
        for name, share, left in zip(self.names, shares, lefts, strict=True):
            if left > share * (1 + SLACK):
                raise unreachable(name, share, left, self.group is not None)
        return found

    def left(self, there: Bools) -> list[float]:
        """Return the share of each cost that is left."""
        pairs = zip(self.each, self.full, strict=True)
        return [self.state.reads.cost(there, each) / full for each, full in pairs]


def _limited(
    reads: Reads, ties: Sequence[Coupling], free: Callable[[str, Coupling], bool]
) -> Reads:
    """Return reads of which only those may go that a rule leaves free."""
    pairs = dict.fromkeys(zip(reads.layer.tolist(), reads.tie.tolist(), strict=True))
    known = {(j, t): free(reads.products[j].layer.weight, ties[t]) for j, t in pairs}
    open_ = [known[pair] for pair in zip(reads.layer.tolist(), reads.tie.tolist(), strict=True)]
    return replace(reads, free=reads.free & np.array(open_, dtype=bool))


__all__ = ["Chosen", "Search"]
