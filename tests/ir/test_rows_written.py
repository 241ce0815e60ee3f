"""What rows claim, and what work their samples are: what equal numbers cannot tell.

A claim that is left out keeps channels, or costs time, and no number is wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from narrows.ir.meta import Meta
from narrows.ir.ops import table
from narrows.ir.ops.row import Row
from narrows.ir.work import Work
from narrows.ir.workload import work_of
from tests.backends.test_c_ops import program

SAID_ELSEWHERE = {"target", "summary", "samples", "costs"}
BLANK = Work("")


def claims(of: Any) -> str:
    """Return the class of a row or an integer form, and what it has that is no default."""
    found = []
    for field in dataclasses.fields(of):
        value, default = getattr(of, field.name), field.default
        if field.name in SAID_ELSEWHERE or value == default:
            continue
        if dataclasses.is_dataclass(value):
            value = claims(value)
        found.append(f"{field.name}={getattr(value, '__name__', value)}")
    return f"{type(of).__name__}({', '.join(found)})"


def works(row: Row) -> Iterator[str]:
    for sample in row.samples:
        made = program(row, sample)
        node = next(n for n in made.nodes if n.target is row.target)
        work = work_of(node)
        if work is None:
            yield f"no work, {Meta(node).shape}"
            continue
        told = (f"{f.name} {getattr(work, f.name)}" for f in dataclasses.fields(Work)
                if getattr(work, f.name) != getattr(BLANK, f.name))  # fmt: skip
        yield ", ".join(told)


def test_rows_say_what_they_said(golden: Callable[[str, str], None]) -> None:
    lines = []
    for row in sorted(table.rows(), key=lambda row: row.name):
        lines.append(f"{row.name}: {claims(row)}")
        lines += [f"  {line}" for line in dict.fromkeys(works(row))]
    golden("rows", "\n".join(lines) + "\n")
