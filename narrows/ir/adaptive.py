"""Adaptive pooling: where its windows lie. No torch, as compilers run without it, too."""

from __future__ import annotations


def windows(size: int, count: int) -> list[tuple[int, int]]:
    """Return where each of ``count`` windows over an axis begins and ends.

    They cover the axis. Where ``count`` does not divide ``size``, they overlap and differ in size.
    """
    return [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


__all__ = ["windows"]
