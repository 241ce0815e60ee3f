"""What a criterion is, and its scores, checked.

Any object with ``name`` and ``score`` is one, and so is any function of the arguments of ``score``.
Those of narrows say more of themselves (`Member`): which sides of a layer they score, what data
they need, whose idea they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from narrows.errors import PlanError, users_code
from narrows.ir.program import Program
from narrows.ir.structure.layers import SIDES, Layer
from narrows.passes.choosing.seen import Seen

Score = Callable[[Program, Layer, str], Any]
Sums = Mapping[str, Tensor]

ACTIVATIONS, GRADIENTS = "activations", "gradients"  # the data that criteria need

ROLES = {"inputs": "what reads a channel", "outputs": "what makes a channel"}


class NoScoreError(PlanError):
    """A criterion has no meaning for one side of one layer; the message says why."""


@runtime_checkable
class Criterion(Protocol):
    """Scores channels; the lowest go first."""

    @property
    def name(self) -> str:
        """What a plan's reasons and the command line call it."""
        ...

    def score(self, program: Program, layer: Layer, side: str) -> Any:
        """Return a number per channel of ``layer`` on ``side``: ``inputs`` or ``outputs``.

        Raises:
            NoScoreError: It has no meaning there.
        """
        ...


class Member(ABC):
    """A criterion of the catalog; its fields are options, spelled ``random{seed=3}``.

    Attributes:
        name: What it is called.
        paper: Where it is from.
        data: What it needs to see: nothing, ``activations``, or ``gradients`` as well.
        sides: The sides of a layer that it scores. Where a coupling is scored, only those count.
        comparable: Whether its scores of different layers can be compared as they are: a choice
            overall then does not divide them by their mean first.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    data: ClassVar[str] = ""
    sides: ClassVar[tuple[str, ...]] = SIDES
    comparable: ClassVar[bool] = False

    def no(self, why: str, instead: str = "l1") -> NoScoreError:
        """Return the error for a layer that it has no score for.

        Args:
            why: What the layer lacks.
            instead: A criterion that has one.
        """
        return NoScoreError(
            f"{self.name} has no score for it", why=why, hint=f"criterion={instead!r}"
        )


class DataFree(Member):
    """A criterion that knows the weights alone."""

    @abstractmethod
    def score(self, program: Program, layer: Layer, side: str) -> Any:
        """Return a number per channel of a side; `NoScoreError` where it has no meaning."""


class Measuring(Member):
    """A criterion that scores by what layers see of data.

    Attributes:
        whole: Whether what it measures is of the layer, whichever side is scored.
    """

    data = ACTIVATIONS
    whole: ClassVar[bool] = False

    @abstractmethod
    def measure(self, seen: Seen) -> Sums:
        """Return what a batch adds, float64: tensors that are summed over batches, by name.

        It is called for every batch and each side that is scored. Nothing else is kept, so memory
        does not grow with the data.

        Raises:
            NoScoreError: It has no meaning there.
        """

    @abstractmethod
    def weigh(self, program: Program, layer: Layer, side: str, sums: Sums) -> Any:
        """Return a number per channel of a side.

        Args:
            program: The program.
            layer: The layer.
            side: ``inputs`` or ``outputs``.
            sums: What `measure` returned, summed over all batches and all uses of the weight, and
                ``examples``: how many examples that were.
        """


@dataclass(frozen=True, eq=False)
class Function:
    """A function as a criterion."""

    name: str
    function: Score

    def score(self, program: Program, layer: Layer, side: str) -> Any:
        """Return what the function returns."""
        return self.function(program, layer, side)


@dataclass(frozen=True, eq=False)
class Remembered:
    """A criterion that scores every weight once: for who asks several times.

    Attributes:
        criterion: The criterion.
    """

    criterion: Any
    _known: dict[tuple[Layer, str], Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The criterion's name."""
        return self.criterion.name

    @property
    def comparable(self) -> bool:
        """Whether the criterion's scores can be compared as they are."""
        return comparable(self.criterion)

    def score(self, program: Program, layer: Layer, side: str) -> Any:
        """Return what the criterion returned the first time."""
        if (layer, side) not in self._known:
            self._known[layer, side] = scores(self.criterion, program, layer, side)
        return self._known[layer, side]


def comparable(criterion: Any) -> bool:
    """Return whether a criterion's scores of different layers can be compared as they are."""
    return bool(getattr(criterion, "comparable", False))


def scores(criterion: Any, program: Program, layer: Layer, side: str) -> np.ndarray:
    """Return a criterion's scores, checked: one per channel, float64, no NaN.

    Raises:
        NoScoreError: The criterion has no meaning for that side of the layer.
        PlanError: It failed, or gave something else.
    """
    sides = getattr(criterion, "sides", SIDES)
    if side not in sides:
        other = "input" if side == "outputs" else "output"
        raise NoScoreError(
            f"{criterion.name} has no score for the {side} of {layer.weight!r}",
            why=f"it scores {ROLES[sides[0]]}",
            hint=f"constrained=False, side={other!r}",
        )
    try:
        with users_code(f"{criterion.name} failed on the {side} of {layer.weight!r}", PlanError):
            given = criterion.score(program, layer, side)
    except NoScoreError as no:
        what = f"{criterion.name} has no score for the {side} of {layer.weight!r}"
        raise NoScoreError(what, why=no.why, hint=no.hint) from None
    return _checked(criterion.name, given, layer, side)


def _checked(name: str, given: Any, layer: Layer, side: str) -> np.ndarray:
    if isinstance(given, Tensor):
        given = given.detach().cpu().to(torch.float64).numpy()
    try:
        result = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as cause:
        raise PlanError(
            f"{name} gave no numbers for the {side} of {layer.weight!r}: {given!r:.60}"
        ) from cause
    width = layer.width(side)
    if result.shape != (width,):
        raise PlanError(
            f"{name} gave scores of shape {list(result.shape)} for the {side} of "
            f"{layer.weight!r}, which has {width}"
        )
    if np.isnan(result).any():
        count = int(np.isnan(result).sum())
        raise PlanError(
            f"{name} scores {count} {side} of {layer.weight!r} as NaN",
            hint="the weights, or what the criterion reads, hold NaN",
        )
    return result
