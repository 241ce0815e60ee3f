"""`Candidates`: all channels that may go, each coupling's or layer's in the order in which they go.

With the order fixed, a plan is a number per candidate: how many channels stay. What budgets count
and allocators choose are such *widths*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from narrows.ir.labels import Bools, Ints
from narrows.ir.program import Program
from narrows.ir.structure import structure_of
from narrows.passes.choosing.products import Product
from narrows.passes.choosing.reads import Floats, Reads, reads_of
from narrows.passes.plans.latency import ByShare
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.plans.rank import Candidate, Ranking
from narrows.passes.plans.setting import Setting

Widths = Sequence[int]


@dataclass(frozen=True, eq=False)
class Candidates:
    """All channels that may go.

    Attributes:
        setting: What the plan is made for.
        ranking: What made the candidates, and makes plans of them.
        members: The candidates: couplings, or what a layer reads.
        reads: All that layers read, of the prepared program.
    """

    setting: Setting
    ranking: Ranking
    members: tuple[Candidate, ...]
    reads: Reads

    @staticmethod
    def of(setting: Setting, prepared: Program) -> Candidates:
        """Return the candidates of a setting; `PlanError` if there are none.

        Args:
            setting: The setting. Its criterion scores them; what channels cost in nats adds up over
                the layers that read them, other scores are averaged.
            prepared: The program, prepared.
        """
        structure = structure_of(setting.program)
        choosing = setting.choosing
        kind = ByShare if choosing.by_losses else Ranking
        chooser = kind(
            setting.program, structure.layers, setting.given, setting.plan, setting.options
        )
        coupled = choosing.constrained
        members = chooser.coupled(structure.ties) if coupled else chooser.single(("inputs",))
        chooser.refuse_none(members)
        return Candidates(setting, chooser, tuple(members), reads_of(prepared))

    # ------------------------------------------------------------------ widths

    @cached_property
    def full(self) -> list[int]:
        """Per candidate how many channels it has."""
        return [len(c.scores) for c in self.members]

    @cached_property
    def least(self) -> list[int]:
        """Per candidate how many channels stay at least."""
        return [min(self.ranking.options.min_width, w) for w in self.full]

    @cached_property
    def order(self) -> list[Ints]:
        """Per candidate its channels, those that go first in front."""
        return [np.argsort(c.scores, kind="stable") for c in self.members]

    @cached_property
    def worth(self) -> list[Floats]:
        """Per candidate what its channels are worth, so that it compares with others', in order."""
        found = [self.ranking.ranked(c.scores) for c in self.members]
        return [values[order] for values, order in zip(found, self.order, strict=True)]

    @cached_property
    def lost(self) -> list[Floats]:
        """Per candidate what 0, 1, 2 ... channels that stay lose of its worth."""
        return [np.concatenate([[0.0], np.cumsum(np.maximum(w, 0.0))])[::-1] for w in self.worth]

    def gone(self, widths: Widths) -> list[Ints]:
        """Return per candidate which channels go."""
        triples = zip(self.order, self.full, widths, strict=True)
        return [order[: full - width] for order, full, width in triples]

    def plan(self, widths: Widths, label: str) -> ChannelPlan:
        """Return the plan of some widths, with what was masked before.

        Args:
            widths: The widths.
            label: What its reasons say.
        """
        names = {p.use.weight for c in self.members for p in c.parts}
        found = self.ranking.plan_of(
            self.members, self.gone(widths), dict.fromkeys(sorted(names), label)
        )
        return self.setting.plan | replace(found, fingerprint=self.setting.plan.fingerprint)

    # ------------------------------------------------------------------ what is left

    def there(self, widths: Widths) -> Bools:
        """Return which reads are left, as `Reads.left_by` does of the plan of these widths."""
        kept = [side.begun.copy() for side in self._sides]
        for own, gone in zip(self._places, self.gone(widths), strict=True):
            for side, places in zip(kept, own, strict=True):
                side[places[gone].ravel()] = False
        columns, rows = (
            np.bincount(side.owner[there[:-1]], minlength=side.count) > 0
            for side, there in zip(self._sides, kept, strict=True)
        )
        result = columns.copy()
        reads, makers = self.reads.pairs
        alive = np.zeros(len(result), dtype=bool)
        alive[reads[rows[makers]]] = True
        made = np.zeros(len(result), dtype=bool)
        made[reads] = True
        result[made & ~alive] = False
        return result

    @cached_property
    def _sides(self) -> tuple[_Side, _Side]:
        """Return what layers read, and what they make, channel by channel."""
        reads, plan = self.reads, self.setting.plan
        return (
            _Side.of(reads.products, reads.layer, reads.columns, "inputs", plan.inputs),
            _Side.of(reads.products, reads.maker_layer, reads.rows, "outputs", plan.outputs),
        )

    @cached_property
    def _places(self) -> list[tuple[Ints, Ints]]:
        """Return per candidate and side where each of its channels lies, ``[width, places]``."""
        result = []
        for candidate in self.members:
            found = []
            for side, name in zip(self._sides, ("inputs", "outputs"), strict=True):
                parts = [p for p in candidate.parts if p.side == name]
                own = [side.places(p.use.weight, p.own) for p in parts]
                width = len(candidate.scores)
                found.append(np.concatenate([np.zeros((width, 0), dtype=np.int64), *own], axis=1))
            result.append((found[0], found[1]))
        return result


@dataclass(frozen=True, eq=False)
class _Side:
    """What all layers read, or make, channel by channel: a *place* is one channel of one of them.

    Attributes:
        owner: Per place the read, or maker, that it belongs to.
        begun: Per place whether it is there from the beginning; one more stands for no place.
        count: How many reads, or makers, there are.
        at: Per weight the places of its channels in every layer that uses it, ``[uses, channels]``.
    """

    owner: Ints
    begun: Bools
    count: int
    at: Mapping[str, Ints]

    @staticmethod
    def of(
        products: Sequence[Product],
        layer: Ints,
        channels: Sequence[Ints],
        side: str,
        keeps: Mapping[str, Sequence[int]],
    ) -> _Side:
        """Return the places of a side.

        Args:
            products: The layers.
            layer: Per read, or maker, its layer; ``channels``: that layer's channels that it is.
            side: ``inputs`` or ``outputs``.
            keeps: Per weight what is kept from the beginning.
        """
        sizes = [len(own) for own in channels]
        owner = np.repeat(np.arange(len(sizes)), sizes)
        channel = np.concatenate([*channels, np.zeros(0, dtype=np.int64)]).astype(np.int64)
        tables = [np.full(p.layer.width(side), len(owner), dtype=np.int64) for p in products]
        begun = np.ones(len(owner) + 1, dtype=bool)
        of_layer = layer[owner]
        for j, product in enumerate(products):
            own = np.flatnonzero(of_layer == j)
            tables[j][channel[own]] = own
            keep = keeps.get(product.layer.weight)
            if keep is not None:
                begun[own] = np.isin(channel[own], list(keep))
        at: dict[str, list[Ints]] = {}
        for product, table in zip(products, tables, strict=True):
            at.setdefault(product.layer.weight, []).append(table)
        return _Side(owner, begun, len(sizes), {w: np.stack(found) for w, found in at.items()})

    def places(self, weight: str, own: Ints) -> Ints:
        """Return the places of some channels of a weight, ``[width, places]``."""
        table = self.at.get(weight)
        if table is None:
            return np.zeros((len(own), 0), dtype=np.int64)
        return table[:, own].transpose(1, 0, 2).reshape(len(own), -1)


__all__ = ["Candidates", "Widths"]
