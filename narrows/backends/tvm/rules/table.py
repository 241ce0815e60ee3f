"""The table of lowering rules, keyed by the name of the op row: ``conv2d.default``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from narrows.backends.tvm.lowering import Lowering

Rule = Callable[[Lowering, "Call"], Any]

GETITEM = "getitem"  # the one operator that is not of ATen

RULES: dict[str, Rule] = {}


@dataclass(frozen=True)
class Call:
    """One operator call of a description.

    Attributes:
        name: The node's name.
        op: The overload as ATen spells it.
        args: Every argument by its schema name; tensors are `Value`.
        shape: The result's shape; a list of shapes for several results.
        dtype: The result's dtype, or a list.
    """

    name: str
    op: str
    args: dict[str, Any]
    shape: tuple[int, ...]
    dtype: str

    @property
    def rank(self) -> int:
        """The number of the result's axes."""
        return len(self.shape)


def rule(names: str) -> Callable[[Rule], Rule]:
    """Return a decorator that enters a rule for overloads; ``.default`` may be left out."""

    def enter(function: Rule) -> Rule:
        for name in names.split():
            plain = "." in name or name == GETITEM
            RULES[name if plain else f"{name}.default"] = function
        return function

    return enter
