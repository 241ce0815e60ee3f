"""The channel analysis: where channels are made and how they flow.

`analyse` walks a program once, forwards, and gives each tensor labels and known constants through
the op table's rows. It is linear in the graph and never runs the network. `narrows.ir.couplings`
joins labels that live or die together; `narrows.ir.liveness` finds the ones that nobody needs.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.labels import Bools, Ints, Value, channels, compact, free, grid, met, opaque
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops import table
from narrows.ir.ops.args import call
from narrows.ir.ops.barrier import barrier_flow
from narrows.ir.ops.flow import Flow, Read
from narrows.ir.program import Program
from narrows.ir.states import State


class Facts:
    """What the forward analysis knows of every node of a program.

    Attributes:
        program: The program analysed.
        flows: Per node its `Flow`.
        ignored: Per name of a contraction's node, the input channels that count as zero for it
            although their weights are not: a mask that nobody had to multiply into the weight.
    """

    def __init__(self, program: Program, ignored: Mapping[str, Bools] | None = None) -> None:
        self.program = program
        self.ignored: Mapping[str, Bools] = ignored or {}
        self.flows: dict[fx.Node, Flow] = {}
        self._data: dict[fx.Node, Tensor] = {}
        self._came: dict[fx.Node, Tensor] = {}

    def value(self, node: fx.Node) -> Value:
        """Return the channels of a node that is one tensor."""
        value = self.flows[node].value
        assert isinstance(value, Value), f"{node} is not one tensor"
        return value

    def is_free(self, node: Any) -> bool:
        """Whether an argument is a tensor made of weights alone."""
        flow = self.flows.get(node) if isinstance(node, fx.Node) else None
        return flow is not None and isinstance(flow.value, Value) and flow.value.free

    def data(self, node: fx.Node) -> Tensor:
        """Return the tensor of a free value, computed from the weights at most once."""
        if node not in self._data:
            if node.op == "get_attr":
                self._data[node] = self.program.tensor(node).detach()
            else:
                operands = {n: self.data(n) for n in node.all_input_nodes if self.is_free(n)}
                self._data[node] = call(node, operands)
        return self._data[node]

    def tied(self, state: State) -> tuple[fx.Node, Ints, Ints]:
        """Return the input of a state, and which of its labels are which of the output's: pairs."""
        holder = self.program.node(state.name)
        returned = self.program.output.args[0][state.output]  # type: ignore[index]
        assert isinstance(returned, fx.Node)
        return holder, *met(self.value(holder), self.value(returned))

    def moved_operand(self, node: fx.Node) -> fx.Node:
        """Return what a node that only moves elements moves; of a part, what was split."""
        return self.flows[node].reads[0].operand

    def came(self, node: fx.Node) -> Tensor:
        """Return where each place of a node that only moves elements has its operand's place.

        The shape is that of the node's labels. Where its operand's places change along an axis
        along which the labels do not (a batch that was one axis with the heads), it is full there.
        """
        if node not in self._came:
            self._came[node] = self._find_came(node)
        return self._came[node]

    def _find_came(self, node: fx.Node) -> Tensor:
        x, value = self.moved_operand(node), self.value(node)
        source, origin = self.value(x), self.flows[node].reads[0].source
        assert origin is not None
        if source.natural:
            return torch.from_numpy(origin)[value.tensor]
        parent = node.args[0] if node.target is operator.getitem else node
        assert isinstance(parent, fx.Node)
        free = {n: self.data(n) for n in parent.all_input_nodes if self.is_free(n)}
        moved = call(parent, {x: source.places.expand(source.shape), **free})
        places = moved if parent is node else moved[node.args[1]]
        return compact(places, value.axes)

    @property
    def barriers(self) -> dict[fx.Node, str]:
        """The nodes through which nothing can be removed, each with the reason."""
        return {n: f.barrier for n, f in self.flows.items() if f.barrier}


