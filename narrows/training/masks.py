"""Masks of numbers: which channels stay, and zeros and ones that have gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def lowest(scores: Sequence[Tensor], share: float) -> list[Tensor]:
    """Return masks that close a share of all channels, those with the lowest scores.

    The best channel of each gate stays open.

    Args:
        scores: Per gate a number for each channel, comparable over gates.
        share: The share that is closed, 0..1.
    """
    flat = torch.cat([s.detach().flatten() for s in scores])
    order = flat.argsort(stable=True)[: round(share * len(flat))]
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[order] = False
    parts = list(keep.split([len(s) for s in scores]))
    for part, own in zip(parts, scores, strict=True):
        part[own.detach().argmax()] = True
    return parts


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Return a mask of booleans as zeros and ones that have the gradients of a soft mask."""
    return hard.to(soft.dtype) + (soft - soft.detach())


__all__ = ["lowest", "straight_through"]
