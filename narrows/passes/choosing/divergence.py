"""How far a changed network's outputs are from its own: what stands in for labels.

What an output is, and along which axis its classes lie, is decided here alone (`Divergence.of`);
the divergence, the share of examples that are given the same class, and the probe that gradients
are taken of follow from it.

Of class probabilities it is the Kullback-Leibler divergence. Its second-order part in a change
``d`` of the logits is ``1/2 d^T (diag(p) - p p^T) d``, in one of the probabilities themselves
``1/2 d^T diag(1/p) d``: a random vector of that covariance, sent back through the network, gives
the diagonal of the Gauss-Newton matrix (Martens, 2014) with one backward pass and no labels. Of
other outputs it is half the squared error over the output's variance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from narrows.errors import PlanError, PlanUsageError
from narrows.ir.program import Program

LOGITS, PROBABILITIES, VALUES, NOTHING = "logits", "probabilities", "values", "nothing"

SURE = 1e-3  # how far the sum of probabilities may be from one: those of half types are
SPREAD = 1e-6  # of the magnitude of values: what spreads less is rounding, of float32 ten times


@dataclass(frozen=True)
class Compared:
    """How one output is compared.

    Attributes:
        kind: ``logits``, ``probabilities``, ``values``, or ``nothing`` where it holds no
            floating-point numbers.
        axis: The axis that the classes lie along.
        scale: The standard deviation of its values, 1 for classes.
    """

    kind: str
    axis: int = -1
    scale: float = 1.0

    @property
    def classes(self) -> bool:
        """Whether it tells classes."""
        return self.kind in (LOGITS, PROBABILITIES)

    @staticmethod
    def of(z: object, kind: str) -> Compared:
        """Return how to compare an output that looks like this; see `Divergence.of`."""
        if not isinstance(z, Tensor) or not z.is_floating_point() or not z.numel():
            return Compared(NOTHING)
        axis = 1 if z.dim() > 3 else z.dim() - 1
        several = z.dim() > 0 and z.shape[axis] > 1
        if several and kind == LOGITS:
            return Compared(LOGITS, axis)
        if several and kind == "auto" and z.dim() == 2:
            return Compared(PROBABILITIES if _sums_to_one(z, axis) else LOGITS, axis)
        return Compared(VALUES, scale=_spread(z.detach().double()))

    def between(self, own: Tensor, other: Tensor) -> Tensor:
        """Return the divergence of other numbers from a network's own, summed; float64."""
        a, b = own.double(), other.double()
        if self.kind == VALUES:
            return 0.5 * ((a - b) / self.scale).square().sum()
        if self.kind == LOGITS:
            p, q = a.log_softmax(self.axis), b.log_softmax(self.axis)
            # A class that a network rules out has a logit of -inf, and adds nothing.
            return (p.exp() * (p - q)).masked_fill(p.isneginf(), 0.0).sum()
        least = torch.finfo(own.dtype).tiny  # what is rounded to zero need not have been zero
        return (a * (a.clamp(min=least) / b.clamp(min=least)).log()).sum()

    def curvature(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Return random numbers whose covariance is the curvature of the divergence at ``z``."""
        noise = torch.randn(z.shape, generator=generator, dtype=z.dtype)
        if self.kind == VALUES:
            return noise / self.scale
        if self.kind == PROBABILITIES:
            return noise / z.clamp(min=torch.finfo(z.dtype).tiny).sqrt()
        p = z.softmax(self.axis)
        noise = noise * p.sqrt()
        return noise - p * noise.sum(self.axis, keepdim=True)


@dataclass(frozen=True)
class Divergence:
    """How the outputs of a network are compared, one by one."""

    outputs: tuple[Compared, ...]

    @staticmethod
    def of(outputs: Sequence[object], kind: str = "auto") -> Divergence:
        """Return how to compare outputs that look like these.

        Args:
            outputs: The network's own outputs on some data.
            kind: ``logits``: classes lie along axis 1 of maps, which have four axes or more, else
                along the last; an output of one class is values beside others. ``values``; or
                ``auto``: matrices of several columns are logits, or probabilities where their rows
                add up to one, and all else is values, as no one can tell a map of classes from any
                other.

        Raises:
            PlanUsageError: No output has several classes, and they are said to be logits.
        """
        found = tuple(Compared.of(z, kind) for z in outputs)
        if kind == LOGITS and not any(z.classes for z in found):
            raise PlanUsageError(
                "the outputs are no logits",
                why="none of them has several floating-point numbers along the axis of classes",
                hint="outputs='values'",
            )
        return Divergence(found)

    @property
    def logits(self) -> tuple[bool, ...]:
        """Per output whether it tells classes, as logits or as their probabilities."""
        return tuple(z.classes for z in self.outputs)

    def agreement(self, own: Sequence[object], other: Sequence[object]) -> float | None:
        """Return the share of places whose largest class is the same, of the output where it is
        least; `None` without classes."""
        return min((share for share, _ in self.agreements(own, other)), default=None)

    def agreements(
        self, own: Sequence[object], other: Sequence[object]
    ) -> list[tuple[float, Tensor]]:
        """Return per output with classes the share of places whose largest class is the same, and
        of which share each class is the network's own, ``[classes]``, float64."""
        found = []
        for how, a, b in self._pairs(own, other):
            if how.classes:
                first, second = a.argmax(how.axis), b.argmax(how.axis)
                counts = torch.bincount(first.flatten(), minlength=a.shape[how.axis])
                named = ~b.isnan().any(how.axis)  # among NaN there is no largest class
                same = float(((first == second) & named).double().mean())
                found.append((same, counts.double() / first.numel()))
        return found

    def between(self, own: Sequence[object], other: Sequence[object]) -> float:
        """Return the divergence of other outputs from a network's own, mean over examples."""
        return float(self.distance(own, other))

    def distance(self, own: Sequence[object], other: Sequence[object]) -> Tensor:
        """Return the same as a number in float64 that has the gradients of its operands."""
        total = torch.zeros((), dtype=torch.float64)
        for how, a, b in self._pairs(own, other):
            alone = a.dim() < 2 and how.classes  # one example's classes, and no axis of examples
            total = total + how.between(a, b) / (len(a) if a.dim() and not alone else 1)
        return total

    def probe(self, outputs: Sequence[object], generator: torch.Generator) -> Tensor:
        """Return a number whose gradients' squares are, in the mean, the Gauss-Newton diagonal.

        Args:
            outputs: The network's own outputs on some data.
            generator: What draws the random numbers.

        Raises:
            PlanUsageError: The outputs depend on nothing that has a gradient.
        """
        parts = []
        for how, z, _ in self._pairs(outputs, outputs):
            if not z.requires_grad:
                continue
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            v = how.curvature(z.detach(), generator)
            parts.append((z * v).masked_fill(v == 0, 0.0).sum())  # 0 times a logit of -inf
        if not parts:
            raise PlanUsageError(
                "the outputs have no gradients to score by",
                why="none of them holds floating-point numbers that a layer makes",
                hint="a criterion that needs none; narrows criteria lists them",
            )
        return torch.stack([part.double() for part in parts]).sum()

    def _pairs(
        self, own: Sequence[object], other: Sequence[object]
    ) -> Iterator[tuple[Compared, Tensor, Tensor]]:
        for how, a, b in zip(self.outputs, own, other, strict=True):
            if how.kind != NOTHING and isinstance(a, Tensor) and isinstance(b, Tensor):
                yield how, a, b


def refuse_nan_outputs(program: Program, outputs: Sequence[object]) -> None:
    """Raise `PlanError` where a network's own outputs hold NaN: nothing can be compared with it."""
    for number, made in enumerate(outputs):
        if isinstance(made, Tensor) and made.is_floating_point() and bool(made.isnan().any()):
            raise PlanError(
                "the network's own outputs hold NaN on the samples",
                where=f"{program.name}, output {number}",
                why="what a changed network loses is how far its outputs are from these",
                hint="leave out the samples on which the model makes no numbers, or mend the model",
            )


def _sums_to_one(z: Tensor, axis: int) -> bool:
    z = z.double()
    return bool(((z.sum(axis) - 1).abs() < SURE).all() and (z >= 0).all())


def _spread(z: Tensor) -> float:
    """Return the deviation of values; their magnitude where they are all alike, and 1 of zeros."""
    deviation, size = float(z.std(correction=0)), float(z.square().mean().sqrt())
    return deviation if deviation > SPREAD * size else size or 1.0


__all__ = ["Compared", "Divergence", "refuse_nan_outputs"]
