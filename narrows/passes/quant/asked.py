"""Which bits settings ask for: a number, a coding, or one of them per glob."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from narrows.errors import UsageError
from narrows.passes.quant.options import Codings
from narrows.passes.quant.survey import matches


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


__all__ = ["asked_for", "refuse_unmatched"]
