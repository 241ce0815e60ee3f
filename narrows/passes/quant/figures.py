"""`Figures`: what quantization costs, tensor by tensor, and which quantizer costs most.

It is measured by `narrows.passes.quant.measure`. Ratios are signal-to-quantization-noise ratios
(SQNR) in dB: ``10 log10(sum x^2 / sum (q - x)^2)``, infinite where nothing is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from narrows.ir.integer.grid import WeightGrid

LOW = 15.0  # dB: with less, a part of a tensor is hardly there; 8 bits leave it 40 to 50
TOLD = 20  # how many culprits the text and the page list; the JSON has all


@dataclass(frozen=True)
class Measured:
    """What one quantizer does to its tensor.

    Attributes:
        name: The node of an activation, or the name of a weight.
        kind: ``activation`` or ``weight``.
        exponents: Of the scales ``2**-e``: one, or one per output channel.
        zero: The zero point.
        bits: How many bits the codes take.
        terms: Of how many powers of two the codes of a weight are sums; 0 if of any number.
        low: The smallest number.
        high: The largest one.
        rms: The root of the mean square.
        clipped: The share of the numbers that lie beyond the grid, 0..1.
        rounding: The root mean square error of those that do not, in units of the tensor.
        clipping: The root mean square error of those that do.
        sqnr: Of the float program's tensor on its grid, in dB: what this quantizer does alone.
        along: Of the quantized program's tensor against the float program's, in dB: what all
            quantizers up to here do; ``None`` for a weight.
        gain: What the outputs gain without this quantizer, in dB; ``None`` if not measured.
        source: ``file:line`` of the user's code.
        levels: How many levels of unequal width an activation has; 0 where its steps are even.
        signed: Whether codes of more than 8 bits are negative, too.
    """

    name: str
    kind: str
    exponents: tuple[int, ...]
    zero: int
    bits: int
    low: float
    high: float
    rms: float
    clipped: float
    rounding: float
    clipping: float
    sqnr: float
    along: float | None = None
    gain: float | None = None
    source: str = ""
    terms: int = 0
    levels: int = 0
    signed: bool = False

    @property
    def grid(self) -> str:
        """As text: ``2^-5 z128``, ``2^-9..2^-4 pot4``, ``2^-2 3b, 8 levels``."""
        least, most = min(self.exponents), max(self.exponents)
        text = f"2^{-most}" if least == most else f"2^{-most}..2^{-least}"
        text += f" z{self.zero}" if self.zero else " signed" if self.signed else ""
        if self.terms:
            return f"{text} {self._weights.coding}"
        text += f" {self.bits}b" if self.bits != 8 else ""
        return text + (f", {self.levels} levels" if self.levels else "")

    @property
    def end(self) -> float:
        """The largest magnitude that is not clipped, in the coarsest steps."""
        if self.kind == "weight":
            return self._weights.reach
        return 2.0 ** (self.bits - (self.zero > 0 or self.signed)) - 0.5

    @property
    def _weights(self) -> WeightGrid:
        return WeightGrid(self.exponents, self.bits, 0, self.terms)


@dataclass(frozen=True)
class Part:
    """What the quantized network leaves of one operand of a concatenation.

    Attributes:
        joined: The node that joins it.
        part: Which operand it is, and its node.
        low: The smallest number.
        high: The largest one.
        along: Of the quantized program's tensor against the float program's, in dB.
        source: ``file:line`` of the user's code.
    """

    joined: str
    part: str
    low: float
    high: float
    along: float
    source: str = ""

    @property
    def lost(self) -> bool:
        """Whether hardly anything is left of it."""
        return self.along < LOW

    def __str__(self) -> str:
        text = f"{self.joined}: part {self.part}, {self.low:.3g} to {self.high:.3g}: "
        text += decibels_text(self.along)
        return text + ("  LOST" if self.lost else "")


@dataclass(frozen=True)
class Figures:
    """What quantization did to a program; as a string it is a table.

    Attributes:
        name: The program's name.
        tensors: Every quantizer, in execution order.
        sqnr: Of the outputs with all quantizers at work, in dB; every output weighs the same.
        floats: What stays floating-point, with the reasons.
        before: Bytes of the float program's weights.
        after: Bytes of the integer program's weights and tables.
        samples: How many samples each tensor was measured on.
        switched: How many samples quantizers were switched off on; 0 if they were not.
        parts: What is left of the parts of concatenations, which a joined tensor's own ratio may
            hide.
    """

    name: str
    tensors: tuple[Measured, ...]
    sqnr: float
    floats: Mapping[str, str]
    before: int
    after: int
    samples: int
    switched: int
    parts: tuple[Part, ...] = ()

    @property
    def culprits(self) -> list[Measured]:
        """The quantizers by what the outputs gain without them, the costliest first."""
        known = [(t.gain, t) for t in self.tensors if t.gain is not None]
        return [t for _, t in sorted(known, key=lambda pair: -pair[0])]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; an infinite ratio is ``None``."""

        def plain(values: Mapping[str, Any]) -> dict[str, Any]:
            lost = {k for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
            return {k: None if k in lost else v for k, v in values.items()}

        return {
            **plain(vars(self)),
            "floats": dict(self.floats),
            "tensors": [{**plain(vars(t)), "exponents": list(t.exponents)} for t in self.tensors],
            "parts": [{**plain(vars(p)), "lost": p.lost} for p in self.parts],
            "culprits": [t.name for t in self.culprits],
        }

    def __str__(self) -> str:
        lines = [self.headline, "", *_table(self.tensors)]
        if self.switched:
            lines += ["", f"{CULPRITS} ({self.switched:,} samples):"]
            lines += [
                f"  {decibels_text(t.gain, '+.2f'):>9}  {t.kind:10}  {t.name}"
                for t in self.culprits[:TOLD]
            ]
            if len(self.culprits) > TOLD:
                lines.append(f"  and {len(self.culprits) - TOLD:,} more")
        if self.parts:
            lines += ["", "parts of what is joined:", *(f"  {part}" for part in self.parts)]
        lines += ["", "stays floating-point:" + ("" if self.floats else " nothing")]
        lines += [f"  {name}: {reason}" for name, reason in self.floats.items()]
        return "\n".join(lines) + "\n"

    @property
    def headline(self) -> str:
        """The whole in one line."""
        lost = sum(part.lost for part in self.parts)
        return (
            f"{self.name}: outputs {decibels_text(self.sqnr)}, weights {self.before:,} -> "
            f"{self.after:,} bytes, {self.samples:,} samples"
            + (f", {lost} part{'s'[: lost > 1]} LOST" if lost else "")
        )


CULPRITS = "what the outputs gain without one quantizer"


def _table(tensors: Iterable[Measured]) -> list[str]:
    rows = [COLUMNS, *map(cells, tensors)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(COLUMNS))]
    return [
        "  ".join(
            c.ljust(w) if i in LEFT else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


COLUMNS = ("tensor", "grid", "low", "high", "clipped", "rounding", "clipping", "alone", "along",
           "source")  # fmt: skip
LEFT = (0, 1, 9)  # the columns that hold words


def cells(t: Measured) -> tuple[str, ...]:
    """Return what stands in `COLUMNS` of one tensor."""
    return (
        t.name, t.grid, f"{t.low:.3g}", f"{t.high:.3g}", f"{t.clipped:.2%}",
        f"{t.rounding:.2g}", f"{t.clipping:.2g}", decibels_text(t.sqnr), decibels_text(t.along),
        t.source,
    )  # fmt: skip


def decibels_text(value: float | None, form: str = ".1f") -> str:
    """Return ``31.2 dB``, ``exact`` where nothing was lost, nothing where nothing is known."""
    if value is None:
        return ""
    return "exact" if value == math.inf else f"{value:{form}} dB"


__all__ = [
    "COLUMNS", "CULPRITS", "LEFT", "LOW", "TOLD", "Figures", "Measured", "Part", "cells",
    "decibels_text",
]  # fmt: skip
