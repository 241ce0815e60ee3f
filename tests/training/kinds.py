"""Every kind of gates, by name, and what an error of theirs says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from narrows import training
from narrows.errors import PlanError, UsageError
from narrows.ir.program import Program
from narrows.training.gates import Gates

Make = Callable[[nn.Module, Program], Gates]
STAGE = {"block1": "block1.conv2.weight", "block2": "block2.conv2.weight"}

KINDS: dict[str, Make] = {
    "soft masks, inputs": lambda m, p: training.SoftMasks(
        m, p, inputs="*", ratio=0.3, interval=4, until=12
    ),
    "soft masks, outputs": lambda m, p: training.SoftMasks(m, p, outputs="*", interval=10),
    "pdp": lambda m, p: training.DifferentiableMasks(
        m, p, outputs="*", ratio=training.Ramp(0, 0.4, steps=10)
    ),
    "pdp, 2 of 4 inputs": lambda m, p: training.DifferentiableMasks(
        m, p, inputs=["block*", "plain.weight"], pattern=(2, 4)
    ),
    "gumbel": lambda m, p: training.GumbelGates(m, p, outputs="*", ratio=0.3),
    "gumbel, tied": lambda m, p: training.GumbelGates(m, p, outputs="*", ratio=0.3, tied=True),
    "gumbel, both sides": lambda m, p: training.GumbelGates(
        m, p, outputs="block1*", inputs=["head.weight", "plain.*"], ratio=0.3
    ),
    "norm sparsity": lambda m, p: training.NormSparsity(
        m, p, outputs=["stem*", "block*"], ratio=0.3, rate=training.Tent(1e-2, steps=20),
        groups={"stem": "stem*", "blocks": "block*"},
    ),
    "generated": lambda m, p: spread(
        training.GeneratedGates(m, p, outputs="block*", latency=Sum(), target=20.0)
    ),
    "annealed": lambda m, p: spread(training.AnnealedMasks(m, p, outputs="block?.*", steps=10)),
    "attended ratios": lambda m, p: training.AttendedRatios(m, p, outputs="*", ratio=0.4),
    "searched widths": lambda m, p: training.SearchedWidths(
        m, p, outputs=["*conv1*", "plain*"], depths=[STAGE], target=0.4, strength=5.0
    ),
}  # fmt: skip


SPREAD = ("generated", "annealed")


def spread(gates: Any) -> Any:
    """Return gates whose channels are far from each other at first, open and closed in each."""
    torch.manual_seed(0)
    with torch.no_grad():
        for scores in getattr(gates, "scores", ()):
            scores.copy_(torch.linspace(-1, 2, len(scores))[torch.randperm(len(scores))])
        for generator in getattr(gates, "generators", ()):
            generator[2].weight.mul_(8)
        for number, generator in enumerate(getattr(gates, "generators", ())):
            generator[2].bias.sub_(gates._logits()[number].median())
    return gates


class Sum(nn.Module):
    def forward(self, widths: Tensor) -> Tensor:
        return widths.sum()


def parts(error: BaseException) -> str:
    """Return an error's text, which says what, where, why and what to try."""
    assert isinstance(error, UsageError | PlanError)
    assert error.what
    assert error.where
    assert error.why
    assert error.hint
    return str(error)
