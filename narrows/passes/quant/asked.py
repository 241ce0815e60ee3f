"""Which bits settings ask for: a number, a coding, or one of them per glob."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from narrows.errors import UsageError
from narrows.ir.integer.grid import BITS, WeightGrid
from narrows.passes.quant.survey import matches

Bits = int | Mapping[str, int]
Codings = int | str | Mapping[str, int | str]


def globs(given: Any) -> tuple[Any, ...]:
    """Return the globs of an argument that takes one or several."""
    one = isinstance(given, str) or not isinstance(given, Iterable)
    return (given,) if one else tuple(given)


def check_bits(what: str, bits: Any, known: range = BITS) -> None:
    """Raise `UsageError` unless ``bits`` is a number of bits that codes can have."""
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in known:
        raise UsageError(
            f"{what} takes {known[0]} to {known[-1]} bits, got {bits!r}",
            why=f"codes are stored in {known[-1]} bits, and one bit holds no sign and magnitude",
            hint=f"{what}=8; for sensitive layers activations={{'head*': 16, '*': 8}}",
        )


def check_coding(coding: str) -> None:
    """Raise `UsageError` unless ``coding`` names powers of two."""
    try:
        WeightGrid.spelled(coding)
    except UsageError as error:
        raise UsageError(
            f"weights takes 2 to 8 bits, or pot2, pot3, pot4, got {coding!r}",
            why=error.why,
            hint="weights='pot4' for signed powers of two, 'pot4x2' for sums of two of them",
        ) from error


def asked_for(nodes: Sequence[fx.Node], asked: Codings, what: str) -> Any:
    """Return the bits, or the coding, that settings ask for at a layer or a site: the first is its
    name, the others are absorbed into it."""
    if not isinstance(asked, Mapping):
        return asked
    for glob, bits in asked.items():
        if glob == "*" or any(matches(n, glob) for n in nodes):
            return bits
    raise UsageError(
        f"{what} says nothing of {nodes[0].name}", hint=f"{what}={{..., '*': 8}} is for the rest"
    )


def refuse_unmatched(asked: Codings, what: str, groups: Iterable[Sequence[fx.Node]]) -> None:
    """Raise `UsageError` for a glob that would have no effect."""
    nodes = [n for group in groups for n in group]
    for glob in asked if isinstance(asked, Mapping) else ():
        if glob != "*" and not any(matches(n, glob) for n in nodes):
            raise UsageError(
                f"{what} has bits for {glob!r}, which matches nothing that has {what}",
                hint="globs are held against node names, module paths and weight names, as in "
                "print(program)",
            )


__all__ = [
    "Bits", "Codings", "asked_for", "check_bits", "check_coding", "globs", "refuse_unmatched",
]  # fmt: skip
