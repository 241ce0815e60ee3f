"""`Thresholds`: a threshold per group of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import ClassVar

from narrows.ir.meta import shape_of
from narrows.passes.choosing.allocators.base import ByWidths
from narrows.passes.choosing.allocators.scalar import bisected, filled
from narrows.passes.choosing.budgets.base import Limit, Part
from narrows.passes.plans.candidates import Candidates
from narrows.passes.plans.rank import Candidate


@dataclass(frozen=True)
class Thresholds(ByWidths):
    """Channels are ranked within groups of layers: one share of every group goes.

    The groups are those of ``groups=``, the rest is one; without any, layers whose maps are of one
    size are a group. A group with budgets of its own has a share of its own.
    """

    name: ClassVar[str] = "thresholds"
    paper: ClassVar[str] = "Group channel pruning of YOLOv4: a quantile of the gains of each group"
    groups: ClassVar[bool] = True

    def widths(self, candidates: Candidates, limits: Sequence[Limit]) -> Sequence[int]:
        """Return the widths of the smallest shares that are within the limits."""
        named = candidates.setting.choosing.groups or {}
        groups = [_group(c, named) for c in candidates.members]
        shares = dict.fromkeys(groups, 0.0)
        own: dict[str, list[Limit]] = {}
        for limit in limits:
            if isinstance(limit.goal.budget, Part):
                own.setdefault(limit.goal.budget.group, []).append(limit)
        # First every group within its own limits, then the rest, and what is left over by all.
        steps = [([group], own[group]) for group in shares if group in own]
        rest = [group for group in shares if group not in own]
        steps += [(rest, [*limits] if rest else []), ([*shares], [*limits])]
        for changed, mine in steps:
            if all(x.meets(_at(candidates, groups, shares)) for x in mine):
                continue

            at = partial(_raised, candidates, groups, shares, changed)
            amount = bisected(candidates, mine, at)
            shares |= {group: max(shares[group], amount) for group in changed}
        return filled(candidates, limits, _at(candidates, groups, shares))


def _raised(
    candidates: Candidates,
    groups: Sequence[str],
    shares: Mapping[str, float],
    changed: Sequence[str],
    amount: float,
) -> list[int]:
    """Return the widths where at least a share goes of the groups that change."""
    raised = {group: max(shares[group], amount) for group in changed}
    return _at(candidates, groups, {**shares, **raised})


def _at(candidates: Candidates, groups: Sequence[str], shares: Mapping[str, float]) -> list[int]:
    """Return the widths where a share of every group's channels goes."""
    number = {group: i for i, group in enumerate(shares)}
    asked = [
        replace(c, ratio=shares[group], group=number[group])
        for c, group in zip(candidates.members, groups, strict=True)
    ]
    gone = candidates.ranking.lowest_overall(asked)
    return [full - len(g) for full, g in zip(candidates.full, gone, strict=True)]


def _group(candidate: Candidate, named: Mapping[str, str | Sequence[str]]) -> str:
    """Return the group of a candidate: by name, or by the size of its maps if none are named."""
    makers = [p.use for p in candidate.parts if p.side == "outputs"]
    uses = makers or [p.use for p in candidate.parts]
    for name, globs in named.items():
        every = (globs,) if isinstance(globs, str) else globs
        if any(fnmatchcase(use.weight, glob) for use in uses for glob in every):
            return name
    if named:
        return ""
    tensor = uses[0].node if makers else uses[0].x
    return "x".join(map(str, shape_of(tensor)[2:])) if tensor is not None else ""


__all__ = ["Thresholds"]
