"""Channel-wise distillation (CWD) of features.

C. Shu, Y. Liu, J. Gao, Z. Yan, C. Shen: Channel-wise Knowledge Distillation for Dense Prediction,
ICCV 2021.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from narrows.training.losses.checks import refuse_pair, refuse_temperature


def channel_wise(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Return ``T^2 / C sum_c KL(softmax(t_c / T) || softmax(s_c / T))``, the mean over the batch.

    The softmax of each channel runs over all positions, so that what counts is where a channel
    looks, not how large it is.

    Args:
        student: Features ``[n, C, ...]``, one axis of positions at least.
        teacher: Features of the same shape; they get no gradient.
        temperature: ``T``.
    """
    refuse_pair("channel_wise", student, teacher, 3, channels=True)
    refuse_temperature("channel_wise", temperature)
    log_s = torch.log_softmax(student.flatten(2) / temperature, 2)
    log_t = torch.log_softmax(teacher.detach().flatten(2) / temperature, 2)
    divergence = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(2)
    return temperature**2 * divergence.mean()


__all__ = ["channel_wise"]
