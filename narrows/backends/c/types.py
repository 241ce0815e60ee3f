"""`Types`: kernels for codes of 16 bits, made of the text of those for codes of 8.

A kernel in ``kernels/`` reads and writes ``uint8_t`` and sums in ``number``. What it does with
codes does not depend on their type, so one for others is the same text with other types, and names
that say which.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from narrows.backends.c.layout import View

CODES = {1: "uint8_t", 2: "int16_t"}  # by the bytes of a code

# What is of the type of results in the kernels, and what of the second of two operands.
RESULTS = frozenset({"y", "to", "settled", "table"})
SECOND = {
    "add": ("b",),
    "mul": ("b",),
    "quotient": ("b",),
    "compare": ("b",),
    "matmul": ("b", "row"),
}

# Functions that are handed to others, and their type: they are named without being called.
HANDED = frozenset({"gather", "gather_turned", "gatherer"})

_POINTER = re.compile(r"uint8_t( \*(?:restrict )?| )(\w+)")
_FUNCTION = re.compile(r"^(?:static (?:inline )?\w+|typedef void) (\w+)\(", re.M)
_STRUCT = re.compile(r"^struct (\w+) \{", re.M)


@dataclass(frozen=True)
class Types:
    """The types that a kernel works with.

    Attributes:
        result: Of the codes it writes.
        operands: Of the codes it reads: one type, or one for each of two operands.
        sums: Of its sums.
    """

    result: str
    operands: tuple[str, ...]
    sums: str = "int64_t"

    @staticmethod
    def of(kernel: str, result: View, reads: Sequence[View], sums: str = "") -> Types | None:
        """Return the types of a kernel for tensors; ``None`` where all codes have 8 bits."""
        first = list(reads[: 2 if kernel in SECOND else 1]) or [result]
        units = [result.buffer.unit, *(v.buffer.unit for v in first)]
        if not kernel or units == [1] * len(units):
            return None
        made, *operands = (CODES[unit] for unit in units)
        return Types(made, tuple(operands), sums or "int64_t")

    @property
    def suffix(self) -> str:
        """What the names of functions and structures end in: ``_u8_i16_s32``."""
        short = {"uint8_t": "u8", "int16_t": "i16"}
        codes = "".join(f"_{short[t]}" for t in (self.result, *self.operands))
        return f"{codes}_s{self.sums.removeprefix('int').removesuffix('_t')}"


def typed(kernel: str, parts: Iterable[str], types: Types) -> list[str]:
    """Return the texts of a kernel and of what it needs, for other types.

    Args:
        kernel: The kernel's name.
        parts: The texts, as they are for codes of 8 bits.
        types: The types.
    """
    second = SECOND.get(kernel, ())

    def pointer(found: re.Match[str]) -> str:
        name = found[2]
        kind = types.operands[-1] if name in second else types.operands[0]
        kind = types.result if name in RESULTS else kind
        return f"{kind}{found[1]}{name}"

    texts = list(parts)
    structs = {name for text in texts for name in _STRUCT.findall(text)}
    called = {name for text in texts for name in _FUNCTION.findall(text)}
    renamed = (
        rf"\bstruct ({'|'.join(sorted(structs)) or '-'})\b",
        rf"(?<!struct )\b({'|'.join(sorted(called - HANDED))})\b(?=\()",
        rf"\b({'|'.join(sorted(called & HANDED)) or '-'})\b",
    )
    made = []
    for text in texts:
        text = text.replace("(uint8_t)", f"({types.result})")
        text = _POINTER.sub(pointer, text)
        text = re.sub(r"\bnumber\b", types.sums, text).replace("int32_t totals", "int64_t totals")
        for pattern in renamed:
            text = re.sub(pattern, lambda m: f"{m[0]}{types.suffix}", text)
        made.append(text)
    return made


__all__ = ["CODES", "Types", "typed"]
