"""Distillation of logits, and whether a teacher's label smoothing stands in its way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from narrows.errors import UsageError
from narrows.training.losses.checks import refuse_pair, refuse_temperature


def distillation(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Return ``T^2 KL(softmax(t / T) || softmax(s / T))``, the mean over the batch.

    G. Hinton, O. Vinyals, J. Dean: Distilling the Knowledge in a Neural Network, 2015. The factor
    keeps the gradient's size when the temperature changes.

    Args:
        student: Logits ``[n, classes]``.
        teacher: Logits of the same shape; they get no gradient.
        temperature: ``T``.
    """
    refuse_pair("distillation", student, teacher, 2, channels=True)
    refuse_temperature("distillation", temperature)
    log_s = torch.log_softmax(student / temperature, 1)
    log_t = torch.log_softmax(teacher.detach() / temperature, 1)
    divergence = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1)
    return temperature**2 * divergence.mean()


def stability(logits: Tensor, labels: Tensor, classes: int | None = None) -> float:
    """Return how alike a teacher's outputs are within a class, at most 1.

    ``S = 1 - mean over the classes c of mean over its n_c inputs of |p_i - mean p|^2``

    with the probabilities ``p = softmax(logits)``. Z. Shen et al., Is Label Smoothing Truly
    Incompatible with Knowledge Distillation, ICLR 2021: smoothing makes a teacher more stable,
    which erases what it knows of single inputs and is bad to learn from where the classes are
    alike. Compare a teacher trained with smoothing to one without.

    Args:
        logits: ``[n, classes]``.
        labels: int64 ``[n]``.
        classes: How many classes there are; those without an input do not count.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise UsageError(
            f"stability got logits of shape {list(logits.shape)} and labels of shape "
            f"{list(labels.shape)}",
            where="stability",
            why="it takes a row of logits and a class per input",
            hint="logits [n, classes], labels [n]",
        )
    classes = logits.shape[1] if classes is None else classes
    p = torch.softmax(logits.detach().double(), 1)
    own = [p[labels == c] for c in range(classes)]
    spread = [(q - q.mean(0)).square().sum(1).mean() for q in own if len(q)]
    if not spread:
        raise UsageError(
            "stability has no input of any class",
            where="stability",
            why=f"none of {len(labels)} labels is one of 0 to {classes - 1}",
            hint="labels count from zero",
        )
    return 1 - float(torch.stack(spread).mean())


__all__ = ["distillation", "stability"]
