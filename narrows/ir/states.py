"""`State`: an input and an output of a program that are one state, handed back call by call.

A cache of keys, the hidden state of a recurrence: whoever calls the program gives it what an
earlier call returned. So the channels of the input and those of the output live or die together,
and may go, as nobody else sees them. What is left of a state is told in channels of the model's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from narrows.errors import ProgramError
from narrows.ir.labels import Ints


@dataclass(frozen=True)
class State:
    """One state of a program.

    Attributes:
        name: The input, a placeholder's name.
        output: The position of the output among the flat ones.
        axes: The axes of the state's channels, ascending.
        whole: How long these axes are in the captured model.
        sizes: How long they are in this program.
        kept: The places that this program has, of those in ``whole`` counted row by row, in its
            order; ``None`` for all. With one axis these are the channels that are kept.
    """

    name: str
    output: int
    axes: tuple[int, ...] = ()
    whole: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    kept: tuple[int, ...] | None = None

    @property
    def places(self) -> Ints:
        """The places that this program has of the model's state."""
        count = math.prod(self.whole)
        return np.arange(count) if self.kept is None else np.array(self.kept, dtype=np.int64)

    def narrowed(self, sizes: Sequence[int], places: Ints) -> State:
        """Return what is left of the state when of its places only some stay.

        Args:
            sizes: How long its axes are then.
            places: The places that stay, among those that this state has.
        """
        kept = self.places[places]
        whole = tuple(sizes) == self.whole and np.array_equal(kept, np.arange(len(kept)))
        return replace(self, sizes=tuple(sizes), kept=None if whole else tuple(kept.tolist()))

    def gather(self, full: Tensor) -> Tensor:
        """Return what this program takes in place of the model's own state.

        Args:
            full: The state with all channels, as the captured model takes and returns it. The other
                axes may have any size.

        Raises:
            ProgramError: It is not the model's state: an axis of channels has another size.
        """
        if full.dim() <= max(self.axes, default=-1) or self._sizes(full) != self.whole:
            raise ProgramError(
                f"{self.name} has shape {list(full.shape)}",
                why=f"the model's has {_counted(self.whole)} channels along {_along(self.axes)}",
            )
        return full if self.kept is None else self._placed(full)

    def _placed(self, full: Tensor) -> Tensor:
        rows = self._rows(full)[torch.from_numpy(self.places)]
        front = list(range(len(self.axes)))
        return rows.unflatten(0, self.sizes).movedim(front, list(self.axes)).contiguous()

    def _sizes(self, tensor: Tensor) -> tuple[int, ...]:
        return tuple(tensor.shape[a] for a in self.axes)

    def _rows(self, tensor: Tensor) -> Tensor:
        """Return a state with its places along axis 0, in one row."""
        front = list(range(len(self.axes)))
        return tensor.movedim(list(self.axes), front).flatten(0, len(front) - 1)

    def shared(self, tensor: Tensor, other: State) -> Tensor:
        """Return, of a state of this program, the places that another program has, too, in a row;
        the tensor itself where both have the same."""
        if self.kept == other.kept:
            return tensor
        own = self.places
        there = np.argsort(own, kind="stable")
        there = there[np.isin(own[there], other.places)]
        return self._rows(tensor)[torch.from_numpy(there)]

    def __str__(self) -> str:
        if self.kept is None:
            return f"{_counted(self.whole)} channels"
        text = f"{_counted(self.whole)} -> {_counted(self.sizes)} channels"
        return f"{text} (kept: {self._listed()})"

    def _listed(self) -> str:
        """Return the channels that are kept, per axis where each index of one has the same."""
        grid = np.unravel_index(self.places.reshape(self.sizes), self.whole)
        lines = []
        for axis, index in enumerate(grid):
            rows = np.moveaxis(index, axis, -1).reshape(-1, self.sizes[axis])
            if (rows != rows[:1]).any():  # every row keeps channels of its own
                return f"{_spans(self.places)} of {math.prod(self.whole)}"
            lines.append(_spans(rows[0]))
        return " x ".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        kept = None if self.kept is None else list(self.kept)
        lists = {key: list(getattr(self, key)) for key in ("axes", "whole", "sizes")}
        return {"name": self.name, "output": self.output, **lists, "kept": kept}


def shared_outputs(
    outputs: Sequence[Any], own: Sequence[State], others: Sequence[State]
) -> list[Any]:
    """Return the flat outputs of a program, those that are states cut to the channels that another
    form of the program has, too.

    Args:
        outputs: The outputs.
        own: The states of the program that gave them.
        others: Those of the other form.
    """
    found = list(outputs)
    for state, other in zip(own, others, strict=True):
        found[state.output] = state.shared(found[state.output], other)
    return found


def _counted(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _along(axes: Sequence[int]) -> str:
    return ("axis " if len(axes) == 1 else "axes ") + ", ".join(map(str, axes))


def _spans(numbers: Ints) -> str:
    """Return numbers with those in a row as one: ``0-3, 7``."""
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    parts = [p for p in np.split(numbers, cuts) if len(p)]
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


__all__ = ["State", "shared_outputs"]
