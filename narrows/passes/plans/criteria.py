"""How much a channel matters: criteria that score the channels of a weight.

A criterion sees one weight in one place and gives each of its channels a number; the channels with
the lowest go first (`narrows.passes.plans.rank`). Any function of the same arguments will do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from narrows.errors import PlanError, PlanUsageError, suggest
from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer

Score = Callable[[Program, Layer, str], Any]


@runtime_checkable
class Criterion(Protocol):
    """Scores channels; the lowest go first."""

    @property
    def name(self) -> str:
        """What a plan's reasons and the command line call it."""
        ...

    def score(self, program: Program, use: Layer, side: str) -> np.ndarray:
        """Return a float64 per channel of ``use`` on ``side``: ``inputs`` or ``outputs``."""
        ...


@dataclass(frozen=True)
class Magnitude:
    """The sum of ``|w| ** power`` over the weights that read a channel, or that make it."""

    name: str
    power: int

    def score(self, program: Program, use: Layer, side: str) -> np.ndarray:
        """Return the magnitudes; biases and norms do not count."""
        if use.contraction is not None:
            blocks = use.contraction.blocks
        else:  # a table [rows, outputs]
            blocks = program.weights[use.weight].detach().T[None, :, None, :]
        over = (1, 3) if side == "inputs" else (2, 3)
        norm = torch.linalg.vector_norm(blocks, self.power, over, dtype=torch.float64)
        return norm.flatten().pow(self.power).numpy()


@dataclass(frozen=True, eq=False)
class Function:
    """A function as a criterion."""

    name: str
    function: Score

    def score(self, program: Program, use: Layer, side: str) -> np.ndarray:
        """Return what the function returns."""
        return self.function(program, use, side)


@dataclass(frozen=True, eq=False)
class Remembered:
    """A criterion that scores every weight once: for who asks several times.

    Attributes:
        criterion: The criterion.
    """

    criterion: Criterion
    _known: dict[tuple[Layer, str], Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The criterion's name."""
        return self.criterion.name

    def score(self, program: Program, use: Layer, side: str) -> np.ndarray:
        """Return what the criterion returned the first time."""
        if (use, side) not in self._known:
            self._known[use, side] = self.criterion.score(program, use, side)
        return self._known[use, side]


CRITERIA: dict[str, Criterion] = {}


def register(criterion: Criterion) -> Criterion:
    """Add a criterion under its name; `PlanError` if the name is taken."""
    if criterion.name in CRITERIA:
        raise PlanError(
            f"there is a criterion {criterion.name!r} already",
            why=f"it is {CRITERIA[criterion.name]!r}",
            hint="give the new one another name",
        )
    CRITERIA[criterion.name] = criterion
    return criterion


register(Magnitude("l1", 1))
register(Magnitude("l2", 2))


def find(criterion: Any) -> Criterion:
    """Return a criterion from its name, a function, or itself; `PlanError` with a suggestion."""
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise PlanUsageError(
                f"there is no criterion {criterion!r}",
                why=f"known are {', '.join(sorted(CRITERIA))}",
                hint=suggest(criterion, CRITERIA),
            )
        return CRITERIA[criterion]
    if isinstance(criterion, Criterion):
        return criterion
    if callable(criterion):
        return Function(getattr(criterion, "__name__", "function"), criterion)
    raise PlanUsageError(
        f"a criterion is a name, an object with name and score, or a function; got {criterion!r}"
    )


def scores(criterion: Criterion, program: Program, use: Layer, side: str) -> np.ndarray:
    """Return a criterion's scores, checked: one per channel, float64, no NaN."""
    given = criterion.score(program, use, side)
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu().numpy()
    result = np.asarray(given, dtype=np.float64)
    width = use.width(side)
    if result.shape != (width,):
        raise PlanError(
            f"{criterion.name} gave scores of shape {list(result.shape)} for the {side} of "
            f"{use.weight!r}, which has {width}"
        )
    if np.isnan(result).any():
        count = int(np.isnan(result).sum())
        raise PlanError(
            f"{criterion.name} scores {count} {side} of {use.weight!r} as NaN",
            hint="the weights, or what the criterion reads, hold NaN",
        )
    return result
