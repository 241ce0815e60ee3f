"""The channels that matter least, by a criterion: whole couplings, or each layer for itself.

Start at `Ranking.chosen`. A *candidate* is a set of channels of which some may go: those of one
coupling, or those of one side of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from torch import fx

from narrows.errors import PlanError
from narrows.ir.couplings import Coupling, Member
from narrows.ir.ops.args import is_tensor
from narrows.ir.program import Note, Program
from narrows.ir.structure.layers import SIDES, Layer, layers_of
from narrows.passes.choosing.criteria.base import Criterion, NoScoreError, comparable, scores
from narrows.passes.plans.plan import ChannelPlan

Sides = tuple[str, ...]


@dataclass(frozen=True)
class Options:
    """The options of a criterion's choice, checked."""

    criterion: Criterion
    ratios: tuple[tuple[str, float], ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    min_width: int
    scope: str

    def ratio(self, weight: str) -> tuple[float, int]:
        """Return the ratio of a weight, and which of the globs is the first that matches it."""
        found = ((r, n) for n, (glob, r) in enumerate(self.ratios) if fnmatchcase(weight, glob))
        return next(found, (0.0, len(self.ratios)))


@dataclass
class Part:
    """What a layer has to do with the channels of a candidate.

    Attributes:
        use: The layer.
        side: ``inputs`` or ``outputs``.
        own: The layer's own channels, ``[width, channels each]``.
    """

    use: Layer
    side: str
    own: np.ndarray


@dataclass
class Candidate:
    """Channels of which some may go.

    Attributes:
        parts: The layers that lose them.
        scores: One per channel.
        ratio: The share of them to remove.
        group: Which glob gave the ratio: channels of one group are ranked together.
        coupling: The coupling whose channels they are; ``None`` for one side of one layer.
    """

    parts: list[Part]
    scores: np.ndarray
    ratio: float
    group: int = 0
    coupling: Coupling | None = None


class Ranking:
    """Finds candidates, ranks their channels, and makes a plan without the lowest."""

    def __init__(
        self,
        program: Program,
        layers: Mapping[str, tuple[Layer, ...]],
        given: ChannelPlan,
        plan: ChannelPlan,
        options: Options,
    ) -> None:
        self.program, self.layers, self.options = program, layers, options
        self.given, self.plan = given, plan
        self.notes: list[Note] = []
        self.skipped: list[str] = []

    # -------------------------------------------------------------- candidates

    def single(self, sides: Sides) -> list[Candidate]:
        """Return every layer's sides, each for itself."""
        nodes = {u.node for layers in self.layers.values() for u in layers}
        own_input, own_output = _from_inputs(self.program, nodes), _to_outputs(self.program, nodes)
        found = []
        for name, layers in self.layers.items():
            first = next((u for u in layers if u.contraction is not None), layers[0])
            for side in sides:
                if not first.width(side):
                    continue
                if side == "inputs" and any(u.x in own_input for u in layers):
                    self.skipped.append(f"{name}: it reads the model's input")
                elif side == "outputs" and any(u.node in own_output for u in layers):
                    self.skipped.append(f"{name}: it makes the model's output")
                else:
                    channels = np.arange(first.width(side))[:, None]
                    found += self.candidate([Part(first, side, channels)], name)
        return found

    def coupled(self, couplings: Iterable[Coupling]) -> list[Candidate]:
        """Return those of the program's couplings that no barrier holds."""
        found = []
        for coupling in couplings:
            if not coupling.barrier:
                parts = [p for p in map(self.part, coupling.members) if p is not None]
                found += self.candidate(parts, coupling.name, coupling) if parts else []
                continue
            self.skipped.append(f"{coupling.name}: {coupling.barrier}")
            note = Note(coupling.name, "barrier", f"its channels stay: {coupling.barrier}")
            self.notes.append(note)
        return found

    def part(self, member: Member) -> Part | None:
        """Return what a coupling's member is to a layer; ``None`` if a plan has no word for it."""
        layers = sorted(self.layers.get(member.weight, ()), key=lambda u: u.contraction is None)
        if not layers or member.role == "with":
            return None
        layer, side = layers[0], "inputs" if member.role == "in" else "outputs"
        if member.axis != layer.axis(side):
            return None
        return Part(layer, side, layer.channels(side, member.positions))

    def candidate(
        self, parts: list[Part], label: str, coupling: Coupling | None = None
    ) -> list[Candidate]:
        """Return the candidate, if globs, explicit masks and the smallest width leave a choice."""
        options, names = self.options, [p.use.weight for p in parts]
        makers = [p.use.weight for p in parts if p.side == "outputs"] or names
        ratios = [options.ratio(name) for name in makers]
        width = len(parts[0].own)
        if options.include and not _matched(makers, options.include):
            why = "include does not name it"
        elif _matched(names, options.exclude):
            why = "exclude names it"
        elif any(p.use.weight in getattr(self.given, p.side) for p in parts):
            why = "it has an explicit mask"
        elif width <= options.min_width:
            why = f"it has {width} channels"
        else:
            scored, why = self.scored(parts)
            if scored:
                values = self.ahead(self.weigh(scored), self.gone(parts))
                return [Candidate(parts, values, *min(ratios), coupling)]
            self.notes.append(Note(label, "unscored", f"its channels stay: {why}"))
        self.skipped.append(f"{label}: {why}")
        return []

    def scored(self, parts: Sequence[Part]) -> tuple[list[Part], str]:
        """Return the parts that the criterion has a score for, and why it has none for another."""
        found, why = [], ""
        for part in parts:
            try:
                self.scores(part)
            except NoScoreError as no:
                why = f"{no.what}, because {no.why}" + (f" (try {no.hint})" if no.hint else "")
            else:
                found.append(part)
        return found, why

    def weigh(self, parts: Sequence[Part]) -> np.ndarray:
        """Return a score per channel of a candidate: the mean over the layers that lose it.

        Args:
            parts: Those that the criterion has a score for.
        """
        return np.mean([self.scores(p)[p.own].sum(1) for p in parts], axis=0)

    def ahead(self, values: np.ndarray, gone: np.ndarray) -> np.ndarray:
        """Return what channels are worth, those that are gone anyway before all others."""
        # Just below the least: means of scores are not to count what is gone.
        below = np.nextafter(np.minimum(values.min(initial=0), 0), -np.inf)
        return np.where(gone, below, values)

    def gone(self, parts: Sequence[Part]) -> np.ndarray:
        """Return per channel whether it is gone anyway: no layer makes it, or none reads it."""
        sides = []
        for side in SIDES:
            own = [self._zero(p)[p.own].all(1) for p in parts if p.side == side]
            sides += [np.logical_and.reduce(own)] if own else []
        return np.logical_or.reduce(sides)

    def _zero(self, part: Part) -> np.ndarray:
        """Return which of a layer's channels are zero anyway, or masked."""
        result = np.zeros(part.use.width(part.side), dtype=bool)
        keep = getattr(self.plan, part.side).get(part.use.weight)
        if keep is not None:
            result[np.setdiff1d(np.arange(len(result)), keep)] = True
        return result

    def scores(self, part: Part) -> np.ndarray:
        """Return the scores of a layer's channels; what is zero anyway has the lowest, or 0."""
        result = scores(self.options.criterion, self.program, part.use, part.side)
        if not len(result):
            return result
        return np.where(self._zero(part), np.minimum(result.min(), 0), result)

    # -------------------------------------------------------------- the lowest

    def chosen(self, candidates: list[Candidate], kind: str) -> ChannelPlan:
        """Return the plan without the channels that score lowest."""
        self.refuse_none(candidates)
        pick = self.lowest_overall if self.options.scope == "global" else self.lowest_each
        gone = pick(candidates)
        if not any(map(len, gone)):
            self.refuse_small(candidates)
        ratios: dict[str, float] = {}
        for candidate, channels in zip(candidates, gone, strict=True):
            for part in candidate.parts if len(channels) else ():
                name = part.use.weight
                ratios[name] = max(ratios.get(name, 0.0), candidate.ratio)
        label = self.options.criterion.name
        reasons = {name: f"{label} {ratio:g} {kind}" for name, ratio in ratios.items()}
        return self.plan_of(candidates, gone, reasons)

    def refuse_none(self, candidates: list[Candidate]) -> None:
        """Raise `PlanError` if there is nothing to choose from."""
        if candidates:
            return
        raise PlanError(
            "no channel can be removed",
            why="; ".join(self.skipped[:5]) + (" ..." if len(self.skipped) > 5 else ""),
            hint="narrows couplings shows what holds which channels, and why",
        )

    def refuse_small(self, candidates: list[Candidate]) -> None:
        """Raise `PlanError` if a ratio was asked for that no candidate is wide enough for."""
        asked = max(c.ratio for c in candidates)
        if asked == 0:
            self.notes.append(Note(self.program.name, "idle", "the plan removes nothing: ratio 0"))
            return
        width = max(len(c.scores) for c in candidates)
        raise PlanError(
            f"a ratio of {asked:g} removes no channel",
            why=f"the widest layer or coupling has {width} channels, "
            f"and {self.options.min_width} must stay",
            hint="give a larger ratio, or a smaller min_width",
        )

    def lowest_each(self, candidates: list[Candidate]) -> list[np.ndarray]:
        """Return the channels that go, by the ratio of each candidate."""
        result = []
        for c in candidates:
            count = min(_share(len(c.scores), c.ratio), len(c.scores) - self.options.min_width)
            result.append(np.argsort(c.scores, kind="stable")[:count])
        return result

    def lowest_overall(self, candidates: list[Candidate]) -> list[np.ndarray]:
        """Return the channels that go when all of one group are ranked together."""
        result = [np.zeros(0, dtype=np.int64)] * len(candidates)
        for group in sorted({c.group for c in candidates}):
            which = [i for i, c in enumerate(candidates) if c.group == group]
            order = [np.argsort(candidates[i].scores, kind="stable") for i in which]
            free = [o[: len(o) - self.options.min_width] for o in order]
            own = [self.ranked(candidates[i].scores) for i in which]
            ranks = [s[o] for s, o in zip(own, free, strict=True)]
            ratio = candidates[which[0]].ratio
            total = _share(sum(len(candidates[i].scores) for i in which), ratio)
            owner = np.repeat(np.arange(len(which)), [len(o) for o in free])
            taken = owner[np.argsort(np.concatenate(ranks), kind="stable")[:total]]
            counts = np.bincount(taken, minlength=len(which))
            for i, count, lowest in zip(which, counts, free, strict=True):
                result[i] = lowest[:count]
        return result

    def ranked(self, given: np.ndarray) -> np.ndarray:
        """Return scores of one candidate so that they compare with another's."""
        return given if comparable(self.options.criterion) else _normalised(given)

    def plan_of(
        self,
        candidates: Sequence[Candidate],
        gone: Sequence[np.ndarray],
        reasons: Mapping[str, str],
    ) -> ChannelPlan:
        """Return the plan that drops some channels of every candidate.

        Args:
            candidates: The candidates.
            gone: Per candidate the channels to drop.
            reasons: Per weight that loses any what the plan's `reasons` say.
        """
        dropped: dict[tuple[str, str], set[int]] = {}
        for candidate, channels in zip(candidates, gone, strict=True):
            for part in candidate.parts if len(channels) else ():
                own = part.own[channels].flatten().tolist()
                dropped.setdefault((part.use.weight, part.side), set()).update(own)
        keeps: dict[str, dict[str, tuple[int, ...]]] = {side: {} for side in SIDES}
        widths: dict[str, tuple[int, int]] = {}
        for (name, side), lost in dropped.items():
            use = min(self.layers[name], key=lambda u: u.contraction is None)
            keeps[side][name] = tuple(i for i in range(use.width(side)) if i not in lost)
            widths[name] = (use.inputs, use.outputs)
        return ChannelPlan(
            inputs=keeps["inputs"],
            outputs=keeps["outputs"],
            widths=widths,
            reasons={name: reasons[name] for name in widths},
            fingerprint=self.plan.fingerprint,
            notes=tuple(self.notes),
        )


def ranked(
    program: Program,
    given: ChannelPlan,
    plan: ChannelPlan,
    options: Options,
    sides: Sides | None,
) -> ChannelPlan:
    """Return a plan without what a criterion ranks lowest.

    Args:
        program: The program.
        given: The masks that were given; their sides are left alone.
        plan: They, and what is zero anyway.
        options: The criterion, and how much goes.
        sides: Which sides each layer chooses among; ``None`` to choose among whole couplings.
    """
    chooser = Ranking(program, layers_of(program), given, plan, options)
    if sides is None:
        candidates, kind = chooser.coupled(program.couplings()), "constrained"
    else:
        candidates, kind = chooser.single(sides), "unconstrained"
    return plan | chooser.chosen(candidates, kind)


def hardly(program: Program, plan: ChannelPlan, options: Options) -> Iterator[Note]:
    """Yield what is to be said of a plan whose criterion leaves hardly anything of some layers.

    That is a tenth of the channels of a side at most, or only what may not go.
    """
    chosen, found = set(), {}
    for at, side in enumerate(SIDES):
        for name, keep in getattr(plan, side).items():
            width, left = plan.widths[name][at], len(keep)
            if {"given", "zeros"} >= {*plan.reasons[name].split(", ")}:
                continue
            chosen.add(name)
            asked = _share(width, options.ratio(name)[0])
            if 10 * left <= width or (left <= options.min_width and asked > width - left):
                found.setdefault(name, f"{name} ({left} of {width} {side})")
    if found:
        named = ", ".join([*found.values()][:3]) + (" ..." if len(found) > 3 else "")
        message = f"hardly anything is left of {len(found)} of {len(chosen)} layers: {named}"
        yield Note(program.name, "hardly", message)


def _matched(names: Iterable[str], globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def _share(width: int, ratio: float) -> int:
    """Return how many of ``width`` a ratio removes: rounded down, but 0.7 of 10 is 7."""
    return math.floor(width * ratio + 1e-9)


def _normalised(given: np.ndarray) -> np.ndarray:
    finite = given[np.isfinite(given)]  # a score without end says that a channel stays
    mean = np.abs(finite).mean() if len(finite) else 0.0
    return given / mean if mean > 0 else given


def _from_inputs(program: Program, layers: set[fx.Node]) -> set[fx.Node]:
    """Return the nodes that hold a model input's channels, each computed for itself; a state's may
    go."""
    found: set[fx.Node] = set()
    states = {s.name for s in program.states}
    for node in program.graph.nodes:
        read = [n for n in node.all_input_nodes if n.op != "get_attr" and is_tensor(n)]
        passes = node.op == "call_function" and node not in layers and len(read) == 1
        given = node.op == "placeholder" and node.name not in states
        if given or (passes and read[0] in found):
            found.add(node)
    return found


def _to_outputs(program: Program, layers: set[fx.Node]) -> set[fx.Node]:
    """Return the nodes that reach a model output, but for states, without another layer between."""
    handed = {s.output for s in program.states}
    results: Any = program.output.args[0]
    found = {n for i, n in enumerate(results) if i not in handed}
    for node in reversed(program.graph.nodes):
        if any(u in found and u not in layers for u in node.users):
            found.add(node)
    return found
