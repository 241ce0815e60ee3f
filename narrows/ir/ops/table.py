"""The op table: one row per ATen overload.

An operator without a row is a barrier: nothing is removed through it and the report says so.
`narrows.ir.ops.rows` lists the rows that come along; others are added with `register`.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

from torch import fx

from narrows.errors import OpError
from narrows.ir.meta import Meta, op_name, where
from narrows.ir.ops.args import arguments, computes_numbers
from narrows.ir.ops.barrier import BARRIER as BARRIER
from narrows.ir.ops.contract import Contract
from narrows.ir.ops.contraction import Contraction
from narrows.ir.ops.integer import IntegerForm, Moves
from narrows.ir.ops.integer_forms import FAKES, form_of
from narrows.ir.ops.row import Row
from narrows.ir.ops.rows import standard_rows
from narrows.ir.ops.samples import samples_of
from narrows.ir.ops.selection import Item
from narrows.ir.ops.several import RESULT, Ranked
from narrows.ir.program import Program

ITEM = Item(target=operator.getitem, summary="one result of a split", integer=Moves())

# By the overload's identity: torch hashes it by its name, in Python.
_ROWS: dict[int, Row] = {}


def register(row: Row) -> Row:
    """Add a row; `OpError` naming both if the overload has one already.

    A row without samples is given those that `narrows.ir.ops.samples` has for it, one without an
    integer form that of `narrows.ir.ops.integer_forms`.
    """
    if id(row.target) in _ROWS:
        raise OpError(
            f"{row.name} has a row already: {_ROWS[id(row.target)].kind}, the new one is {row.kind}",
            hint="remove one of the two registrations",
        )
    if not row.samples:
        row = dataclasses.replace(row, samples=samples_of(row.name))
    if row.integer is None:
        row = dataclasses.replace(row, integer=form_of(row.name))
    _ROWS[id(row.target)] = row
    return row


def find(node: fx.Node) -> Row | None:
    """Return the row of a node's operator, or ``None``."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        parent = node.args[0]
        several = isinstance(parent, fx.Node) and isinstance(find(parent), Ranked)
        return RESULT if several else ITEM
    return _ROWS.get(id(node.target))


def identity_of(program: Program, node: fx.Node) -> fx.Node | None:
    """Return the operand whose values ``node`` passes on, or ``None``."""
    row = find(node)
    if row is None or row.identity is None:
        return None
    given = arguments(node)
    source = next(iter(given.values()))
    if not isinstance(source, fx.Node) or not _same_kind(node, source):
        return None
    return source if row.identity(program, node, given) else None


def _same_kind(node: fx.Node, source: fx.Node) -> bool:
    """Whether both are one tensor of the same shape and dtype, at every size of the free axes."""
    a, b = Meta(node), Meta(source)
    if a.shape is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    # With one free axis at most, equal element counts and equal other axes make it equal as well.
    return tuple(a.dynamic) == tuple(b.dynamic) and len(a.dynamic) <= 1


def is_affine(node: fx.Node) -> bool:
    """Whether a node is a scale and a shift per channel by weights, where it is not in training."""
    row = find(node)
    return row is not None and row.affine


def keeps_all(node: fx.Node) -> bool:
    """Whether a node only moves the elements of its operand, all of them."""
    row = find(node)
    return row is not None and row.keeps_all


def concatenates(node: fx.Node) -> bool:
    """Whether a node puts tensors side by side."""
    row = find(node)
    return row is not None and row.concatenates


def contracts(node: fx.Node) -> bool:
    """Whether a node sums products over an axis."""
    row = find(node)
    return row is not None and row.contracts


def layer_of(node: fx.Node) -> Contract | None:
    """Return the row of a convolution or a linear layer, whose operands have fixed arguments."""
    row = find(node)
    return row if type(row) is Contract else None


def rows() -> list[Row]:
    """Return all rows, by name."""
    return sorted(_ROWS.values(), key=lambda r: r.name)


def missing(program: Program) -> dict[str, list[str]]:
    """Return every operator of ``program`` that lacks a row, with the places it is used at.

    What is computed from weights alone has no channels of its own and needs no row.
    """
    found: dict[str, list[str]] = {}
    computed: set[fx.Node] = set()
    for node in program.graph.nodes:
        if Meta(node).size is not None:
            continue
        if node.op == "placeholder" or any(n in computed for n in node.all_input_nodes):
            computed.add(node)
            if node.op == "call_function" and find(node) is None:
                found.setdefault(op_name(node), []).append(where(node))
    return found


def to_markdown() -> str:
    """Return the table as the page ``docs/ops.md``: per kind what the operators do, then them."""
    lines = [
        "# The op table",
        "",
        "What channels can be followed through. An operator that is not listed keeps all channels",
        "before it; the report says so. [Adding an op](adding-an-op.md) says how to add a row.",
        "This page is made by `narrows ops --markdown`.",
    ]
    grouped: dict[str, dict[str, list[str]]] = {}
    for row in rows():
        name = row.name.removesuffix(".default")
        grouped.setdefault(row.kind, {}).setdefault(row.summary, []).append(f"`{name}`")
    for kind, summaries in sorted(grouped.items()):
        lines += ["", f"## {kind}", "", "| what it does | operators |", "|---|---|"]
        lines += [f"| {what} | {' '.join(names)} |" for what, names in sorted(summaries.items())]
    return "\n".join(lines) + "\n"


def integer_form(node: fx.Node) -> IntegerForm | None:
    """Return the integer form of a node for its arguments, or ``None``."""
    row = find(node)
    form = FAKES.get(node.target) if row is None else row.integer
    if form is None or (form.kind != "moves" and computes_numbers(node)):
        return None
    return form.at(node)


def contraction(facts: Any, node: fx.Node) -> Contraction | None:
    """Return a node's contraction with a weight, if it is one."""
    row = find(node)
    if not isinstance(row, Contract):
        return None
    flow = facts.flows.get(node)
    if flow is not None and isinstance(flow.facts, tuple):  # the analysis has been here
        return flow.facts[0]
    return row.contraction(facts, node)


for _row in standard_rows():
    register(_row)
