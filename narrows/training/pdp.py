"""Masks without parameters that weights are trained through (PDP), for channels and for N:M.

M. Cho, S. Adya, D. Naik: PDP: Parameter-free Differentiable Pruning is All You Need, NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from narrows.errors import UsageError
from narrows.training.checks import interval_of, share_of
from narrows.training.gates import Gates
from narrows.training.schedules import Schedule, at, temperature_at


def soft_mask(values: Tensor, threshold: Tensor | float, tau: float) -> Tensor:
    """Return ``1 / (1 + exp((t^2 - w^2) / tau))``: one half where ``|w|`` is the threshold.

    Args:
        values: ``w``, of any shape.
        threshold: ``t``, which broadcasts to it.
        tau: How soft the mask is, in the unit of ``w^2``.
    """
    threshold = torch.as_tensor(threshold, dtype=values.dtype, device=values.device)
    return torch.sigmoid((values.square() - threshold.square()) / tau)


def threshold_between(values: Tensor, keep: int) -> Tensor:
    """Return the middle between the smallest kept and the largest dropped magnitude, last axis.

    Args:
        values: ``[..., n]``.
        keep: How many of the ``n`` lie above it; with all of them it is zero.

    Returns:
        ``[..., 1]``, without gradient.
    """
    sizes = values.detach().abs().sort(-1, descending=True).values
    if keep >= sizes.shape[-1]:
        return torch.zeros_like(sizes[..., :1])
    return (sizes[..., keep - 1 : keep] + sizes[..., keep : keep + 1]) / 2


def element_mask(weight: Tensor, n: int, m: int, tau: float, axis: int = 1) -> Tensor:
    """Return PDP's soft mask for ``n`` of every ``m`` entries in a row along an axis of a weight.

    Its hard form is ``> 0.5``. What it makes is no matter of channels: it is for a weight format.

    Args:
        weight: The weight; the axis is a multiple of ``m`` long.
        n: How many stay, 1 to ``m``.
        m: How many are a group.
        tau: As for `soft_mask`.
        axis: The axis, that of the inputs by default.
    """
    check_pattern((n, m), weight.shape[axis], "weight")
    groups = weight.movedim(axis, -1).unflatten(-1, (-1, m))
    mask = soft_mask(groups, threshold_between(groups, n), tau)
    return mask.flatten(-2).movedim(-1, axis)


def check_pattern(pattern: tuple[int, int], width: int, name: str) -> None:
    """Raise `UsageError` unless ``n`` of every ``m`` can be kept of a width."""
    n, m = pattern
    if not 1 <= n <= m or width % m:
        raise UsageError(
            f"{n} of every {m} cannot be kept of {width}",
            where=name,
            why="groups follow each other without a rest, and each keeps between one and all",
            hint="pattern=(2, 4), on widths that are multiples of 4",
        )


@dataclass(eq=False, repr=False, kw_only=True)
class DifferentiableMasks(Gates):
    """Gates whose masks follow from the norms of the channels' weights, and have no parameters.

    With ``w`` the Euclidean norm of a channel's weights, and ``t`` the middle between the norms of
    the last that stays and the first that goes, layer by layer

        ``m = 1 / (1 + exp((t^2 - w^2) / tau))``.

    The gradient flows through ``m`` into the weights, ``t`` is a constant. With a ``pattern`` the
    channels of a layer are taken in groups of ``m``, each of which keeps ``n``: N:M for channels.

    Args, beside those of `Gates`:
        ratio: The share of every layer's channels that goes; a function of the step raises it.
        pattern: ``(n, m)`` in place of a ratio.
        tau: How soft the masks are, in the unit of a squared norm.
        interval: After how many steps ``t`` is found anew: those of an epoch in the paper.
    """

    ratio: Schedule = 0.5
    pattern: tuple[int, int] | None = None
    tau: Schedule = 1e-2
    interval: int = 1

    def _build(self) -> None:
        interval_of(self.interval)
        for gate in self.gates if self.pattern is not None else ():
            check_pattern(self.pattern, gate.width, gate.name)  # type: ignore[arg-type]
        self._thresholds: tuple[int, list[Tensor]] | None = None

    def masks(self) -> list[Tensor]:
        """Return the soft masks of the weights as they are."""
        tau = temperature_at(self.tau, self.done)
        dense = self._parameters_by_name()
        norms = [g.norms(dense) for g in self.gates]
        epoch = self.done // self.interval
        if self._thresholds is None or self._thresholds[0] != epoch:
            self._thresholds = epoch, self._found(norms)
        pairs = zip(norms, self._thresholds[1], strict=True)
        return [soft_mask(w, t, tau) for w, t in pairs]

    def hard(self) -> list[Tensor]:
        """Return which norms are above the threshold that the weights have now."""
        with torch.no_grad():
            norms = [g.norms(self._parameters_by_name()) for g in self.gates]
            return [w > t for w, t in zip(norms, self._found(norms), strict=True)]

    def _found(self, norms: Sequence[Tensor]) -> list[Tensor]:
        return [self._threshold(w) for w in norms]

    def _threshold(self, norms: Tensor) -> Tensor:
        """Return the threshold of each of a gate's channels, or one of all."""
        if self.pattern is None:
            ratio = share_of(at(self.ratio, self.done))
            return threshold_between(norms, max(1, len(norms) - round(ratio * len(norms))))
        n, m = self.pattern
        groups = norms.view(-1, m)
        return threshold_between(groups, n).expand_as(groups).flatten()


__all__ = ["DifferentiableMasks", "element_mask", "soft_mask", "threshold_between"]
