"""What is sent back through a network for gradients: a user's loss, or a probe of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from narrows.errors import PlanError, PlanUsageError
from narrows.ir.program import Program

SURE = 1e-3  # how far the sum of probabilities may be from one

Loss = Callable[[Any, Any], Tensor]


def probe(outputs: Sequence[Any], generator: torch.Generator) -> Tensor:
    """Return ``v . z`` of a network's own logits, by which gradients are taken without labels.

    With ``p = softmax(z)`` and ``e`` standard normal, ``v = sqrt(p) e - p (sqrt(p) . e)`` has the
    covariance ``diag(p) - p p^T``. So the mean of ``(d v.z / d t)^2`` is the diagonal of the
    Gauss-Newton matrix of the divergence of changed outputs from the network's own (Martens, 2014).
    An output whose rows are probabilities counts by their logarithms.

    Args:
        outputs: The flat outputs. Classes lie along axis 1 of maps, else along the last.
        generator: What draws ``e``.

    Raises:
        PlanUsageError: No output has several classes.
    """
    total = None
    for z in outputs:
        if not isinstance(z, Tensor) or not z.is_floating_point() or z.dim() < 1:
            continue
        axis = 1 if z.dim() > 3 else z.dim() - 1
        if z.shape[axis] < 2:
            continue
        sure = bool(((z.sum(axis) - 1).abs() < SURE).all() and (z >= 0).all())
        z = z.clamp(min=torch.finfo(z.dtype).tiny).log() if sure else z
        p = z.detach().softmax(axis)
        noise = torch.randn(z.shape, generator=generator, dtype=z.dtype) * p.sqrt()
        v = noise - p * noise.sum(axis, keepdim=True)
        total = (z * v).sum() + (0 if total is None else total)
    if total is None or not total.requires_grad:
        raise PlanUsageError(
            "the outputs have no gradients to score by",
            why="none of them is a distribution over several classes that a layer makes",
            hint="loss=lambda outputs, batch: outputs.square().sum()",
        )
    return total


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
    try:
        number = loss(outputs, item)
    except Exception as cause:  # a user's function may raise anything
        raise PlanError(f"the loss failed: {type(cause).__name__}: {cause}") from cause
    if not isinstance(number, Tensor) or number.numel() != 1 or not number.requires_grad:
        told = list(number.shape) if isinstance(number, Tensor) else type(number).__name__
        raise PlanUsageError(
            f"a loss returns a tensor of one number that depends on the outputs, got {told}"
        )
    if not bool(number.isfinite()):
        raise PlanError(f"the loss is {number.item()}", hint="the data, or the loss, is to blame")
    return number.sum()
