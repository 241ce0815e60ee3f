"""Masks that are chosen anew every few steps, so that channels return (SMCP).

R. Humble, M. Shen, J. A. Latorre, E. Darve, J. Alvarez: Soft Masking for Cost-Constrained Channel
Pruning, ECCV 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from narrows.training.checks import interval_of, share_of
from narrows.training.gates import Gates, gradient_of
from narrows.training.masks import lowest
from narrows.training.schedules import Schedule, at
from narrows.training.sites import Gate, gains_behind

Choose = Callable[[Sequence[Gate], Sequence[Tensor]], Sequence[Tensor]]


@dataclass(eq=False, repr=False, kw_only=True)
class SoftMasks(Gates):
    """Gates that close the least important channels, and open them when they matter again.

    Every ``interval`` steps the masks are chosen from the importances since the last time: of a
    channel ``c`` with the parameters ``w`` that its mask multiplies and their gradients ``g``

        ``I_c = sum over steps, and over c's entries, of |w g|``.

    The forward call uses ``w m``, the backward call passes through the mask: a masked weight gets
    the gradient of an unmasked one, learns on, and so may come back. A consumer that reads a share
    ``d`` of its inputs has the gain of the norm behind it times ``d`` (``rescale``), as the norm
    would otherwise blow up what is left; `remove` leaves that in the gain.

    The method is one of *input* channels: ``inputs="*"``.

    Args, beside those of `Gates`:
        ratio: The share of all channels that is closed; a function of the step raises it slowly.
        interval: After how many steps masks are chosen anew.
        until: The step from which they stay, so that the model settles; ``None`` never.
        rescale: Whether the gains of norms behind gated inputs follow the density.
        choose: Returns boolean masks for gates and their importances, in place of closing the
            lowest: for a budget of costs, say.
    """

    straight: ClassVar[bool] = True

    ratio: Schedule = 0.5
    interval: int = 100
    until: int | None = None
    rescale: bool = True
    choose: Choose | None = None

    def _build(self) -> None:
        interval_of(self.interval)
        self._rescaled = [
            (n, gains_behind(g)) for n, g in enumerate(self.gates)
            if self.rescale and g.sides[0].side == "inputs"
        ]  # fmt: skip
        self._watch(name for _, names in self._rescaled for name in names)
        self._open = [torch.ones(g.width, dtype=torch.bool) for g in self.gates]
        self._importance = [torch.zeros(g.width) for g in self.gates]
        self._chosen = 0

    def masks(self) -> list[Tensor]:
        """Return the masks in force: zeros and ones."""
        return [m.to(self._device(), torch.float32) for m in self._open]

    def hard(self) -> list[Tensor]:
        """Return the masks in force."""
        return list(self._open)

    def factors(self) -> Mapping[str, Tensor]:
        """Return the densities by which gains of norms are multiplied."""
        found: dict[str, Tensor] = {}
        for number, names in self._rescaled:
            density = self._open[number].float().mean().to(self._device())
            found.update({name: found.get(name, 1.0) * density for name in names})
        return found

    def importances(self) -> list[Tensor]:
        """Return the importances since the masks were chosen, per gate ``[width]``."""
        return list(self._importance)

    @torch.no_grad()
    def _advance(self) -> None:
        dense = self._parameters_by_name()
        for n, gate in enumerate(self.gates):
            taken = {p.parameter: _taken(p.parameter, dense[p.parameter]) for p in gate.masked}
            self._importance[n] = self._importance[n] + gate.sums(taken).float().cpu()
        done = self.done + 1
        if done % self.interval == 0 and (self.until is None or done <= self.until):
            self._choose()

    def _choose(self) -> None:
        ratio = share_of(at(self.ratio, self.done))
        if self.choose is None:
            self._open = lowest(self._importance, ratio)
        else:
            self._open = [m.bool().cpu() for m in self.choose(self.gates, self._importance)]
        self._importance = [torch.zeros(g.width) for g in self.gates]
        self._chosen += 1

    def _untrained(self) -> str:
        why = f"no masks were chosen within {self.done} steps: the interval is {self.interval}"
        return super()._untrained() or ("" if self._chosen else why)


def _taken(name: str, weight: Tensor) -> Tensor:
    """Return ``|w g|`` of a weight."""
    return (weight * gradient_of(name, weight)).abs()


__all__ = ["SoftMasks"]
