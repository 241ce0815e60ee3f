"""Passes and programs for the tests of the pipeline: honest ones, and some that break a promise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pytest

from narrows.ir.program import Note, Program
from narrows.passes import catalog
from narrows.passes.base import Fidelity, Pass, PassResult
from tests.builder import Builder, aten


@dataclass(frozen=True)
class Options(Pass):
    """Does nothing, with options of every kind."""

    name: ClassVar[str] = "options"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    flag: bool = False
    count: int = 1
    rate: float = 0.5
    text: str = "x"
    maybe: str | None = None
    sizes: tuple[int, ...] = ()
    mode: Literal["a", "b"] = "a"
    any_value: Any = 0

    def run(self, program: Program) -> PassResult:
        return PassResult(program, False)


@dataclass(frozen=True)
class Needs(Pass):
    """Needs two other passes before it, and one option."""

    name: ClassVar[str] = "needs"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    requires: ClassVar[tuple[str, ...]] = ("options", "fold-batch-norm")
    must: int

    def run(self, program: Program) -> PassResult:
        return PassResult(program, False, (Note("x", "test", "a note"),))


@dataclass(frozen=True)
class Scale(Pass):
    """Scales the first weight by ``by``, in one of several ways that a pass must not."""

    name: ClassVar[str] = "scale"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    by: float = 2.0
    how: str = "copy"
    says: bool = True

    def run(self, program: Program) -> PassResult:
        result = program if self.how == "same" else program.copy()
        name = next(iter(result.weights))
        if self.how == "in-place":
            result.weights[name].mul_(self.by)
        elif self.how != "nothing":
            result.weights[name] = result.weights[name] * self.by
        if self.how == "break":
            del result.weights[name]
        if self.how == "raise":
            raise RuntimeError("broken")
        return PassResult(result, self.says)


@dataclass(frozen=True)
class Lossy(Scale):
    """Scales, and says so."""

    name: ClassVar[str] = "lossy"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put these passes into the catalog, as another package would."""
    own = {c.name: f"{__name__}:{c.__name__}" for c in (Options, Needs, Scale, Lossy)}
    monkeypatch.setattr(
        catalog, "PASSES", replace(catalog.PASSES, builtin={**catalog.BUILTIN, **own})
    )


def network() -> Program:
    b = Builder((2, 2, 4, 4))
    x = b.relu(b.norm(b.conv(b.inputs[0], "conv", 4, 2), "norm", 4))
    return b.program(b.call(aten.mul.Tensor, x, 1, name="times_one"))


def plain() -> Program:
    b = Builder((2, 2, 4, 4))
    return b.program(b.conv(b.inputs[0], "conv", 4, 2))
