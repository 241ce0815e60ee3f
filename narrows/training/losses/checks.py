"""What the losses refuse."""

from __future__ import annotations

from torch import Tensor

from narrows.errors import UsageError
from narrows.training.checks import divisor


def refuse_pair(loss: str, student: Tensor, teacher: Tensor, axes: int, *, channels: bool) -> None:
    """Raise `UsageError` unless two tensors can be compared.

    Args:
        loss: The loss's name.
        student, teacher: The tensors.
        axes: How many axes they have at least.
        channels: Whether they have as many channels (axis 1), too; the other axes always agree.
    """
    ours, theirs = list(student.shape), list(teacher.shape)
    same = ours == theirs if channels else ours[:1] + ours[2:] == theirs[:1] + theirs[2:]
    if not same or len(ours) < axes or len(theirs) != len(ours):
        but = "" if channels else ", but for the channels"
        raise UsageError(
            f"{loss} got a student of shape {ours} and a teacher of shape {theirs}",
            where=loss,
            why=f"it takes two tensors of one shape{but}, of {axes} axes or more",
            hint="a 1x1 convolution brings features to other widths, interpolation to other sizes",
        )


def refuse_temperature(loss: str, temperature: float) -> None:
    """Raise `UsageError` unless a temperature is above zero."""
    hint = "temperature=4.0; higher is softer"
    what = f"{loss} got the temperature {temperature!r}"
    divisor(temperature, what, where="temperature", hint=hint)


__all__ = ["refuse_pair", "refuse_temperature"]
