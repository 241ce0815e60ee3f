"""The structural difference of two programs: which nodes came, went and changed.

Nodes are matched in three rounds, each over what the last one left: by name and operator, by
provenance (the same operator made by the same module at the same source line, in order), then by
wiring (the same operator reading nodes that match).
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

from narrows.ir.snapshot import NodeRecord, Snapshot, WeightRecord
from narrows.ir.text import arguments, columns, shape_text, short_op


@dataclass(frozen=True)
class Change:
    """One node or weight that both programs have, with what differs.

    Attributes:
        name: Its name in the new program.
        old_name: Its name in the old program.
        fields: Per differing field the old and the new text.
    """

    name: str
    old_name: str
    fields: dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Diff:
    """What differs between two programs.

    Attributes:
        old: The old program's name and last pass.
        new: The new one's.
        removed: Lines of the nodes that only the old program has.
        added: Lines of the nodes that only the new one has.
        changed: The nodes that differ.
        removed_weights: Names that only the old program has.
        added_weights: Names that only the new one has.
        changed_weights: The weights that differ.
    """

    old: str
    new: str
    removed: tuple[NodeRecord, ...] = ()
    added: tuple[NodeRecord, ...] = ()
    changed: tuple[Change, ...] = ()
    removed_weights: tuple[str, ...] = ()
    added_weights: tuple[str, ...] = ()
    changed_weights: tuple[Change, ...] = ()
    matched: dict[str, str] = field(default_factory=dict, compare=False)

    def __bool__(self) -> bool:
        """Whether anything differs."""
        nodes = self.removed or self.added or self.changed
        return bool(nodes or self.removed_weights or self.added_weights or self.changed_weights)

    def to_json(self) -> dict[str, Any]:
        """Return the difference as JSON values."""
        data = dataclasses.asdict(self)
        del data["matched"]
        return data | {"equal": not self}

    def to_text(self) -> str:
        """Return the difference as text: ``-`` gone, ``+`` new, ``~`` changed."""
        lines = [f"--- {self.old}", f"+++ {self.new}"]
        if not self:
            return "\n".join([*lines, "no difference"]) + "\n"
        lines += columns([_node_row("-", n) for n in self.removed], (36, 20, 24, 24))
        lines += columns([_node_row("+", n) for n in self.added], (36, 20, 24, 24))
        lines += columns([_change_row(c) for c in self.changed], (36, 100))
        weights = [("- " + n,) for n in self.removed_weights]
        weights += [("+ " + n,) for n in self.added_weights]
        weights += [_change_row(c) for c in self.changed_weights]
        if weights:
            lines += ["weights", *columns(weights, (48, 100))]
        return "\n".join(lines) + "\n"


def diff(old: Snapshot, new: Snapshot) -> Diff:
    """Return what differs between two snapshots."""
    matched = _match(old, new)
    pairs = {n: o for o, n in matched.items()}
    old_nodes, new_nodes = _by_name(old.nodes), _by_name(new.nodes)
    changed = []
    for name, old_name in pairs.items():
        a, b = old_nodes[old_name], new_nodes[name]
        fields = _differences(old, a, new, b, matched)
        if fields:
            changed.append(Change(name, old_name, fields))
    weights = [
        Change(n, n, fields)
        for n in new.weights
        if n in old.weights and (fields := _weight_differences(old.weights[n], new.weights[n]))
    ]
    return Diff(
        _title(old),
        _title(new),
        removed=tuple(n for n in old.nodes if n.name not in matched),
        added=tuple(n for n in new.nodes if n.name not in pairs),
        changed=tuple(changed),
        removed_weights=tuple(n for n in old.weights if n not in new.weights),
        added_weights=tuple(n for n in new.weights if n not in old.weights),
        changed_weights=tuple(weights),
        matched=matched,
    )


# ------------------------------------------------------------------ matching


def _match(old: Snapshot, new: Snapshot) -> dict[str, str]:
    """Return old node name -> new node name."""
    matched: dict[str, str] = {}

    def pair(old_key: Callable[[NodeRecord], Hashable], new_key: Any = None) -> None:
        taken = set(matched.values())
        left = _group((n for n in old.nodes if n.name not in matched), old_key)
        right = _group((n for n in new.nodes if n.name not in taken), new_key or old_key)
        for key, nodes in left.items():
            if key is not None:
                for a, b in zip(nodes, right.get(key, ()), strict=False):
                    matched[a.name] = b.name

    pair(lambda n: (n.name, n.op))
    pair(lambda n: (n.op, n.module, n.source) if n.module or n.source else None)
    # Matching two nodes can make their readers match, so wiring is followed until it stops.
    before = -1
    while len(matched) != before:
        before = len(matched)
        pair(
            lambda n: (
                (n.op, tuple(matched.get(i, "?" + i) for i in n.inputs)) if n.inputs else None
            ),
            lambda n: (n.op, n.inputs) if n.inputs else None,
        )
    return {n.name: matched[n.name] for n in old.nodes if n.name in matched}


def _group(
    nodes: Iterable[NodeRecord], key: Callable[[NodeRecord], Hashable]
) -> dict[Hashable, list[NodeRecord]]:
    found: dict[Hashable, list[NodeRecord]] = defaultdict(list)
    for node in nodes:
        found[key(node)].append(node)
    return found


def _by_name(nodes: Iterable[NodeRecord]) -> dict[str, NodeRecord]:
    return {n.name: n for n in nodes}


# ------------------------------------------------------------------ comparing


def _differences(
    old: Snapshot, a: NodeRecord, new: Snapshot, b: NodeRecord, matched: dict[str, str]
) -> dict[str, tuple[str, str]]:
    fields = {}
    if a.name != b.name:
        fields["name"] = (a.name, b.name)
    if a.op != b.op:
        fields["op"] = (a.op, b.op)
    # What a node reads is compared through the matching: a renamed producer is no change of wiring.
    reads = tuple(matched.get(i, i) for i in a.inputs), b.inputs
    args = _literals(old, a), _literals(new, b)
    if reads[0] != reads[1]:
        fields["reads"] = (" ".join(a.inputs), " ".join(b.inputs))
    if args[0] != args[1]:
        fields["args"] = args
    shapes = (
        a.dtype + shape_text(a.shape, a.dynamic),
        b.dtype + shape_text(b.shape, b.dynamic),
    )
    if shapes[0] != shapes[1]:
        fields["shape"] = shapes
    return fields


def _literals(view: Snapshot, node: NodeRecord) -> str:
    """Return a node's arguments without the nodes it reads: weights with shapes, and literals."""
    text = arguments(view, node, lambda w: w.name + shape_text(w.shape))
    return " ".join(t for t in text.split() if t not in node.inputs)


def _weight_differences(a: WeightRecord, b: WeightRecord) -> dict[str, tuple[str, str]]:
    fields = {}
    shapes = a.dtype + shape_text(a.shape), b.dtype + shape_text(b.shape)
    if shapes[0] != shapes[1]:
        fields["shape"] = shapes
    elif a.hash and b.hash and a.hash != b.hash:
        fields["values"] = (a.hash, b.hash)
    return fields


def _title(view: Snapshot) -> str:
    return f"{view.name}  {'after ' + view.history[-1] if view.history else 'as captured'}"


def _node_row(sign: str, node: NodeRecord) -> tuple[str, ...]:
    shape = node.dtype + shape_text(node.shape, node.dynamic)
    return f"{sign} {node.name}", short_op(node.op), shape, node.source


def _change_row(change: Change) -> tuple[str, ...]:
    fields = (f"{k} {a or '-'} -> {b or '-'}" for k, (a, b) in change.fields.items())
    return f"~ {change.name}", "; ".join(fields)
