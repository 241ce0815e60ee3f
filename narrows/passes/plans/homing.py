"""`homed`: what is really used is known only once a plan is made: requests corrected by trials."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

TURNS = 6  # trials, at most; every one really prunes
MARGIN = 0.001  # aimed below what is asked for, so that it seldom has to be corrected
ROUNDING = 1e-9

T = TypeVar("T")


def homed(
    attempt: Callable[[float], T], used: Callable[[T], float], near: float, most: float = 2.0
) -> list[T]:
    """Return the trials on the way to what is asked for; the last is near to it if one is.

    Args:
        attempt: Returns what is tried when a quick model is asked for this much of what is asked
            for; the same object where nothing else comes of it than before.
        used: Returns what a trial really uses of what is asked for.
        near: From where on that is enough.
        most: What the model is asked for at most.
    """
    low, high, factor = 0.0, most, 1 - MARGIN
    seen: tuple[float, float] | None = None
    found: list[T] = []
    for _ in range(TURNS):
        trial = attempt(factor)
        again = any(trial is known for known in found)
        found.append(trial)
        now = used(trial)
        if now <= 1 + ROUNDING:
            low = factor
            if now >= near:
                break
        else:
            high = factor
        ahead = _ahead(seen, factor, now)
        seen = factor, now
        factor = (low + high) / 2 if again or not low < ahead < high else ahead
    return found


def _ahead(seen: tuple[float, float] | None, factor: float, now: float) -> float:
    """Return the factor that is expected to use what is asked for.

    Args:
        seen: The factor before, and what was used with it.
        factor: The factor of now.
        now: What is used with it.
    """
    wanted = 1 - MARGIN
    if seen is None or (seen[0] - factor) * (seen[1] - now) <= 0:
        return factor * wanted / now
    return factor + (wanted - now) * (seen[0] - factor) / (seen[1] - now)


__all__ = ["ROUNDING", "homed"]
