"""What the forward analysis finds out about a node: its channels, and what they read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import fx

from narrows.ir.labels import Bools, Ints, is_count


@dataclass(frozen=True)
class Read:
    """How a result depends on one operand, channel by channel.

    Attributes:
        operand: The node read.
        source: Per result label the operand label it reads element by element, -1 for none.
        pairs: Instead of ``source``: result labels and operand labels, one entry per dependence.
        couples: Whether labels so related live and die together in a constrained plan.
    """

    operand: fx.Node
    source: Ints | None = None
    pairs: tuple[Ints, Ints] | None = None
    couples: bool = True

    @cached_property
    def straight(self) -> bool:
        """Whether each result label reads the operand's label of the same number."""
        return self.source is not None and is_count(self.source)

    def reached(self, need: Bools, count: int) -> Bools:
        """Return which of the operand's ``count`` labels the needed result labels read."""
        if self.straight and len(need) == count:
            return need.copy()
        mask = np.zeros(count, dtype=bool)
        if self.source is not None:
            hit = self.source[need]
            mask[hit[hit >= 0]] = True
        elif self.pairs is not None:
            mask[self.pairs[1][need[self.pairs[0]]]] = True
        return mask


@dataclass(frozen=True)
class Flow:
    """What the forward analysis found out about one node.

    Attributes:
        value: The result's channels (a tuple for operators with several results).
        reads: One entry per operand that is not free, in argument order.
        barrier: Why nothing can be removed through this node, or an empty string.
        facts: What the kind wants to remember for ``demand`` and ``rewrite``.
    """

    value: Any
    reads: tuple[Read, ...] = ()
    barrier: str = ""
    facts: Any = None
