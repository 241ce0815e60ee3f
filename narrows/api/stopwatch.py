"""`Stopwatch`: how long a program takes on a target, over how long the unpruned one does."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from narrows.backends.artifact import Artifact
    from narrows.backends.base import Target
    from narrows.ir.program import Program

ROUNDS = 25  # at a time
TIMES = 4  # at most
CERTAIN = 0.01  # the standard error of the median, over it, that is good enough


@dataclass(frozen=True)
class Stopwatch:
    """Times programs that are really lowered, each in turns with the unpruned one.

    CPU time of one thread; the median of the rounds' ratios, so that what slows the machine for a
    while slows both. There are more rounds where they scatter.

    Attributes:
        program: The unpruned program.
        target: What is emitted.
        batch: The number of examples.
        rounds: How many turns each has at a time.
    """

    program: Program
    target: str | Target
    batch: int = 1
    rounds: int = ROUNDS
    _whole: dict[int | None, Artifact] = field(default_factory=dict)

    def __call__(self, program: Program, bits: int | None = None) -> float:
        """Return the time of a program, over that of the unpruned one.

        Args:
            program: The program.
            bits: In how many bits both are held; floating-point unless given. They are calibrated
                on the example inputs: what numbers there are makes no difference to the time.
        """
        from narrows.backends.timing import measure

        if bits not in self._whole:
            self._whole[bits] = self._lowered(self.program, bits)
        pair = [self._lowered(program, bits), self._whole[bits]]
        ratios: list[float] = []
        for _ in range(TIMES):
            made, whole = measure(pair, self.batch, self.rounds, 1)
            ratios += [a / b for a, b in zip(made.cpu, whole.cpu, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            # Of a normal distribution the quartiles are 1.35 deviations apart, and the median of n
            # has an error of 1.25 deviations over the root of n.
            if 1.25 / 1.35 * (high - low) / len(ratios) ** 0.5 <= CERTAIN * middle:
                break
        return statistics.median(ratios)

    def _lowered(self, program: Program, bits: int | None) -> Artifact:
        from narrows.api.integers import quantized
        from narrows.api.lowering import pair_of, write
        from narrows.passes.quant.options import Quantization

        if bits is not None:
            options = Quantization(weights=bits, activations=bits, method="mse")
            given = [tuple(program.examples)]
            program = quantized(program, given, options, None, False, ()).program
        return write(program, self.target, None, {}).settled(lambda: pair_of(program))


__all__ = ["Stopwatch"]
