"""Plans of a latency in which layers choose for themselves, where the form makes that free.

A plan of whole couplings (`narrows.passes.plans.latency`) keeps the most for its seconds as long as
all that read a tensor read all of it. So it is where the search begins. A *gift* lets one reader of
a coupling, or all, have channels back that were gone, which are then made again; a *cut* takes
channels from one reader alone, which another may still need. What each comes to is what is
predicted for the program that the passes make, copies and widths included. A gift is taken if it is
within the latency, by itself or with a cut that loses less than it gives. So the result keeps no
less score mass than the plan of whole couplings, at no more than the latency.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from narrows.ir.program import Note, Program
from narrows.passes.plans.mass import kept_mass, shares
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.plans.rank import Candidate, Part, Ranking

TRIALS = 60  # programs that are made to see what they take, at most
FEW = 6  # moves of a kind that are tried before others are looked at
NEAR = 1e-9  # of the score mass: less is nothing

Seconds = Callable[[ChannelPlan], float]


@dataclass(frozen=True, eq=False)
class Move:
    """Channels of a coupling that come back, or go.

    Attributes:
        candidate: The coupling.
        channels: Which of its channels.
        readers: The layers that get them, or lose them.
        worth: The score mass that is won, below 0 where it is lost.
        back: Whether they come back.
    """

    candidate: Candidate
    channels: np.ndarray
    readers: tuple[Part, ...]
    worth: float
    back: bool

    def of(self, plan: ChannelPlan) -> ChannelPlan:
        """Return the plan with the move made."""
        keeps = {"inputs": dict(plan.inputs), "outputs": dict(plan.outputs)}
        widths, reasons = dict(plan.widths), dict(plan.reasons)
        for part in self.candidate.parts:
            use, keep = part.use, keeps[part.side]
            handed = self.back and (part.side == "outputs" or not use.sums)
            if not handed and not any(part is reader for reader in self.readers):
                continue
            held = np.array(keep.get(use.weight, range(use.width(part.side))), dtype=int)
            own = part.own[self.channels].flatten()
            now = np.union1d(held, own) if self.back else np.setdiff1d(held, own)
            if use.weight in keep or len(now) < len(held):
                keep[use.weight] = tuple(now.tolist())
                widths[use.weight] = use.inputs, use.outputs
                reasons.setdefault(use.weight, "loosened")
        return replace(plan, **keeps, widths=widths, reasons=reasons)

    def undoes(self, other: Move) -> bool:
        """Whether it gives back what another one takes."""
        return self.candidate is other.candidate and bool(
            np.intersect1d(self.channels, other.channels).size
        )


@dataclass
class Loosening:
    """Looks for moves.

    Attributes:
        program: The program.
        ranking: What scores channels.
        candidates: The couplings that may lose channels.
        steps: Per candidate by how many channels its width should change.
        seconds: What is predicted for a plan.
        most: The seconds that it may take.
        layers: How many layers the mass is the mean of.
    """

    program: Program
    ranking: Ranking
    candidates: Sequence[Candidate]
    steps: Sequence[int]
    seconds: Seconds
    most: float
    layers: int
    tried: int = 0
    _shares: dict[int, np.ndarray] = field(default_factory=dict)

    def run(self, plan: ChannelPlan, seconds: float) -> tuple[ChannelPlan, float]:
        """Return a plan of no less mass within the latency, and its seconds.

        Args:
            plan: The plan of whole couplings.
            seconds: What it takes.
        """
        begun = True
        while begun and self.tried < TRIALS:
            begun = False
            gifts = sorted(self._moves(plan, back=True), key=lambda m: -m.worth)
            dear: list[tuple[Move, float]] = []
            for gift in gifts:
                found = self._try(gift.of(plan))
                if found is None:
                    break
                if found <= self.most:
                    plan, seconds, begun = gift.of(plan), found, True
                    break
                dear.append((gift, found - seconds))
                if len(dear) == FEW:
                    break
            if not begun:
                swapped = self._swapped(plan, seconds, dear)
                if swapped is not None:
                    (plan, seconds), begun = swapped, True
        return plan, seconds

    def _swapped(
        self, plan: ChannelPlan, seconds: float, dear: Sequence[tuple[Move, float]]
    ) -> tuple[ChannelPlan, float] | None:
        """Return a plan in which a gift that is too dear is paid for by a cut; ``None`` if none."""
        cuts = sorted(self._moves(plan, back=False), key=lambda m: -m.worth)[:FEW]
        for cut in cuts:
            saved = self._try(cut.of(plan))
            if saved is None:
                return None
            saved = seconds - saved
            for gift, cost in dear:
                dear_still = seconds + cost - saved > self.most
                if dear_still or gift.worth + cut.worth <= NEAR or gift.undoes(cut):
                    continue
                both = gift.of(cut.of(plan))
                found = self._try(both)
                if found is not None and found <= self.most:
                    return both, found
        return None

    def _try(self, plan: ChannelPlan) -> float | None:
        """Return the seconds of a plan; ``None`` where enough were tried."""
        if self.tried >= TRIALS:
            return None
        self.tried += 1
        return self.seconds(plan)

    # ------------------------------------------------------------------ moves

    def _moves(self, plan: ChannelPlan, *, back: bool) -> Iterator[Move]:
        """Yield what may come back, or go, a step of channels at a time."""
        for candidate, step in zip(self.candidates, self.steps, strict=True):
            readers = [p for p in candidate.parts if p.side == "inputs" and p.use.sums]
            sets: list[tuple[Part, ...]] = [(reader,) for reader in readers]
            if back and len(readers) > 1:
                sets.append(tuple(readers))
            for chosen in sets:
                move = self._move(plan, candidate, chosen, step, back)
                if move is not None:
                    yield move

    def _move(
        self,
        plan: ChannelPlan,
        candidate: Candidate,
        readers: tuple[Part, ...],
        step: int,
        back: bool,
    ) -> Move | None:
        """Return the move of one step of channels that some readers win most by, or lose least."""
        count = len(candidate.scores)
        worth, there = np.zeros(count), np.zeros(count, dtype=bool)
        for part in readers:
            held = plan.inputs.get(part.use.weight)
            own = np.ones(part.use.width("inputs"), dtype=bool)
            if held is not None:
                own[:] = False
                own[list(held)] = True
            kept = own[part.own].all(1)
            there |= kept
            worth += np.where(kept == back, 0.0, self._scored(part))
        if back:
            open_ = np.flatnonzero(worth > 0)
            chosen = open_[np.argsort(-worth[open_], kind="stable")][:step]
        else:
            open_ = np.flatnonzero(there)
            spare = len(open_) - step >= self.ranking.options.min_width
            chosen = open_[np.argsort(worth[open_], kind="stable")][: step if spare else 0]
        total = float(worth[chosen].sum()) / self.layers
        if not len(chosen) or (back and total <= NEAR):
            return None
        return Move(candidate, chosen, readers, total if back else -total, back)

    def _scored(self, part: Part) -> np.ndarray:
        """Return per channel of a coupling the share of a reader's mass that it is."""
        if id(part) not in self._shares:
            given = self.ranking.scores(part)
            self._shares[id(part)] = shares(given)[part.own].sum(1)
        return self._shares[id(part)]


def loosened(loosening: Loosening, plan: ChannelPlan, seconds: float) -> tuple[ChannelPlan, float]:
    """Return the plan in which layers choose for themselves, and its seconds.

    It is the plan of whole couplings, with a note, where nothing keeps more within the latency.
    """
    program, criterion = loosening.program, loosening.ranking.options.criterion
    found, now = loosening.run(plan, seconds)
    before, after = (kept_mass(program, p, criterion) for p in (plan, found))
    if after <= before:
        why = "no layer keeps more by itself within the latency: whole couplings go"
        return plan.with_notes(Note(program.name, "coupled", why)), seconds
    said = f"layers choose for themselves: {after:.3f} of the score mass kept, {before:.3f} before"
    return found.with_notes(Note(program.name, "loosened", said)), now


__all__ = ["Loosening", "loosened"]
