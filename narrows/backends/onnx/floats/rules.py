"""`rule`: enters a function that writes an operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from narrows.backends.onnx.integer.graph import Graph

Write = Callable[[Graph, fx.Node], Any]
Fits = Callable[[fx.Node], bool]


@dataclass(frozen=True)
class Rule:
    """How an operator is written.

    Attributes:
        write: Adds its nodes to a graph.
        fits: Whether it holds for a node.
        opset: The first version of the ONNX operators that has what it writes.
    """

    write: Write
    fits: Fits = lambda node: True
    opset: int = 18


RULES: dict[str, Rule] = {}


def rule(*names: str, fits: Fits | None = None, opset: int = 18) -> Callable[[Write], Write]:
    """Enter a function for operators, by their names as ATen spells them, where they are alike."""

    def enter(function: Write) -> Write:
        made = Rule(function, fits or Rule.fits, opset)
        RULES.update(dict.fromkeys(names, made))
        return function

    return enter


__all__ = ["RULES", "Fits", "Rule", "Write", "rule"]
