"""The half of the rewriter that makes nodes and weights of the new program."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from narrows.ir.channels import Facts
from narrows.ir.graph import add_node
from narrows.ir.held import Held, RaggedError
from narrows.ir.labels import Bools, Ints, distinct, is_count, runs
from narrows.ir.meta import Meta, copy_meta, shape_of
from narrows.ir.ops import dialect, table
from narrows.ir.ops.args import arguments, call, changed
from narrows.ir.ops.constants import as_array
from narrows.ir.ops.contraction import Contraction
from narrows.ir.ops.layout import Layout
from narrows.ir.program import Note, Origin, Program


class Line:
    """Positions along one axis of a tensor, and what every weight that follows them asks of them.

    Attributes:
        positions: The positions.
        key: They as bytes.
    """

    def __init__(self, positions: Ints) -> None:
        self.positions = np.ascontiguousarray(positions)
        self.key = self.positions.tobytes()

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The positions as Python's numbers."""
        return tuple(self.positions.tolist())

    @cached_property
    def tensor(self) -> Tensor:
        """The positions for torch; they may be a view of what nobody may write to."""
        return torch.from_numpy(self.positions.copy())

    @cached_property
    def _counts(self) -> bool:
        return is_count(self.positions)

    def whole(self, size: int) -> bool:
        """Whether they are all of an axis, in order."""
        return len(self.positions) == size and self._counts


class Scratch:
    """Cuts tensors; what is only on the way to a result lies in memory that is used again."""

    def __init__(self) -> None:
        self._room = torch.empty(0)

    def cut(self, data: Tensor, lines: dict[int, Line]) -> Tensor:
        """Return a tensor restricted along some axes."""
        # The shorter axis first: what follows has less to copy.
        steps = sorted(lines.items(), key=lambda i: len(i[1].positions) / data.shape[i[0]])
        for count, (axis, line) in enumerate(steps, start=1):
            if count == len(steps):
                return data.index_select(axis, line.tensor)
            size = len(line.positions)
            shape = [size if a == axis else s for a, s in enumerate(data.shape)]
            if count > 1 or self._room.dtype != data.dtype or self._room.numel() < math.prod(shape):
                self._room = data.new_empty(math.prod(shape))
            room = self._room[: math.prod(shape)].view(shape)
            data = torch.index_select(data.detach(), axis, line.tensor, out=room)
        return data


# Makes a tensor when the program is finished. It must not hold on to the rewriter: what it knows
# of a program would then be garbage that only the cyclic collector finds.
Build = Callable[[Scratch], Tensor]


