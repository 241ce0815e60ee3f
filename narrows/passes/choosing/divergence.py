"""How far a changed network's outputs are from its own: what stands in for labels.

For logits it is the Kullback-Leibler divergence of the class probabilities. Its second-order part
in a change ``d`` of the logits is ``1/2 d^T (diag(p) - p p^T) d``: a random vector of that
covariance, sent back through the network, gives the diagonal of the Gauss-Newton matrix (Martens,
2014) with one backward pass and no labels. For other outputs it is half the squared error over the
output's variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("auto", "logits", "values")


@dataclass(frozen=True)
class Divergence:
    """How outputs are compared.

    Attributes:
        logits: Per output whether it is logits along its last axis; others are values.
        scales: Per output the standard deviation of its values, 1 for logits.
    """

    logits: tuple[bool, ...]
    scales: tuple[float, ...]

    @staticmethod
    def of(outputs: Sequence[object], kind: str = "auto") -> Divergence:
        """Return how to compare outputs that look like these.

        Args:
            outputs: The network's own outputs on some data.
            kind: ``logits``, ``values``, or ``auto``: matrices of at least two columns that do not
                add up to one are logits.
        """
        logits, scales = [], []
        for z in outputs:
            if not isinstance(z, Tensor) or not z.is_floating_point() or not z.dim():
                logits.append(False)
                scales.append(1.0)
                continue
            logits.append(kind != "values" and _is_logits(z, kind))
            scales.append(
                1.0 if logits[-1] else float(z.float().std(correction=0).clamp(min=1e-12))
            )
        return Divergence(tuple(logits), tuple(scales))

    def agreement(self, own: Sequence[object], other: Sequence[object]) -> float | None:
        """Return the share of examples whose largest logit is the same; `None` without logits."""
        shares = [
            float((a.argmax(-1) == b.argmax(-1)).double().mean())
            for a, b, logits in zip(own, other, self.logits, strict=True)
            if logits and isinstance(a, Tensor) and isinstance(b, Tensor)
        ]
        return min(shares) if shares else None

    def between(self, own: Sequence[object], other: Sequence[object]) -> float:
        """Return the divergence of other outputs from a network's own, mean over examples."""
        total = 0.0
        for a, b, logits, scale in zip(own, other, self.logits, self.scales, strict=True):
            if not isinstance(a, Tensor) or not isinstance(b, Tensor) or not a.is_floating_point():
                continue
            a, b = a.double(), b.double()
            if logits:
                p, q = a.log_softmax(-1), b.log_softmax(-1)
                # A class that a network rules out has a logit of -inf, and adds nothing.
                each = (p.exp() * (p - q)).masked_fill(p.isneginf(), 0.0).sum(-1)
            else:
                each = 0.5 * ((a - b) / scale).square()
            total += float(each.sum() / max(len(a), 1) if a.dim() else each)
        return total

    def probe(self, outputs: Sequence[object], generator: torch.Generator) -> Tensor:
        """Return a number whose gradients' squares are, in the mean, the Gauss-Newton diagonal."""
        total = torch.zeros(())
        for z, logits, scale in zip(outputs, self.logits, self.scales, strict=True):
            if not isinstance(z, Tensor) or not z.is_floating_point():
                continue
            noise = torch.randn(z.shape, generator=generator, dtype=z.dtype)
            if logits:
                p = z.detach().softmax(-1)
                root = p.sqrt()
                v = root * noise - p * (root * noise).sum(-1, keepdim=True)
            else:
                v = noise / scale
            total = total + (z * v).sum()
        return total


def _is_logits(z: Tensor, kind: str) -> bool:
    if kind == "logits":
        return True
    if z.dim() != 2 or z.shape[1] < 2:
        return False
    return not bool(((z.sum(1) - 1).abs() < 1e-3).all() and (z >= 0).all())