def analyse(program: Program, ignored: Mapping[str, Bools] | None = None) -> Facts:
    """Return the channels of every tensor in ``program``; for ``ignored`` see `Facts`.

    A program is analysed once: with channels ignored, only what that changes is looked at again.
    What is remembered knows no program, or this one would be a cycle, and its weights would stay.
    """
    if ignored and program.memo("facts") is None:
        return _fill(Facts(program, ignored))

    def found() -> tuple[Any, ...]:
        facts = _fill(Facts(program))
        return facts.flows, facts._data, facts._came

    facts = Facts(program, ignored)
    flows, facts._data, facts._came = program.memo("facts", found)
    if not ignored:
        facts.flows = flows
        return facts
    return _fill(facts, flows)


def _fill(facts: Facts, plain: Mapping[fx.Node, Flow] | None = None) -> Facts:
    """Find every node's flow, or take it from ``plain`` where nothing that it depends on differs.

    What is ignored changes which channels are constants, and no label.
    """
    differs: set[fx.Node] = set()
    for node in facts.program.graph.nodes:
        old = None if plain is None else plain[node]
        spared = node.name not in facts.ignored and differs.isdisjoint(node.all_input_nodes)
        if old is not None and spared:
            facts.flows[node] = old
            continue
        new = facts.flows[node] = _flow(facts, node)
        if old is not None and not _same_constants(old.value, new.value):
            differs.add(node)
    return facts


def _same_constants(old: Any, new: Any) -> bool:
    if isinstance(old, Value) and isinstance(new, Value):
        return np.array_equal(old.const, new.const, equal_nan=True)
    return old is new


def _flow(facts: Facts, node: fx.Node) -> Flow:
    shape = shape_of(node)
    if node.op == "placeholder":
        if shape is None:
            return Flow(None)
        state = next((s for s in facts.program.states if s.name == node.name), None)
        if state is not None:
            return Flow(grid(shape, state.axes))
        if Meta(node).channels is not None:
            return Flow(grid(shape, Meta(node).channels))
        axis = input_axis(node)
        return Flow(opaque(shape) if axis is None else channels(shape, axis))
    if node.op == "get_attr":
        return Flow(free(tuple(facts.program.tensor(node).shape)))
    if node.op == "output":
        return _output_flow(facts, node)
    if shape is None and Meta(node).size is not None:
        return Flow(None)
    tensors = [n for n in node.all_input_nodes if shape_of(n) is not None or facts.is_free(n)]
    if tensors and all(facts.is_free(n) for n in tensors):
        return Flow(free(shape or ()))  # of a split weight too, and of its parts
    if any(0 in (shape_of(n) or ()) for n in (node, *tensors)):
        return barrier_flow(facts, node, "it has, or reads, a tensor without elements")
    row = table.find(node) or table.BARRIER
    return row.flow(facts, node)


def _output_flow(facts: Facts, node: fx.Node) -> Flow:
    """Return what the program returns: a read per tensor, and one more per state.

    The flow's facts say by its slot which read is a state's.
    """
    results: Any = node.args[0]
    states = [s for s in facts.program.states if _labelled(facts, results[s.output])]
    handed = {s.output for s in facts.program.states}
    nodes = [n for i, n in enumerate(results) if i not in handed and isinstance(n, fx.Node)]
    reads = [Read(n) for n in dict.fromkeys(nodes) if _labelled(facts, n)]
    slots = {len(reads) + i: state for i, state in enumerate(states)}
    reads += [Read(results[s.output]) for s in states]
    return Flow(None, tuple(reads), facts=slots)


def _labelled(facts: Facts, node: fx.Node) -> bool:
    value = facts.flows[node].value
    return isinstance(value, Value) and not value.free


def input_axis(node: fx.Node) -> int | None:
    """Return the channel axis of an input: the one that the first contraction after it sums
    over."""
    seen, queue = {node}, [node]
    rank = len(shape_of(node) or ())
    while queue:
        current = queue.pop(0)
        for user in current.users:
            row = table.find(user)
            if row is None or user in seen:
                continue
            axis = row.input_axis(user, current)
            if isinstance(axis, int):
                return axis % rank if rank else None
            if axis == "same" and len(shape_of(user) or ()) == rank:
                seen.add(user)
                queue.append(user)
    return None