class Emitter:
    """Makes nodes and weights; tensors are sliced only when the program is finished.

    Attributes:
        facts: The forward analysis of the old program.
        graph: The new graph.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts, self.program = facts, facts.program
        self.graph = fx.Graph()
        self._plain: dict[fx.Node, fx.Node] = {}
        self._weights: dict[str, tuple[Build, Origin | None, bool]] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        self._attrs: dict[str, fx.Node] = {}
        self._lines: dict[bytes, Line] = {}
        self._line_of: dict[int, tuple[Ints, Line]] = {}
        self._counts: dict[str, int] = {}
        self._gathered: dict[tuple[fx.Node, int, bytes], fx.Node] = {}
        self._turned: dict[fx.Node, tuple[fx.Node, int, Ints]] = {}
        # Constants of an earlier pass may be named anew; parameters and their aliases keep their
        # names.
        self._reserved = (set(self.program.weights) - self.program.buffers) | set(
            self.program.aliases
        )

    def _shape_source(self, node: fx.Node) -> fx.Node:
        return self.plain(node)

    def _create(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        new = add_node(self.graph, node.op, node.target, args, kwargs, node.name)
        new.meta = dict(node.meta)
        return new

    def _tagged(self, node: fx.Node, new: fx.Node, places: Tensor, shape: tuple[int, ...]) -> Held:
        copy_meta(node, new)
        meta = Meta(new)
        meta.shape, meta.dtype = shape, Meta(node).dtype
        return Held(new, places, shape)

    # ------------------------------------------------------------------ copies

    def gather(self, held: Held, axis: int, index: Ints) -> Held:
        """Emit the channels at ``index`` of ``axis``: nothing, a slice, or an index_select."""
        if len(index) == held.shape[axis] and is_count(index):
            return held
        shape = tuple(len(index) if a == axis else s for a, s in enumerate(held.shape))
        places = held.places
        if places.shape[axis] > 1:
            places = places.index_select(axis, torch.from_numpy(index))
        key = (held.node, axis, index.tobytes())
        if key not in self._gathered:
            self._gathered[key] = self._taken(held, axis, index, shape)
            self.turns(self._gathered[key], held, axis, index)
        return Held(self._gathered[key], places, shape)

    def turns(self, new: fx.Node, held: Held, axis: int, index: Ints) -> None:
        """Say that a node has the channels of another at ``index``: maybe all, in another order."""
        if len(index) == held.shape[axis] and not is_count(index) and is_count(np.sort(index)):
            self._turned[new] = held.node, axis, np.argsort(index)

    def unturned(self, held: Held, axis: int) -> Held:
        """Return what a tensor was before all its channels were put in another order.

        For who can read them in any order: the copy goes unless somebody else reads it.
        """
        while held.node in self._turned and held.places.shape[axis] > 1:
            source, along, back = self._turned[held.node]
            if along != axis:
                break
            places = held.places.index_select(axis, torch.from_numpy(back))
            held = Held(source, places, held.shape)
        return held

    def _taken(self, held: Held, axis: int, index: Ints, shape: tuple[int, ...]) -> fx.Node:
        name = f"{held.node.name}_take"
        span = runs(index) if len(index) else None
        if span is not None:
            start, stop, step = span
            args: tuple[Any, ...] = (held.node, axis, start, stop, step)[: 5 if step > 1 else 4]
            new = add_node(self.graph, "call_function", dialect.SLICE, args, name=name)
        else:
            place = self.constant(f"{name}_index", torch.from_numpy(index.copy()))
            args = (held.node, axis, place)
            new = add_node(self.graph, "call_function", dialect.PICK, args, name=name)
        new.meta = dict(held.node.meta)
        Meta(new).shape = shape
        return new

    # ------------------------------------------------------------------ weights

    def free_data(self, node: fx.Node) -> dict[fx.Node, Tensor]:
        """Return the tensors of the operands made of weights alone."""
        return {n: self.facts.data(n) for n in node.all_input_nodes if self.facts.is_free(n)}

    def plain(self, node: fx.Node) -> fx.Node:
        """Return the copy of a node that depends on no channel: a weight, a number."""
        if node in self._plain:
            return self._plain[node]
        if node.op == "get_attr":
            return self.weight(node, {})
        args, kwargs = map_arg((node.args, node.kwargs), self._shape_source)
        new = self._plain[node] = self._create(node, args, kwargs)
        return new

    def _copied(self, node: fx.Node) -> fx.Node:
        return node if node.graph is self.graph else self.plain(node)

    def weight(self, node: fx.Node, index: dict[int, Ints]) -> fx.Node:
        """Return a weight, or a value made of weights, restricted to ``index`` per axis."""
        if node.op != "get_attr":
            return self.free(node, index)
        data, name = self.program.tensor(node), str(node.target)
        lines = self._cut(index, data.shape)
        if not lines:
            return self._stored(node, (name,), lambda _: data, None)
        key = (name, *((a, line.key) for a, line in sorted(lines.items())))
        kept = tuple(lines[a].numbers if a in lines else None for a in range(data.dim()))
        origin = Origin(name, tuple(data.shape), kept)
        return self._stored(node, key, lambda scratch: scratch.cut(data, lines), origin)

    def _line(self, positions: Ints) -> Line:
        """Return what is known of positions; nobody may change them afterwards."""
        known = self._line_of.get(id(positions))
        if known is None:
            line = Line(positions)
            line = self._lines.setdefault(line.key, line)
            known = self._line_of[id(positions)] = (positions, line)
        return known[1]

    def _cut(self, index: dict[int, Ints], shape: Sequence[int]) -> dict[int, Line]:
        """Return the lines of the axes along which something goes or moves."""
        lines = {axis: self._line(positions) for axis, positions in index.items()}
        return {axis: line for axis, line in lines.items() if not line.whole(shape[axis])}

    def free(self, node: fx.Node, index: dict[int, Ints]) -> fx.Node:
        """Return a value made of weights restricted to ``index``: the weight itself where
        possible."""
        if node.op == "get_attr":
            return self.weight(node, index)
        lines = self._cut(index, shape_of(node))
        if not lines:
            return self.plain(node)
        index = {axis: line.positions for axis, line in lines.items()}
        pushed = self._pushed(node, index)
        if pushed is not None:
            return pushed
        new = self.plain(node)
        for axis, positions in sorted(index.items()):
            place = self.constant(f"{node.name}_index", torch.from_numpy(positions.copy()))
            chosen = self.graph.create_node(
                "call_function",
                dialect.PICK,
                (new, axis, place),
                {},
                name=f"{node.name}_take",
            )
            chosen.meta = dict(new.meta)
            Meta(chosen).shape = tuple(
                len(positions) if a == axis else s for a, s in enumerate(shape_of(new))
            )
            new = chosen
        return new

    def _pushed(self, node: fx.Node, index: dict[int, Ints]) -> fx.Node | None:
        """Slice the weight behind a chain of axis moves instead of what comes out of it."""
        chain, root = [], node
        while root.op != "get_attr":
            row = table.find(root)
            keeps = isinstance(row, Layout) and row.keeps_axes
            if not keeps or len(self.free_data(root)) != 1:
                return None
            chain.append(root)
            root = next(n for n in root.all_input_nodes if self.facts.is_free(n))
        data = self.program.tensor(root)
        inner: dict[int, Ints] = {}
        for axis in range(data.dim()):
            view = [-1 if a == axis else 1 for a in range(data.dim())]
            ruler: Any = torch.arange(data.shape[axis]).view(view).expand(data.shape)
            for step in reversed(chain):
                ruler = call(
                    step, {next(n for n in step.all_input_nodes if self.facts.is_free(n)): ruler}
                )
            for own, positions in index.items():
                line = ruler.movedim(own, 0).reshape(ruler.shape[own], -1)
                if (
                    bool((line == torch.arange(line.shape[0])[:, None]).all())
                    and line.shape[0] == data.shape[axis]
                ):
                    inner[axis] = positions
        if len(inner) != len(index):
            return None
        new = self.weight(root, inner)
        for step in reversed(chain):
            changes: dict[str, Any] = {next(iter(arguments(step))): new}
            sizes = arguments(step).get("size")
            if sizes is not None:
                lead = len(shape_of(step)) - len(sizes)
                old = shape_of(next(n for n in step.all_input_nodes if self.facts.is_free(n)))
                shift = len(shape_of(step)) - len(old)
                changes["size"] = [
                    -1 if i + lead >= shift and old[i + lead - shift] == s else s
                    for i, s in enumerate(sizes)
                ]
            args, kwargs = changed(step, changes)
            args, kwargs = map_arg((args, kwargs), self._copied)
            made = self._create(step, args, kwargs)
            new = made
        Meta(new).shape = tuple(
            len(index[a]) if a in index else s for a, s in enumerate(shape_of(node))
        )
        return new

    def constant(self, name: str, data: Tensor) -> fx.Node:
        """Return a new constant tensor of the graph."""
        key = ("constant", name, as_array(data).tobytes(), data.dtype, tuple(data.shape))
        if key not in self._names:
            self._names[key] = self._free_name(name)
            self._weights[self._names[key]] = (lambda _: data, None, True)
        return self._attribute(self._names[key], tuple(data.shape), data.dtype)

    def contracted_weight(self, c: Contraction, rows: Ints, taken: Ints, fold: Bools) -> fx.Node:
        """Return a contraction's weight for the outputs ``rows`` and the inputs ``taken``, in
        order.

        Inputs in ``fold`` are constants counted in the bias; where they are present all the same,
        their weights are zero.
        """
        _, outs, ins, _ = c.blocks.shape
        zero = np.flatnonzero(fold[taken])
        split, held = (taken, rows) if c.transposed else (rows, taken)
        first, second = (c.in_axis, c.out_axis) if c.transposed else (c.out_axis, c.in_axis)
        groups = 1
        if c.groups > 1:
            held, groups = held % (outs if c.transposed else ins), distinct(rows // outs)
        local = held.reshape(groups, -1)
        alike = groups == 1 or (local == local[:1]).all()
        per_row = None if alike else np.repeat(local, len(split) // groups, axis=0)
        index = {first: split, second: local[0]}
        if per_row is None and not len(zero):
            return self.weight(c.weight, index)
        if c.weight.op != "get_attr":
            raise RaggedError(c.x, None)
        data, name = c.data, str(c.weight.target)
        key = (name, split.tobytes(), held.tobytes(), zero.tobytes())
        rank = data.dim()
        kept: list[Any] = [None] * rank
        lines = {axis: self._line(positions) for axis, positions in index.items()}
        kept[first] = lines[first].numbers
        kept[second] = (
            lines[second].numbers if per_row is None else tuple(map(tuple, per_row.tolist()))
        )
        origin = Origin(name, tuple(data.shape), tuple(kept))

        def build(scratch: Scratch) -> Tensor:
            if per_row is None:
                new = scratch.cut(data, lines)
            else:
                new = data.index_select(first, torch.from_numpy(split))
                new = _gather_rows(new, first, second, torch.from_numpy(per_row))
            if len(zero):
                new = _zeroed(new, c, zero, groups)
            return new

        return self._stored(c.weight, key, build, origin)

    def masked_weight(self, node: fx.Node) -> dict[str, fx.Node]:
        """Return the weight of a layer written as it was, by its argument, if its input mask came
        beside the program: the ignored inputs are zero in it."""
        ignored = self.facts.ignored.get(node.name)
        if ignored is None:
            return {}
        c = table.contraction(self.facts, node)
        assert c is not None, f"{node} has a mask and no weight of its own"
        rows, taken = np.arange(c.outputs), np.arange(c.inputs)
        return {c.names[1]: self.contracted_weight(c, rows, taken, ignored.reshape(-1))}

    def contracted_bias(
        self, node: fx.Node, c: Contraction, rows: Ints, amount: np.ndarray | None
    ) -> fx.Node | None:
        """Return a contraction's bias for the outputs ``rows``, with the folded constants added."""
        if amount is None or not amount[rows].any():
            return None if c.bias is None else self.free(c.bias, {0: rows})
        base = torch.zeros(c.outputs, dtype=c.data.dtype) if c.bias_data is None else c.bias_data
        data = (base.double() + torch.from_numpy(amount)).to(base.dtype)[torch.from_numpy(rows)]
        if c.bias is not None and c.bias.op == "get_attr":
            name = str(c.bias.target)
            origin = Origin(name, tuple(base.shape), (self._line(rows).numbers,))
            return self._stored(
                c.bias, (name, self._line(rows).key, amount.tobytes()), lambda _: data, origin
            )
        stem = str(c.weight.target).rpartition(".")[0] if c.weight.op == "get_attr" else node.name
        name = self._free_name(f"{stem}.bias" if stem else f"{node.name}_bias")
        self._weights[name] = (lambda _: data, None, False)
        return self._attribute(name, tuple(data.shape), data.dtype)

    def _stored(
        self,
        node: fx.Node,
        key: tuple[Any, ...],
        build: Build,
        origin: Origin | None,
    ) -> fx.Node:
        name = str(node.target)
        if key not in self._names:
            self._names[key] = name if name not in self._weights else self._free_name(name)
            self._weights[self._names[key]] = (build, origin, name in self.program.buffers)
        made = self._attrs.get(self._names[key])
        if made is not None:
            return made
        shape = shape_of(node)
        if origin is not None:
            shape = tuple(
                s if i is None else len(i[0]) if isinstance(i[0], tuple) else len(i)
                for s, i in zip(shape, origin.index, strict=True)
            )
        return self._attribute(self._names[key], shape, Meta(node).dtype)

    def _attribute(self, name: str, shape: tuple[int, ...], dtype: Any) -> fx.Node:
        if name not in self._attrs:
            new = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
            Meta(new).shape, Meta(new).dtype = shape, dtype
            self._attrs[name] = new
        return self._attrs[name]

    def _free_name(self, name: str) -> str:
        candidate, count = name, self._counts.get(name, 0)
        while candidate in self._weights or candidate in self._reserved:
            count += 1
            candidate = f"{name}_{count}"
        self._counts[name] = count  # those below it are taken for good
        return candidate

    def finish(self, notes: tuple[Note, ...]) -> Program:
        """Return the new program; only now are tensors sliced."""
        old = self.program
        for copied in reversed(self._turned):
            if not copied.users:  # its readers took what it was made from
                self.graph.erase_node(copied)
        used = {str(n.target) for n in self.graph.nodes if n.op == "get_attr" and n.users}
        for node in list(self.graph.nodes):
            if node.op == "get_attr" and not node.users:
                self.graph.erase_node(node)
        weights, origins, buffers, scratch = {}, {}, set(), Scratch()
        for name, (build, origin, buffer) in self._weights.items():
            if name not in used:
                continue
            weights[name] = build(scratch)
            if buffer:
                buffers.add(name)
            if origin is not None:
                origins[name] = _composed(origin, old.origins)
            elif name in old.origins:
                origins[name] = old.origins[name]
        ordered = {n: weights.pop(n) for n in old.weights if n in weights}
        ordered.update(weights)
        aliases = {a: n for a, n in old.aliases.items() if n in ordered}
        self.graph.lint()
        return old.replace(
            graph=self.graph, weights=ordered, aliases=aliases, buffers=frozenset(buffers),
            origins=origins, notes=(*old.notes, *notes),
        )  # fmt: skip


