"""What several gates and losses refuse."""

from __future__ import annotations

from narrows.errors import UsageError


def share_of(ratio: float, name: str = "ratio") -> float:
    """Return a share of channels that go; `UsageError` unless it is in 0..1, below 1."""
    if not 0 <= ratio < 1:
        raise UsageError(
            f"{name} is the share of channels that go, got {ratio!r}",
            where=name,
            why="it is at least 0 and less than 1",
            hint=f"{name}=0.5 closes half of the channels",
        )
    return ratio


def divisor(value: float, what: str, *, where: str, hint: str) -> float:
    """Return a number that others are divided by; `UsageError` unless it is above zero."""
    if not value > 0:
        raise UsageError(what, where=where, why="others are divided by it", hint=hint)
    return value


def interval_of(steps: int) -> int:
    """Return after how many steps something is found anew; `UsageError` unless it is one."""
    if steps < 1:
        raise UsageError(
            f"masks are found anew every {steps} steps",
            where="interval",
            why="it counts steps from one time to the next",
            hint="interval=100",
        )
    return steps


__all__ = ["divisor", "interval_of", "share_of"]
