"""What the file of a quantization plan may hold; what the numbers may be, the grids say."""

from __future__ import annotations

from typing import Annotated

import msgspec

from narrows.files.reading import Count, Exponent
from narrows.ir.program import Note

Whole = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]

LIMIT = 1 << 30  # bytes of a file: it may hold the codes of every weight


class GridFile(msgspec.Struct):
    """A `narrows.ir.integer.grid.Grid`."""

    exponent: int
    zero: int
    bits: int
    signed: bool = False


class WeightFile(msgspec.Struct):
    """A `narrows.ir.integer.grid.WeightGrid`."""

    exponents: list[int]
    bits: int
    axis: Count
    terms: Count = 0


class CodesFile(msgspec.Struct):
    """A `narrows.ir.integer.codes.WeightCodes`."""

    shape: list[Count]
    codes: str


class LevelsFile(msgspec.Struct):
    """A `narrows.ir.integer.grid.Levels`."""

    grid: GridFile
    thresholds: list[Count]


class PreparationFile(msgspec.Struct):
    """A `narrows.passes.quant.plan.Preparation`."""

    bits: int
    equalize: bool


class QuantFile(msgspec.Struct):
    """A `narrows.passes.quant.plan.QuantPlan`; its record says itself what it may be."""

    narrows: str
    fingerprint: str
    rounding: str
    activations: dict[str, GridFile]
    weights: dict[str, WeightFile]
    offsets: dict[str, list[Whole]]
    floats: dict[str, str]
    notes: list[Note]
    codes: dict[str, CodesFile] = {}
    levels: dict[str, LevelsFile] = {}
    parts: dict[str, list[Exponent]] = {}
    preparation: PreparationFile | None = None
