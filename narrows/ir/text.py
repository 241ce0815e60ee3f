"""The text form of a program: one node a line, and the widths where the eye looks.

::

    program resnet20  after prune-channels{plan=p.json}
    # 50 nodes, 141,932 parameters
      x               input                                           f32[b,3,32,32]
    ~ layer1_0_conv1  conv2d  conv1_relu w[16->11,16,3,3] padding=[1,1]  f32[b,16->11,32,32]
    net.py:48

A mark ``~`` says that the last pass touched the node; ``16->11`` that an axis shrank: an output's
in the last pass, a weight's since the capture. ``b`` is the free batch axis. Weights are shown at
the nodes that read them, ``w`` and ``bias`` of the node's own module by their short names.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from narrows.files.quoting import plain
from narrows.ir.snapshot import NodeRecord, Snapshot, WeightRecord, snapshot

if TYPE_CHECKING:
    from narrows.ir.program import Program

# A column is as wide as its widest cell, up to this; a longer cell pushes its own line only.
WIDEST = (36, 22, 84, 28, 24)


def to_text(program: Program, *, weights: bool = False) -> str:
    """Return the text form of a program.

    Args:
        program: The program.
        weights: Whether to append a table of the weights with hash and range, which reads them all.
    """
    return render(snapshot(program, contents=weights), weights=weights)


def render(view: Snapshot, *, weights: bool = False, only: str = "*") -> str:
    """Return the text form of a snapshot.

    Args:
        view: The snapshot.
        weights: Whether to append the table of the weights.
        only: A glob on node names and module paths; other nodes are left out.
    """
    shown = [n for n in view.nodes if matches(n, only)]
    lines = [*_header(view), *columns([_row(view, n) for n in shown], WIDEST)]
    notes = [n for n in view.notes if only == "*" or any(n.where == s.name for s in shown)]
    if notes:
        cells = [("  " + n.where, n.reason, n.message, bracket(n.source)) for n in notes]
        lines += ["", "notes", *columns(cells, (38, 16, 100, 24))]
    if weights:
        names = {w for n in shown for w in n.weights}
        kept = [w for w in view.weights.values() if only == "*" or w.name in names]
        lines += ["", "weights", *columns([_weight_row(w) for w in kept], (48, 28, 8, 12, 12))]
    return "\n".join(lines) + "\n"


def matches(node: NodeRecord, glob: str) -> bool:
    """Return whether a glob fits a node's name or its module path."""
    return fnmatch.fnmatchcase(node.name, glob) or fnmatch.fnmatchcase(node.module, glob)


def columns(rows: Sequence[Sequence[str]], widest: Sequence[int]) -> list[str]:
    """Return rows as aligned lines; a column is never wider than ``widest`` says."""
    rows = [[plain(cell, None) for cell in row] for row in rows]
    widths = [
        min(limit, max((len(r[i]) for r in rows if i < len(r)), default=0))
        for i, limit in enumerate(widest)
    ]
    lines = []
    for row in rows:
        cells = [c.ljust(w) for c, w in zip(row, widths, strict=False)] + list(row[len(widths) :])
        lines.append("  ".join(c for c, w in zip(cells, [*widths, 1], strict=False) if w).rstrip())
    return lines


def shape_text(
    shape: Sequence[int] | None, dynamic: Sequence[int] = (), was: Sequence[int] | None = None
) -> str:
    """Return ``[b,16->11,32]``; another rank prints as ``[16,2]->[b,32]``."""
    if shape is None:
        return ""
    if was is not None and len(was) != len(shape):
        return f"{shape_text(was)}->{shape_text(shape, dynamic)}"
    sizes = [
        "b" if a in dynamic else str(s) if was is None or was[a] == s else f"{was[a]}->{s}"
        for a, s in enumerate(shape)
    ]
    return f"[{','.join(sizes)}]"


def short_op(op: str) -> str:
    """Return an operator's name without an overload that says nothing: ``conv2d``, ``mean.dim``."""
    return op.removesuffix(".default").removesuffix(".Tensor")


def arguments(view: Snapshot, node: NodeRecord, weight: Callable[[WeightRecord], str]) -> str:
    """Return the arguments of a node, its weights written by ``weight``."""
    text = node.args
    for i, name in enumerate(node.weights):
        record = view.weights.get(name)
        text = text.replace(f"{{{i}}}", weight(record) if record is not None else name)
    return text


def bracket(source: str) -> str:
    """Return ``(file:line)``, or nothing."""
    return f"({source})" if source else ""


def _header(view: Snapshot) -> list[str]:
    after = f"  after {view.history[-1]}" if view.history else "  as captured"
    lines = [f"program {plain(view.name)}{plain(after, None)}"]
    lines += [f"# {i}. {plain(spelling, None)}" for i, spelling in enumerate(view.history, 1)]
    count = len(view.nodes)
    return [*lines, f"# {count} nodes, {view.parameter_count:,} parameters"]


def _row(view: Snapshot, node: NodeRecord) -> tuple[str, ...]:
    def weight(record: WeightRecord) -> str:
        path, _, leaf = record.name.rpartition(".")
        short = {"weight": "w"}.get(leaf, leaf) if path == node.module else record.name
        return short + shape_text(record.shape, (), record.was)

    touched = "~ " if node.was is not None or node.remark else "  "
    result = node.dtype + shape_text(node.shape, node.dynamic, node.was)
    result += f" {node.grid}" if node.grid else ""
    call = arguments(view, node, weight)
    return touched + node.name, short_op(node.op), call, result, node.source, node.remark


def _weight_row(record: WeightRecord) -> tuple[str, ...]:
    range_ = ("", "") if record.low is None else (f"{record.low:.6g}", f"{record.high:.6g}")
    shape = record.dtype + shape_text(record.shape, (), record.was)
    return "  " + record.name, shape, record.hash, *range_, "" if record.trained else "buffer"
