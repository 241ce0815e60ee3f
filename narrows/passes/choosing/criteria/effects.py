"""Effects: what removing a channel does to the loss, to first order, example by example.

The effect of a channel on an example is the sum over positions of ``x * dL/dx``. Positions are
added before anything is squared or made positive: a channel goes at all of them together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer
from narrows.passes.choosing.criteria.base import GRADIENTS, Measuring, Sums
from narrows.passes.choosing.seen import Seen


def effects(seen: Seen) -> Tensor:
    """Return every channel's effect on every example, float64: ``[examples, channels]``."""
    assert seen.grads is not None
    grads = seen.grads.reshape(seen.flat.shape)
    return (seen.flat.double() * grads.double()).sum(2)


@dataclass(frozen=True)
class Taylor(Measuring):
    """The mean over the examples of the magnitude of a channel's effect.

    For what reads a channel it is the effect of this reader alone.
    """

    name: ClassVar[str] = "taylor"
    paper: ClassVar[str] = (
        "Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, "
        "ICLR 2017"
    )
    data: ClassVar[str] = GRADIENTS
    comparable: ClassVar[bool] = True

    def measure(self, seen: Seen) -> Sums:
        """Return the sums of the effects' magnitudes."""
        return {"effects": effects(seen).abs().sum(0)}

    def weigh(self, program: Program, layer: Layer, side: str, sums: Sums) -> Tensor:
        """Return the means."""
        return sums["effects"] / sums["examples"]


@dataclass(frozen=True)
class GaussNewton(Measuring):
    """Half the mean over the examples of the square of a channel's effect.

    With the probe of the network's own outputs that is the second-order rise of their divergence
    where the channel goes and nothing makes up for it.
    """

    name: ClassVar[str] = "gauss-newton"
    paper: ClassVar[str] = (
        "Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018"
    )
    data: ClassVar[str] = GRADIENTS
    comparable: ClassVar[bool] = True

    def measure(self, seen: Seen) -> Sums:
        """Return the sums of the effects' squares."""
        return {"squares": effects(seen).square().sum(0)}

    def weigh(self, program: Program, layer: Layer, side: str, sums: Sums) -> Tensor:
        """Return half the mean squares."""
        return sums["squares"] / (2 * sums["examples"])


@dataclass(frozen=True)
class Diversity(Measuring):
    """The variance over the examples of the magnitude of an input channel's effect.

    A channel of a generator that matters alike whatever is drawn adds nothing to its diversity. The
    effect is the gradient by one scale of all weights that read the channel; the paper takes the
    mean magnitude over the single weights.
    """

    name: ClassVar[str] = "diversity"
    paper: ClassVar[str] = (
        "Chung et al., Diversity-aware Channel Pruning for StyleGAN Compression, CVPR 2024"
    )
    data: ClassVar[str] = GRADIENTS
    sides: ClassVar[tuple[str, ...]] = ("inputs",)

    def measure(self, seen: Seen) -> Sums:
        """Return the sums of the magnitudes and of their squares."""
        found = effects(seen).abs()
        return {"effects": found.sum(0), "squares": found.square().sum(0)}

    def weigh(self, program: Program, layer: Layer, side: str, sums: Sums) -> Tensor:
        """Return the variances."""
        if sums["examples"] < 2:
            raise self.no("one example has no variance: give more data", "taylor")
        mean = sums["effects"] / sums["examples"]
        return (sums["squares"] / sums["examples"] - mean.square()).clamp(min=0)
