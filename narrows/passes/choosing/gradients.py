"""Gradients of a network: what is sent back through it, and a user's loss, checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from narrows.errors import PlanError, PlanUsageError, users_code
from narrows.ir.program import Program

Loss = Callable[[Any, Any], Tensor]


def leaf(tensor: Tensor) -> Tensor:
    """Return a tensor of the same numbers that no gradient is recorded for yet.

    What was made in inference mode cannot be part of a graph; it is copied.
    """
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def send_back(program: Program, number: Tensor) -> None:
    """Take gradients of a number; `PlanError` where an operator has no derivative."""
    try:
        number.backward()
    except RuntimeError as cause:  # torch's own: an operator without a derivative
        raise PlanError(
            f"no gradients can be taken of {program.name}: {cause}",
            hint="a criterion that needs none; narrows criteria lists them",
        ) from cause


def lost(loss: Loss, outputs: Any, item: Any) -> Tensor:
    """Return a user's loss of a batch, checked."""
    with users_code("the loss failed", PlanError):
        number = loss(outputs, item)
    if not isinstance(number, Tensor) or number.numel() != 1 or not number.requires_grad:
        told = list(number.shape) if isinstance(number, Tensor) else type(number).__name__
        raise PlanUsageError(
            f"a loss returns a tensor of one number that depends on the outputs, got {told}"
        )
    if not bool(number.isfinite()):
        raise PlanError(f"the loss is {number.item()}", hint="the data, or the loss, is to blame")
    return number.sum()
