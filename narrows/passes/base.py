"""`Pass`: one rewrite of a program, and what it promises about the numbers.

A pass is a frozen dataclass. Its fields are its options, and also how the command line spells them:
``PruneChannels(plan="p.json")`` is ``prune-channels{plan=p.json}``. The contract, which the
pipeline and its instruments hold a pass to:

* `Pass.run` never changes its input: it copies the graph and puts new tensors in place of old ones;
* the program verifies before and after `Pass.run`, not necessarily in between;
* ``changed`` is honest: ``False`` means that the result computes and holds what the input did;
* the result equals `Pass.reference` within the declared `Fidelity`;
* what a person should know is a `Note`. The pipeline adds it to the program, a pass does not.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from narrows.ir.program import Note, Program
from narrows.passes.spelling import spell

__all__ = ["TOLERANCE", "Fidelity", "Note", "Pass", "PassResult", "tolerance"]


class Fidelity(enum.Enum):
    """How close a pass keeps the numbers to its reference.

    Attributes:
        EQUAL: The same numbers, bit for bit.
        EXACT: Equal but for the rounding of reordered sums.
        CLOSE: Equal but for an approximation that the pass bounds.
        LOSSY: Different on purpose; the number is reported and bounds nothing.
    """

    EQUAL = "equal"
    EXACT = "exact"
    CLOSE = "close"
    LOSSY = "lossy"


# The largest relative error (`narrows.ir.compare.relative_error`) per fidelity and dtype.
#
# Two exact programs still sum in another order, because kernels choose their blocks by width. A sum
# of n products moves by about sqrt(n) units in the last place: 30 to 70 for the 1,000 to 5,000
# products of a usual convolution, per layer. float64 has the room to tell rounding from mistakes:
# its unit is 2.2e-16, so 1e-12 leaves 4,500 units for a deep network, while a wrong channel shows
# at 1e-3 and up. float32 (unit 1.2e-7) gets 84 units at 1e-5; a deep network with extreme
# statistics can exceed them by rounding alone, which is why `Numerics` lets float64 decide before
# it complains. The half types round every layer's output, so their bound is a few units of their
# own (9.8e-4 and 7.8e-3).
TOLERANCE: dict[Fidelity, dict[torch.dtype, float]] = {
    Fidelity.EXACT: {
        torch.float64: 1e-12,
        torch.float32: 1e-5,
        torch.float16: 1e-2,
        torch.bfloat16: 6e-2,
    },
    # An approximation is bounded by what it is for: activations that a person compares by eye.
    Fidelity.CLOSE: {
        torch.float64: 1e-3,
        torch.float32: 1e-3,
        torch.float16: 2e-2,
        torch.bfloat16: 1e-1,
    },
}


def tolerance(fidelity: Fidelity, dtype: torch.dtype) -> float:
    """Return the largest relative error that ``fidelity`` allows in ``dtype``.

    Infinite for `Fidelity.LOSSY`, zero for `Fidelity.EQUAL` and for integers: they are equal or
    wrong.
    """
    if fidelity is Fidelity.LOSSY:
        return float("inf")
    if fidelity is Fidelity.EQUAL:
        return 0.0
    return TOLERANCE[fidelity].get(dtype, 0.0)


@dataclass(frozen=True)
class PassResult:
    """What a pass made of a program.

    Attributes:
        program: The new program; the input itself where nothing changed. A draft is sealed.
        changed: Whether the new program differs from the input.
        notes: What a person should know: what was left alone, and why.
        measured: Relative errors by dtype name (``float32``), written by the `Numerics` instrument.
        remarks: What a dump is to say of nodes of the new program, by name; that a shape or the
            weights changed it says by itself.
    """

    program: Program
    changed: bool
    notes: tuple[Note, ...] = ()
    measured: dict[str, float] = field(default_factory=dict, compare=False)
    remarks: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Seal the program."""
        object.__setattr__(self, "program", self.program.seal())


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite; the module's text holds the contract.

    Attributes:
        name: The spelling, an imperative verb and a noun: ``prune-channels``.
        fidelity: What the result owes to `reference`.
        requires: Names of passes that must have run before, in the same pipeline or in an earlier
            one.
    """

    name: ClassVar[str]
    fidelity: ClassVar[Fidelity]
    requires: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def run(self, program: Program) -> PassResult:
        """Return the rewritten program, or the program itself where there was nothing to do."""

    def reference(self, program: Program) -> Program:
        """Return the program that the result of `run` must equal: as a rule the program itself."""
        return program

    def __str__(self) -> str:
        """Return the spelling, ``name{option=value}``, that `Pipeline.parse` reads back."""
        return spell(self)
