"""What an example call of an operator is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

BOOL, INT = torch.bool, torch.int64


@dataclass(frozen=True, eq=False)
class Made:
    """A tensor that a layer computes.

    Attributes:
        shape: Its shape.
        axes: The axes on which each index (each combination, if several) is a channel of the layer.
        low: The smallest value it takes; ``high``: the largest.
        dtype: The dtype it is cast to.
        silent: Whether the operator's result does not depend on its values.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...] = (1,)
    low: float = -2.0
    high: float = 2.0
    dtype: torch.dtype = torch.float64
    silent: bool = False


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight, or a constant: ``values`` where given, else random.

    Attributes:
        shape: Its shape.
        low: The smallest value; ``high``: the largest.
        zeros: Indices of axis 0 that are zero.
        values: The very values, flat.
        dtype: Its dtype.
    """

    shape: tuple[int, ...]
    low: float = -1.0
    high: float = 1.0
    zeros: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True, eq=False)
class Given:
    """An input of the model: ``high`` excluded for whole numbers."""

    shape: tuple[int, ...]
    low: float = -1.0
    high: float = 1.0
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True, eq=False)
class Size:
    """The number of rows of a model input: the size of the free batch axis."""

    rows: int = 2


@dataclass(frozen=True)
class Sample:
    """One call of an operator.

    Attributes:
        args: Its arguments; ``kwargs``: those by name.
        note: What the sample is about.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def image(width: int = 6, height: int = 4, **facts: Any) -> Made:
    """A batch of images whose channels a layer computes."""
    return Made((2, width, height, height), **facts)


def tokens(width: int = 6, **facts: Any) -> Made:
    """Sequences of tokens, channels last."""
    return Made((2, 5, width), (2,), **facts)


def heads(count: int = 2, width: int = 3, **facts: Any) -> Made:
    """Tokens in heads: channels on axes 1 and 3."""
    return Made((2, count, 5, width), (1, 3), **facts)


def grid(**facts: Any) -> Made:
    """Images whose channels lie on axes 1 and 2."""
    return Made((2, 2, 3, 4, 4), (1, 2), **facts)
