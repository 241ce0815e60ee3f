"""What a person is told where masked channels remain, and where nothing of the inputs does.

A channel that a plan masks may have to stay for what else needs it or shares its place: the
model's output, an input that is joined to it, a norm's statistics. `remaining` compares the plan
with what came out, weight by weight and side by side, and says what holds the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import fx

from narrows.ir.channels import Facts, analyse
from narrows.ir.labels import Bools, Ints, Value
from narrows.ir.liveness import Demand
from narrows.ir.meta import Meta
from narrows.ir.program import Note, Origin, Program, Pruning
from narrows.ir.rewrite import demand_of, facts_of
from narrows.ir.structure.layers import SIDES, Layer, layers_of
from narrows.passes.plans.holders import Holder, forced, holders, said, source_of
from narrows.passes.plans.plan import ChannelPlan

# The reasons of notes that stand at a layer and count channels of one of its sides.
OWN = {
    "inputs": {"groups", "padding", "ragged", "shape", "shared"},
    "outputs": {"groups", "output", "ragged", "shared"},
}


def remaining(
    program: Program, plan: ChannelPlan, masked: Pruning, result: Program, notes: Sequence[Note]
) -> Iterator[Note]:
    """Yield, per weight and side, how many masked channels are still there, and what holds them.

    Nothing is said of a mask of which a note at the layer itself says that as many stay.

    Args:
        program: The program before it was pruned.
        plan: The plan.
        masked: The pruning that began with the plan's masks (`ChannelPlan.split`).
        result: The pruned program.
        notes: What there is to say already.
    """
    yield from _Remains(program, plan, masked, result, notes).notes()


@dataclass(frozen=True, eq=False)
class _Remains:
    """A plan beside what came of it."""

    program: Program
    plan: ChannelPlan
    masked: Pruning
    result: Program
    told: Sequence[Note]

    @property
    def demand(self) -> Demand:
        """The liveness of the masked program, which its rewrite has found."""
        return demand_of(self.masked)

    @cached_property
    def there(self) -> dict[str, list[Origin | None]]:
        """Per weight of the first program, where its parts that are left come from."""
        found: dict[str, list[Origin | None]] = {}
        for name in self.result.weights:
            origin = self.result.origins.get(name)
            found.setdefault(name if origin is None else origin.name, []).append(origin)
        return found

    def notes(self) -> Iterator[Note]:
        """Yield a note per mask that leaves channels in place."""
        for at, side in enumerate(SIDES):
            for weight, keep in getattr(self.plan, side).items():
                name = self.program.aliases.get(weight, weight)
                uses = [u for u in layers_of(self.program).get(name, ()) if u.width(side)]
                if weight in self.plan.widths:
                    uses = [u for u in uses if u.width(side) == self.plan.widths[weight][at]]
                if uses:
                    yield from self._of(name, side, uses, keep)

    def _of(
        self, weight: str, side: str, uses: list[Layer], keep: tuple[int, ...]
    ) -> Iterator[Note]:
        gone = np.setdiff1d(np.arange(uses[0].width(side)), keep)
        stay = np.intersect1d(gone, self._left(weight, uses[0], side)) if len(gone) else gone
        if not len(stay) or any(self._is_told(u, side, len(stay)) for u in uses):
            return
        why, counted = self._why(weight, uses, side, stay)
        message = f"{_went(len(gone), len(stay), side, weight)}: {why}"
        first = uses[0].node
        yield Note(first.name, "place", message, max(0, len(stay) - counted), Meta(first).source)

    def _left(self, weight: str, use: Layer, side: str) -> Ints:
        """Return the channels of a side that are left in any part of the weight."""
        earlier = self.program.origins.get(weight)
        parts = self.there.get(weight if earlier is None else earlier.name, ())
        found = [left(use, side, _since(earlier, part)) for part in parts]
        return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)

    def _is_told(self, use: Layer, side: str, count: int) -> bool:
        return any(
            n.where == use.node.name and n.reason in OWN[side] and n.channels >= count
            for n in self.told
        )

    # ------------------------------------------------------------------ why

    @cached_property
    def _noted(self) -> dict[str, str]:
        """By node name the first reason of a note that channels stay there."""
        return {n.where: n.reason for n in reversed(self.told) if n.channels}

    def _why(self, weight: str, uses: list[Layer], side: str, stay: Ints) -> tuple[str, int]:
        """Return what holds channels, and how many of them other notes count."""
        if side == "inputs":
            why = dict.fromkeys(self._why_inputs(u, stay) for u in uses)
            return " and ".join(why), 0
        found = dict.fromkeys(h for u in uses for h in self._holders(u, stay))
        ordered = sorted(found, key=lambda h: h.node.op != "output")
        why = dict.fromkeys(said(h, self.demand.facts, self._noted) for h in ordered)
        places = {h.place for h in ordered}
        counted = sum(n.channels for n in self.told if n.where in places)
        if why:
            return " and ".join(why), counted
        if len(layers_of(self.program)[weight]) > 1:
            return f"another use of {weight} needs them", counted
        return "what reads them has a place for them", counted

    def _why_inputs(self, use: Layer, stay: Ints) -> str:
        """Return why a layer still reads inputs, as zeros."""
        facts = self.demand.facts
        node = facts.program.node(use.node.name)
        name, found = node.name, facts.flows[node].facts
        if name in self._noted:
            return said(Holder(node, node), facts, self._noted)
        if len(layers_of(self.program)[use.weight]) > 1:
            return f"another use of {use.weight} needs them"
        if isinstance(found, tuple):
            columns = found[1]
            others = np.delete(columns, stay, axis=1)
            if np.isin(columns[:, stay], others).all():
                return f"to {name} they are one channel with those that it keeps"
        holder = None if use.x is None else self._source(use.x)
        held = "" if holder is None else f": {said(holder, facts, self._noted)}"
        return f"{name} reads all that its tensor holds{held}"

    def _source(self, x: fx.Node) -> Holder | None:
        facts = self.demand.facts
        return source_of(facts, facts.program.node(x.name), self._noted)

    def _holders(self, use: Layer, stay: Ints) -> list[Holder]:
        """Return what holds outputs of a layer."""
        facts = self.demand.facts
        node = facts.program.node(use.node.name)
        labels = _labels(facts, node, use.y_axis, stay)
        if labels is None:
            return []
        found = holders(self.demand, node, labels)
        needed = forced(facts, node, self._noted) if not found else None
        return found if needed is None else [needed]


def _went(masked: int, stay: int, side: str, weight: str) -> str:
    """Return how a note begins of a mask of which so many channels stay."""
    if masked == 1:
        return f"the masked {side[:-1]} of {weight} stays"
    if stay == masked:
        return f"none of the {masked} masked {side} of {weight} goes"
    verb = "stays" if stay == 1 else "stay"
    return f"{masked - stay} of the {masked} masked {side} of {weight} went, {stay} {verb}"


def _labels(facts: Facts, node: fx.Node, axis: int, channels: Ints) -> Bools | None:
    """Return the labels of some channels along an axis of a node; ``None`` for a constant."""
    value = facts.value(node)
    if value.free:
        return None
    along = value.tensor.movedim(axis, 0)
    rows = along.reshape(len(along), -1)
    rows = rows.expand(value.shape[axis], -1) if len(rows) == 1 else rows
    mask = np.zeros(value.count, dtype=bool)
    mask[rows[channels.tolist()].flatten().numpy()] = True
    return mask


# ------------------------------------------------------------------ outputs without inputs


def constant_outputs(before: Program, pruning: Pruning) -> Iterator[Note]:
    """Yield which outputs depended on an input before and do not any more."""
    facts = facts_of(pruning)
    for number, (old, new) in enumerate(
        zip(_results(before), _results(pruning.program), strict=True)
    ):
        if _is_constant(facts, new) and not _is_constant(analyse(before), old):
            yield Note(
                old.name, "constant", f"output {number} is the same for every input: nothing that "
                "an input decides is left of it", 0, Meta(old).source,
            )  # fmt: skip


def _results(program: Program) -> list[Any]:
    (results,) = program.output.args
    return list(results)  # type: ignore[arg-type]


def _is_constant(facts: Facts, node: Any) -> bool:
    """Whether every channel of an output that is computed is a constant."""
    flow = facts.flows.get(node)
    if flow is None or node.op != "call_function" or not isinstance(flow.value, Value):
        return False
    return not flow.value.free and bool(flow.value.known().all())


# ------------------------------------------------------------------ what a rewritten weight holds


def present(use: Layer, side: str, origin: Origin | None) -> np.ndarray | None:
    """Return which channels of a side are in a rewritten weight; ``None`` if that is not plain."""
    if origin is not None and 1 < use.groups != use.inputs:
        return None
    return left(use, side, origin)


def left(use: Layer, side: str, origin: Origin | None) -> Ints:
    """Return which channels of a side are in a rewritten weight, sorted.

    Along one of its axes a weight in groups has the channels of all groups, one after another;
    along the other those of one group, each entry of the first for the group that it is in.
    """
    width = use.width(side)
    if origin is None:
        return np.arange(width)
    index = origin.index[use.axis(side)]
    if use.spans_groups(side):
        return np.arange(width) if index is None else _there(index)
    other = "outputs" if side == "inputs" else "inputs"
    each, lines = width // use.groups, use.width(other)
    kept = origin.index[use.axis(other)]
    group = np.arange(lines) if kept is None else np.array(kept)
    group = np.where(group < 0, -1, group // (lines // use.groups))
    if index and isinstance(index[0], tuple):
        own = np.array(index, dtype=np.int64)[group >= 0]
        starts = each * group[group >= 0][:, None]
        return _there(np.where(own < 0, -1, starts + own))
    local = np.arange(each) if index is None else _there(index)
    return _there((np.unique(group[group >= 0])[:, None] * each + local).flatten())


def _there(index: Any) -> Ints:
    """Return the sorted indices of an axis; what is -1 is a channel of zeros that was added."""
    found = np.unique(np.array(index, dtype=np.int64))
    return found[found >= 0]


def _since(earlier: Origin | None, now: Origin | None) -> Origin | None:
    """Return where a weight came from in a program that earlier passes had sliced already."""
    if earlier is None or now is None:
        return now
    index = []
    for before, after in zip(earlier.index, now.index, strict=True):
        if before is None or after is None:
            index.append(after if before is None else None)
            continue
        place = {old: new for new, old in enumerate(before)}
        index.append(tuple(place[i] for i in after if i in place))
    return Origin(earlier.name, now.shape, tuple(index))
