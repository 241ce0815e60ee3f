"""A self-supervised teacher's distribution as the only target (S2-BNN).

Z. Shen, Z. Liu, J. Qin, L. Huang, K.-T. Cheng, M. Savvides: S2-BNN, CVPR 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrows.training.losses.checks import refuse_pair, refuse_temperature


def self_supervised(student: Tensor, teacher: Tensor, temperature: float = 0.2) -> Tensor:
    """Return the cross-entropy ``-sum softmax(t / T) log softmax(s / T)``, the mean over inputs.

    It differs from the KL divergence to the real-valued teacher by the teacher's entropy, which is
    a constant: the gradients are the same. There is no contrastive term and no label, and the
    method trains with a weight decay of zero.

    Args:
        student: What the student's head gives, ``[n, d]``.
        teacher: What the teacher's does, of the same shape; it gets no gradient.
        temperature: ``T``, of both.
    """
    refuse_pair("self_supervised", student, teacher, 2, channels=True)
    refuse_temperature("self_supervised", temperature)
    target = torch.softmax(teacher.detach() / temperature, 1)
    return -(target * torch.log_softmax(student / temperature, 1)).sum(1).mean()


__all__ = ["self_supervised"]
