"""In-place operators become their functional twins.

After a write, readers of the written tensor read the twin's result. A view of it that is read later
is taken anew, and what it is itself a view of gets the new value scattered into it, but only where
somebody reads that. Where a view is of a kind that has no scatter, torch functionalises the graph;
that is a second trace, which spells operators in another way and loses some sources.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import map_arg

from narrows.errors import CaptureError
from narrows.frontend.lifted import Lifted, mutation_error, note_input_mutation, val
from narrows.frontend.memory import UNDECLARED_VIEWS, views, written_args
from narrows.frontend.provenance import user_frame
from narrows.frontend.scatter import scatter

aten = torch.ops.aten


def functionalise(lifted: Lifted) -> bool:
    """Replace in-place operators by functional ones; ``False`` if that is left to torch.

    On ``False`` the graph is half done. Writes into an input are left out, with a note; a write
    into a weight is a `CaptureError`.
    """
    written = {n: w for n in lifted.graph.nodes if (w := written_args(n))}
    if not written:
        return True
    memory = _Memory.of(lifted, {n: w[0] for n, w in written.items()})
    for node, targets in written.items():
        for target in targets:
            _check_owner(lifted, node, memory.root[target])
    if all(len(w) == 1 and _has_twin(n) for n, w in written.items()) and _Renaming(memory).run():
        return True
    _check_torch_sees_all_views(lifted, memory)
    return False


def _check_owner(lifted: Lifted, node: fx.Node, owner: fx.Node) -> None:
    if owner.op == "get_attr":
        raise mutation_error(str(owner.target), lifted.where(node))
    if owner.op == "placeholder":
        source, _ = user_frame(node.meta.get("stack_trace") or "", lifted.generated)
        note_input_mutation(lifted, owner.name, source)


def _check_torch_sees_all_views(lifted: Lifted, memory: _Memory) -> None:
    """Refuse what torch would functionalise wrongly: it goes by the schemas alone."""
    owners = {memory.root[w] for w in memory.written.values()}
    for node in memory.source:
        packet = getattr(node.target, "overloadpacket", None)
        if packet in UNDECLARED_VIEWS and memory.root[node] in owners:
            raise CaptureError(
                f"the result of {node.target} shares memory that is written into",
                where=lifted.where(node),
                why="which of the two is meant to change cannot be told from the graph",
                hint="replace the in-place operator by an ordinary one",
            )


# ---------------------------------------------------------------------- who shares memory, and when


@dataclass(frozen=True)
class _Memory:
    """Who shares memory with whom, and when it is read.

    Attributes:
        graph: The graph.
        written: For every in-place operator the tensor it writes, as its oldest node: the
            result of ``x.add_(1)`` is the tensor ``x``.
        tensor: For every node the oldest node that is the same tensor.
        source: For every view what it is a view of.
        root: For every node the oldest node whose memory it shares.
        sharers: For every such oldest node all that share its memory.
        position: The place of every node in the graph.
        last_use: The place of its last reader.
    """

    graph: fx.Graph
    written: dict[fx.Node, fx.Node]
    tensor: dict[fx.Node, fx.Node]
    source: dict[fx.Node, fx.Node]
    root: dict[fx.Node, fx.Node]
    sharers: dict[fx.Node, list[fx.Node]]
    position: dict[fx.Node, int]
    last_use: dict[fx.Node, int]

    @classmethod
    def of(cls, lifted: Lifted, written: dict[fx.Node, fx.Node]) -> _Memory:
        source = views(lifted, written.values())
        root: dict[fx.Node, fx.Node] = {}
        tensor: dict[fx.Node, fx.Node] = {}
        sharers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        position: dict[fx.Node, int] = {}
        for i, node in enumerate(lifted.graph.nodes):
            position[node] = i
            root[node] = root[source[node]] if node in source else node
            tensor[node] = tensor[written[node]] if node in written else node
            sharers[root[node]].append(node)
        last_use = {n: max((position[u] for u in n.users), default=-1) for n in position}
        owners = {n: tensor[w] for n, w in written.items()}
        return cls(lifted.graph, owners, tensor, source, root, sharers, position, last_use)

    def is_read_elsewhere(self, node: fx.Node) -> bool:
        """Tell whether an older tensor that shares the memory ``node`` writes is read after it.

        Younger ones do no harm: they are views of the written tensor, hence of the twin's result.
        """
        here, target = self.position[node], self.written[node]
        return any(
            self.position[other] < here < self.last_use[other]
            for other in self.sharers[self.root[target]]
            if self.tensor[other] is not target
        )


# ---------------------------------------------------------------------- renaming


@dataclass
class _Renaming:
    """The walk through the graph that gives every reader the value of its moment.

    Attributes:
        memory: Who shares memory.
        writes: How often the memory of each root has been written so far.
        current: The node that holds a tensor's value, and after how many writes it does.
        original: The arguments of every view as they stood in the graph.
    """

    memory: _Memory
    writes: dict[fx.Node, int] = field(default_factory=lambda: defaultdict(int))
    current: dict[fx.Node, tuple[int, fx.Node]] = field(default_factory=dict)
    original: dict[fx.Node, tuple[Any, Any]] = field(default_factory=dict)

    def run(self) -> bool:
        """Rewrite the graph; ``False`` if a view has no scatter."""
        graph, written = self.memory.graph, self.memory.written
        for node in list(graph.nodes):
            with graph.inserting_before(node):
                args, kwargs = map_arg((node.args, node.kwargs), self.value)
                if node in written:
                    if not self.write(node, _twin(graph, node, args, kwargs)):
                        return False
                    continue
            if node in self.memory.source:
                self.original[node] = (node.args, node.kwargs)
            node.args, node.kwargs = args, kwargs
            self.set(node, node)
        for node in reversed(written):
            graph.erase_node(node)
        return True

    def set(self, node: fx.Node, value: fx.Node) -> None:
        """Let ``value`` hold the present value of ``node``."""
        self.current[node] = (self.writes[self.memory.root[node]], value)

    def value(self, node: fx.Node) -> fx.Node:
        """Return the node that holds the present value of ``node``; it may take a view anew."""
        node = self.memory.tensor[node]
        writes, value = self.current[node]
        if writes == self.writes[self.memory.root[node]] or node not in self.memory.source:
            return value
        args, kwargs = map_arg(self.original[node], self.value)
        fresh = self.memory.graph.create_node(node.op, node.target, args, kwargs)
        fresh.meta = dict(node.meta)
        self.set(node, fresh)
        return fresh

    def write(self, node: fx.Node, value: fx.Node) -> bool:
        """Let ``value`` be what the tensor that ``node`` writes holds from now on."""
        memory, target = self.memory, self.memory.written[node]
        changed = [(target, value)]
        while target in memory.source and memory.is_read_elsewhere(node):
            viewed = memory.source[target]
            if not isinstance(val(viewed), Tensor):  # the list that split returned
                viewed = memory.source[viewed]
            before = self.value(viewed)
            scattered = scatter(partial(self.insert, node, before), target, before, value)
            if scattered is None:
                return False
            target, value = memory.tensor[viewed], scattered
            changed.append((target, value))
        self.writes[memory.root[target]] += 1
        for tensor, new in changed:
            self.set(tensor, new)
        return True

    def insert(self, node: fx.Node, like: fx.Node, op: Any, *args: Any) -> fx.Node:
        """Insert an operator in the place of ``node`` whose result has the shape of ``like``."""
        new = self.memory.graph.call_function(op, args)
        new.meta = {**node.meta, "val": val(like)}
        return new


# ---------------------------------------------------------------------- the twins


def _twin(graph: fx.Graph, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
    """Insert the functional twin of an in-place operator and return what holds its result."""
    value = val(written_args(node)[0])

    def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = graph.call_function(op, args, kwargs)
        new.meta = {**node.meta, "val": value}
        return new

    special = _SPECIAL.get(node.target)  # type: ignore[arg-type]
    if special is not None:
        return special(call, *args, **kwargs)
    twin: Any = functional_twin(node.target)
    new = call(twin, *args, **kwargs)
    # x.add_(y) keeps the type of x; x.add(y) takes the wider one.
    others = [val(n) for n in node.all_input_nodes]
    if any(isinstance(v, Tensor) and v.dtype != value.dtype for v in others):
        new.meta["val"] = twin(*map_arg(args, val), **map_arg(kwargs, val))
        new = call(aten.to.dtype, new, value.dtype)
    return new


def _copied(call: Callable[..., fx.Node], target: fx.Node, source: fx.Node, *_: Any) -> fx.Node:
    before, after = val(source), val(target)
    if before.dtype != after.dtype:
        source = call(aten.to.dtype, source, after.dtype)
        source.meta["val"] = before.to(after.dtype)
    if before.shape == after.shape:
        return source
    return call(aten.expand_as.default, source, target)


_SPECIAL: dict[Any, Callable[..., fx.Node]] = {
    aten.copy_.default: _copied,
    aten.zero_.default: lambda call, target: call(aten.zeros_like.default, target),
    aten.fill_.Scalar: lambda call, target, value: call(aten.full_like.default, target, value),
}


def _has_twin(node: fx.Node) -> bool:
    return node.target in _SPECIAL or functional_twin(node.target) is not None


def functional_twin(target: Any) -> OpOverload | None:
    """Return the functional overload of an in-place one, ``relu`` of ``relu_``, or ``None``."""
    name = target._opname
    if not name.endswith("_") or target.namespace != "aten":
        return None
    twin = getattr(getattr(aten, name.rstrip("_"), None), target._overloadname, None)
    return twin if twin is not None and not twin._schema.is_mutable else None
