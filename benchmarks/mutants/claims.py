"""Rows of the op table that claim something else of their operator, one trait at a time.

A wrong claim is *unsafe* if narrows would remove or compute what it must not, *pessimistic* if it
would only leave something as it is, and about *costs* if it only predicts another time.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

UNSAFE, PESSIMISTIC, COSTS = "unsafe", "pessimistic", "costs"

# What a claim is that leaves something alone: (trait, the value claimed).
CAREFUL = {
    ("partial", "True"), ("any_width", "False"), ("absorbs", "False"), ("integer", "None"),
    ("skips_zeros", "False"), ("centered", "False"), ("ordered", "True"), ("gain", "''"),
    ("constants", "never"), ("constants", "zero_only"), ("value", "''"), ("numbers", "True"),
    ("picks", "False"), ("keeps_axes", "False"), ("parts", "()"),
}  # fmt: skip
KINDS = ("view", "copy", "gather", "pointwise", "norm", "softmax")
LEFT = {"target", "summary", "samples"}  # what a row is, and what it is tried on
# What a product inherits of a contraction, and does not ask for.
ITS_OWN = {"x", "weight", "bias", "x_axis", "out_axis", "in_axis", "transposed", "spatial"}


@dataclasses.dataclass(frozen=True)
class Claim:
    """A row's trait with another value.

    Attributes:
        row: The row's name.
        trait: The field.
        number: The claim's number among those of the row.
        change: The change in words.
        danger: ``unsafe``, ``pessimistic`` or ``costs``.
    """

    row: str
    trait: str
    number: int
    change: str
    danger: str


def others(row: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield a row's traits with other values, and the value's name."""
    for field in dataclasses.fields(row):
        idle = row.kind == "product" and field.name in ITS_OWN
        idle |= field.name == "x_axis" and row.spatial > 0  # that of a convolution is known
        idle |= field.name == "absorbs" and _keeps_zero(row)  # then it is no wrong claim
        if field.name not in LEFT and not idle:
            for value, name in _others(row, field.name, getattr(row, field.name)):
                yield field.name, value, name


def _keeps_zero(row: Any) -> bool:
    """Whether an operator of one tensor makes zero of zero."""
    import torch

    for sample in row.samples[:1]:
        try:
            made = row.target(torch.zeros(1, 1, 4, 4), *sample.args[1:], **sample.kwargs)
        except (RuntimeError, TypeError, ValueError):  # it takes more tensors than that
            return False
        return isinstance(made, torch.Tensor) and not made.any()
    return False


def _others(row: Any, trait: str, value: Any) -> Iterator[tuple[Any, str]]:
    if trait in TRAITS:
        yield from TRAITS[trait](row, value)
    elif isinstance(value, bool):
        yield not value, str(not value)
    elif isinstance(value, int):
        yield value + 1, str(value + 1)
    elif isinstance(value, float):
        yield value + 1.0, str(value + 1.0)
        yield None, "None"
    elif isinstance(value, str) and value:
        yield "", "''"
    elif isinstance(value, tuple) and value:
        yield value[:-1], str(value[:-1])


def _kinds_of_work(row: Any, value: str) -> Iterator[tuple[Any, str]]:
    if value and row.costs is None:
        yield from ((kind, repr(kind)) for kind in KINDS if kind != value)


def _constants(row: Any, value: Any) -> Iterator[tuple[Any, str]]:
    from narrows.ir.ops import mixing

    made = {"never": mixing.never, "zero_only": mixing.zero_only, "constant": mixing.constant}
    if row.kind == "mixing":  # asks only whether a constant stays
        del made["zero_only"]
    yield from ((f, name) for name, f in made.items() if f(_ARGS) != value(_ARGS))


def _costs(_row: Any, value: Any) -> Iterator[tuple[Any, str]]:
    if value is not None:
        yield None, "None"


def _integer(_row: Any, value: Any) -> Iterator[tuple[Any, str]]:
    from narrows.ir.ops import integer, integer_forms

    if value is None:
        return
    yield None, "None"
    for field in dataclasses.fields(value):
        old = getattr(value, field.name)
        if isinstance(old, bool) or (isinstance(old, int) and old):
            other = dataclasses.replace(
                value, **{field.name: not old if isinstance(old, bool) else -old}
            )
            yield other, str(other)
    for form in (integer.Moves(), integer.Clip(lo=0.0), integer_forms.Add(sign=-1)):
        if type(form) is not type(value):
            yield form, str(form)


TRAITS: dict[str, Callable[[Any, Any], Iterator[tuple[Any, str]]]] = {
    "work_kind": _kinds_of_work, "constants": _constants, "costs": _costs, "integer": _integer,
}  # fmt: skip

# What pooling and statistics are asked with where a claim is compared with what a row says.
_ARGS = {"count_include_pad": True, "padding": [1, 1], "ceil_mode": False, "divisor_override": None}


def claims() -> Iterator[Claim]:
    """Yield every claim on every row."""
    from narrows.ir.ops import table

    for row in table.rows():
        for number, (trait, _, name) in enumerate(others(row)):
            old = getattr(row, trait)
            careful = (trait, name) in CAREFUL
            danger = (
                PESSIMISTIC if careful else COSTS if trait in ("work_kind", "costs") else UNSAFE
            )
            shown = getattr(old, "__name__", repr(old))
            yield Claim(row.name, trait, number, f"{trait}: {shown} -> {name}", danger)


def listed(tree: Path) -> list[Claim]:
    """Return the claims on the rows of a tree."""
    command = [sys.executable, "-m", "benchmarks.mutants.claims"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, check=True)
    return [Claim(**json.loads(line)) for line in done.stdout.splitlines()]


def drawn(found: Sequence[Claim], seed: int, only: Sequence[str]) -> list[Claim]:
    """Return claims in an order that the seed decides, each trait as often as can be."""
    draw = random.Random(seed)
    by_trait: dict[str, list[Claim]] = {}
    for claim in draw.sample(list(found), len(found)):
        if not only or claim.row in only or claim.row.removesuffix(".default") in only:
            by_trait.setdefault(claim.trait, []).append(claim)
    queues = [by_trait[trait] for trait in sorted(by_trait)]
    most = max(map(len, queues), default=0)
    return [queue[turn] for turn in range(most) for queue in queues if turn < len(queue)]


if __name__ == "__main__":
    for claim in claims():
        print(json.dumps(dataclasses.asdict(claim)))
