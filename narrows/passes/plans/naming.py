"""The layers that a plan means by a weight's name and a side, or why there are none."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from narrows.errors import PlanUsageError, suggest
from narrows.ir.meta import op_name, where
from narrows.ir.ops import table
from narrows.ir.ops.lookup import Lookup
from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer


def find_layers(
    program: Program, layers: Mapping[str, tuple[Layer, ...]], weight: str, side: str
) -> tuple[Layer, ...]:
    """Return the layers of ``weight`` that have a ``side``, contractions before lookups.

    `PlanUsageError` says why there are none.
    """
    name = _computed_from(program, program.aliases.get(weight, weight), layers, side)
    if name not in program.weights:
        hint = suggest(weight, layers) or suggest(weight, [*program.weights, *program.aliases])
        raise PlanUsageError(f"{program.name} has no weight {weight!r}", hint=hint)
    found = [u for u in layers.get(name, ()) if u.width(side)]
    if found:
        return tuple(sorted(found, key=lambda u: u.contraction is None))
    readers = program.users_of(name)
    raise PlanUsageError(
        f"{weight!r} takes no mask on its {side}",
        where=where(readers[0]) if readers else "",
        why=_why_not(program, readers, side),
        hint="mask the weight of a convolution, a linear layer or a matrix product",
    )


def _computed_from(
    program: Program, name: str, layers: Mapping[str, tuple[Layer, ...]], side: str
) -> str:
    """Return the weight that is computed from one that no layer has itself, where that is one."""
    if name in program.weights:
        return name
    made = [n for n, recipe in program.recipes.items() if name in recipe.state_dict()]
    found = [n for n in made if any(u.width(side) for u in layers.get(n, ()))]
    if len(found) > 1:
        raise PlanUsageError(
            f"{len(found)} weights are computed from {name!r}",
            why=f"the layers have {', '.join(found)}",
            hint="mask one of these",
        )
    return found[0] if found else name


def _why_not(program: Program, readers: list[fx.Node], side: str) -> str:
    if not readers:
        return "nothing reads it"
    node = readers[0]
    row = table.find(node)
    if row is None:
        return f"{op_name(node)} has no row in the op table and is a barrier"
    if isinstance(row, Lookup):
        return "a lookup sums over no channels"
    if row.contracts:
        return f"{op_name(node)} reads another weight as its input, or one computed from inputs"
    return f"{op_name(node)} makes no channels with it"
