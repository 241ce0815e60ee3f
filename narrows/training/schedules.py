"""Schedules: numbers that change over training, as functions of the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from narrows.errors import UsageError
from narrows.training.checks import divisor

Schedule = float | Callable[[int], float]


def at(schedule: Schedule, step: int) -> float:
    """Return a schedule's value at a step; a number is the same at every step."""
    return float(schedule(step) if callable(schedule) else schedule)


def temperature_at(schedule: Schedule, step: int) -> float:
    """Return a temperature at a step; `UsageError` unless it is above zero."""
    heat = at(schedule, step)
    hint = "temperature=Ramp(1.0, 0.1, steps=1000) cools to 0.1"
    return divisor(heat, f"the temperature is {heat!r} at step {step}", where="step()", hint=hint)


@dataclass(frozen=True)
class Ramp:
    """From one number to another over some steps, and then constant.

    ``end + (start - end) (1 - t) ** power`` with ``t`` the share of the steps that is done: linear
    for a power of 1; for 3 fast at first, as pruning ratios are often raised.

    Attributes:
        start: The value at step ``delay``, and before.
        end: The value ``steps`` later, and afterwards.
        steps: How many steps lie between.
        power: How fast it starts.
        delay: The first step of the ramp.
    """

    start: float
    end: float
    steps: int
    power: float = 1.0
    delay: int = 0

    def __post_init__(self) -> None:
        """Refuse a ramp without steps."""
        if self.steps < 1:
            raise _without_steps("Ramp", self.steps)

    def __call__(self, step: int) -> float:
        """Return the value at a step."""
        done = min(max(step - self.delay, 0) / self.steps, 1.0)
        return self.end + (self.start - self.end) * (1 - done) ** self.power


@dataclass(frozen=True)
class Tent:
    """Up from zero to a peak, and down to zero again: a penalty that first finds the weak channels
    and then lets the others recover.

    Attributes:
        peak: The highest value.
        steps: How many steps the whole takes; it is zero afterwards.
        top: The share of the steps at which the peak is.
    """

    peak: float
    steps: int
    top: float = 0.5

    def __post_init__(self) -> None:
        """Refuse a tent without steps or with its peak outside."""
        if self.steps < 1:
            raise _without_steps("Tent", self.steps)
        if not 0 < self.top < 1:
            raise UsageError(
                f"Tent has its peak at a share of the steps, got {self.top!r}",
                where="top",
                why="it lies between 0 and 1",
                hint="top=0.5",
            )

    def __call__(self, step: int) -> float:
        """Return the value at a step."""
        done = min(step / self.steps, 1.0)
        return self.peak * min(done / self.top, (1 - done) / (1 - self.top))


@dataclass(frozen=True)
class Sawtooth:
    """Within each epoch linearly from ``1 / highest`` to ``highest``, and from the start again.

    Attributes:
        highest: The value at an epoch's last step.
        steps: How many steps an epoch has.
    """

    highest: float
    steps: int

    def __post_init__(self) -> None:
        """Refuse an epoch of a single step, and a highest value that is not the highest."""
        if self.steps < 2:
            raise _without_steps("Sawtooth", self.steps)
        if self.highest <= 1:
            raise UsageError(
                f"Sawtooth rises to {self.highest!r}",
                where="highest",
                why="it starts at the reciprocal, which has to be lower",
                hint="highest=50",
            )

    def __call__(self, step: int) -> float:
        """Return the value at a step."""
        low = 1 / self.highest
        return low + (self.highest - low) * (step % self.steps) / (self.steps - 1)


def _without_steps(name: str, steps: int) -> UsageError:
    return UsageError(
        f"{name} has {steps} steps",
        where="steps",
        why="it has to get from one value to another within them",
        hint="steps=len(batches) for an epoch",
    )


__all__ = ["Ramp", "Sawtooth", "Schedule", "Tent", "at", "temperature_at"]