def _gather_rows(data: Tensor, first: int, second: int, local: Tensor) -> Tensor:
    moved = data.movedim((first, second), (0, 1))
    rows = torch.arange(moved.shape[0])[:, None]
    return moved[rows, local].movedim((0, 1), (first, second)).contiguous()


def _zeroed(data: Tensor, c: Contraction, zero: Ints, groups: int) -> Tensor:
    """Zero the weights of the inputs at the positions ``zero`` of the new input order."""
    new = data.clone()
    if c.transposed or groups == 1:
        return new.index_fill_(c.in_axis, torch.from_numpy(zero), 0.0)
    moved = new.movedim((c.out_axis, c.in_axis), (0, 1))
    rows, width = moved.shape[0] // groups, moved.shape[1]
    for group, column in zip(zero // width, zero % width, strict=True):
        moved[group * rows : (group + 1) * rows, column] = 0
    return new


def _composed(origin: Origin, before: Any) -> Origin:
    """Return where a weight came from in the first program, through one more slicing."""
    earlier = before.get(origin.name)
    if earlier is None:
        return origin
    index: list[Any] = []
    for axis, (old, new) in enumerate(zip(earlier.index, origin.index, strict=True)):
        if old and isinstance(old[0], tuple):  # an entry per row: those of the rows that are left
            rows = [origin.index[a] for a, i in enumerate(earlier.index) if i and a != axis]
            old = old if rows[0] is None else tuple(old[i] for i in rows[0])
        index.append(_picked(old, new))
    return Origin(earlier.name, earlier.shape, tuple(index))


def _picked(old: Any, new: Any) -> Any:
    """Return one axis of an `Origin` through one more slicing, row by row where it has rows."""
    if old is None or new is None:
        return old if new is None else new
    if old and isinstance(old[0], tuple):
        picks = new if new and isinstance(new[0], tuple) else [new] * len(old)
        return tuple(tuple(row[i] for i in pick) for row, pick in zip(old, picks, strict=True))
    if new and isinstance(new[0], tuple):
        return tuple(tuple(old[i] for i in pick) for pick in new)
    return tuple(old[i] for i in new)
