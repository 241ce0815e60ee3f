"""Transfer of spatial attention, over levels.

Attention transfer is of S. Zagoruyko, N. Komodakis, ICLR 2017; normalised by a softmax in:
Y. Chu et al., Group Channel Pruning and Spatial Attention Distilling for Object Detection, 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from narrows.errors import UsageError
from narrows.training.losses.checks import refuse_pair, refuse_temperature


def spatial_attention(
    student: Sequence[Tensor] | Tensor,
    teacher: Sequence[Tensor] | Tensor,
    power: float = 2.0,
    temperature: float = 1.0,
) -> Tensor:
    """Return the distance of the two's attention maps, summed over levels, the mean over the batch.

    A map of features ``A`` is ``softmax(sum_c |A_c| ^ p / T)`` over the positions; the distance of
    two is the Euclidean one. A level's student and teacher may have different widths, and have the
    same positions.

    Args:
        student: Features ``[n, C, ...]`` per level, or those of one.
        teacher: The same of the teacher; they get no gradient.
        power: ``p``.
        temperature: ``T``.
    """
    refuse_temperature("spatial_attention", temperature)
    students = [student] if isinstance(student, Tensor) else list(student)
    teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    if len(students) != len(teachers) or not students:
        raise UsageError(
            f"spatial_attention got {len(students)} levels of the student and {len(teachers)} of "
            "the teacher",
            where="spatial_attention",
            why="it compares them level by level",
            hint="name as many feature maps of either",
        )
    total = torch.zeros((), device=students[0].device)
    for ours, theirs in zip(students, teachers, strict=True):
        refuse_pair("spatial_attention", ours, theirs, 3, channels=False)
        maps = [_attention(a, power, temperature) for a in (ours, theirs.detach())]
        total = total + torch.linalg.vector_norm(maps[0] - maps[1], dim=1).mean()
    return total


def _attention(features: Tensor, power: float, temperature: float) -> Tensor:
    return torch.softmax(features.abs().pow(power).sum(1).flatten(1) / temperature, 1)


__all__ = ["spatial_attention"]
