"""Gains of norms that a changing penalty pulls to zero, and thresholds by group.

Network slimming (Z. Liu et al., ICCV 2017), with the changing rate and the groups of: Y. Chu, P.
Li, Y. Bai, Z. Hu, Y. Chen, J. Lu: Group Channel Pruning and Spatial Attention Distilling for Object
Detection, 2022.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor

from narrows.errors import PlanUsageError, UsageError, suggest
from narrows.training.checks import share_of
from narrows.training.gates import Gates, gradient_of
from narrows.training.masks import lowest
from narrows.training.schedules import Schedule, at
from narrows.training.sites import Gate, Names, gains_behind, listed


@dataclass(eq=False, repr=False, kw_only=True)
class NormSparsity(Gates):
    """Gates that close the channels whose norm has the smallest gain, after training made it small.

    `step` adds the subgradient of ``s sum |gamma|`` to the gradients of the gains, with the rate
    ``s`` of the step:

        ``grad gamma += s(step) sign(gamma)``.

    Train mode runs without masks. Eval mode, and the plan, close a share of the channels of each
    group: those with the smallest ``|gamma|``. So every layer has a norm behind it.

    Args, beside those of `Gates`, but for inputs:
        ratio: The share of a group's channels that goes; or a share for each group, by its name.
        rate: ``s``; a function of the step changes it, such as `Tent`.
        groups: Per group globs of weights; the first that matches counts. Layers without a group
            are one of their own. The paper groups by the scale of the stage and the kind of module.
    """

    inputs: ClassVar[Names] = ()  # a channel that is read has no gain of its own
    ratio: float | Mapping[str, float] = 0.5
    rate: Schedule = 1e-3
    groups: Mapping[str, Names] | None = None

    def _build(self) -> None:
        self._gains = [_gains(g) for g in self.gates]
        self._members = _grouped(self.gates, self.groups or {})
        self._ratios = {name: share_of(_ratio(self.ratio, name)) for name in self._members}
        _refuse_ratios(self.ratio, self._members)

    def hard(self) -> list[Tensor]:
        """Return which channels are not among the smallest of their group."""
        sizes = self.sizes()
        found: dict[int, Tensor] = {}
        for name, members in self._members.items():
            masks = lowest([sizes[n] for n in members], self._ratios[name])
            found.update(zip(members, masks, strict=True))
        return [found[n] for n in range(len(self.gates))]

    def sizes(self) -> list[Tensor]:
        """Return ``|gamma|`` per gate, ``[width]``; of several norms the mean."""
        dense = self._parameters_by_name()
        found = []
        for gate, names in zip(self.gates, self._gains, strict=True):
            places = [p for p in gate.masked if p.parameter in names]
            sums = [p.sums(dense[p.parameter].detach().abs(), gate.width) for p in places]
            ones = [p.sums(torch.ones_like(dense[p.parameter]), gate.width) for p in places]
            found.append(torch.stack(sums).sum(0) / torch.stack(ones).sum(0).clamp_min(1))
        return found

    @torch.no_grad()
    def _advance(self) -> None:
        rate, dense = at(self.rate, self.done), self._parameters_by_name()
        for name in dict.fromkeys(n for names in self._gains for n in names):
            gain = dense[name]
            gradient_of(name, gain).add_(gain.sign(), alpha=rate)

    def _untrained(self) -> str:
        return super()._untrained() or ("" if self.done else "step() was never called")


def _gains(gate: Gate) -> tuple[str, ...]:
    masked = {p.parameter for p in gate.masked}
    found = tuple(name for name in gains_behind(gate) if name in masked)
    if not found:
        raise PlanUsageError(
            f"{gate.name}: there is no norm behind them",
            where=gate.sides[0].weight,
            why="the gates are the gains of norms",
            hint="name layers that a norm follows, or use other gates",
        )
    return found


def _grouped(gates: Sequence[Gate], groups: Mapping[str, Names]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {name: [] for name in groups}
    for number, gate in enumerate(gates):
        weight = gate.sides[0].weight
        own = (
            n for n, globs in groups.items() if any(fnmatchcase(weight, g) for g in listed(globs))
        )
        found.setdefault(next(own, "the rest"), []).append(number)
    for name, members in found.items():
        if not members:
            raise PlanUsageError(
                f"the group {name!r} has no gate",
                where=f"groups: {', '.join(listed(groups[name]))}",
                why="its globs match no gated weight, or groups before it have them all",
                hint=suggest(listed(groups[name])[0], [g.sides[0].weight for g in gates])
                or "leave the group out, or gate its layers: outputs=...",
            )
    return found


def _ratio(ratio: float | Mapping[str, float], group: str) -> float:
    return float(ratio.get(group, 0.0)) if isinstance(ratio, Mapping) else float(ratio)


def _refuse_ratios(ratio: float | Mapping[str, float], groups: Mapping[str, object]) -> None:
    for name in ratio if isinstance(ratio, Mapping) else ():
        if name not in groups:
            raise UsageError(
                f"there is no group {name!r}",
                where="ratio",
                why=f"the groups are {', '.join(groups)}",
                hint=suggest(name, groups) or "ratio=0.5 is for all of them",
            )


__all__ = ["NormSparsity"]
