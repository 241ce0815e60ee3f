"""States in the new program: the input takes the channels that are needed, the output returns
them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from narrows.ir.held import Held, RaggedError, line
from narrows.ir.labels import Bools, Ints, even_sizes, match
from narrows.ir.meta import Meta
from narrows.ir.ops.protocols import Builder
from narrows.ir.program import Program
from narrows.ir.states import State


def taken(builder: Builder, node: fx.Node, new: fx.Node) -> Held:
    """Return what the new program takes as a state.

    Args:
        builder: Emits the new program.
        node: The input of the old program.
        new: That of the new one, whose shape is to be said.
    """
    value = builder.facts.value(node)
    grid = torch.from_numpy(builder.need(node))[value.tensor]
    sizes = even_sizes(grid)
    if sizes is None:
        raise RaggedError(node, builder.need(node))
    places = value.places[grid].view(sizes)
    shape = [n if w > 1 else s for s, w, n in zip(value.shape, grid.shape, sizes, strict=True)]
    Meta(new).shape = tuple(shape)
    return Held(new, places, tuple(shape))


def returned(builder: Builder, holder: fx.Node, node: fx.Node) -> fx.Node:
    """Return what the new program returns as a state: the channels that it takes, in their order.

    Args:
        builder: Emits the new program.
        holder: The state's input in the old program.
        node: The output there.
    """
    facts = builder.facts
    wanted = builder.held(holder)
    if facts.is_free(node):
        return builder.free(node, _lines(builder, holder, wanted))
    held, value = builder.held(node), facts.value(node)
    if value.tensor.shape == facts.value(holder).tensor.shape:
        held = builder.deliver(node, _labels_at(builder, node, wanted), exact=False)
        if torch.equal(held.places, wanted.places):
            return held.node
    lines = _lines(builder, holder, wanted)
    for axis, index in lines.items():
        found = index
        if value.tensor.shape[axis] > 1:
            along = line(value.index(held.places)[axis], axis)
            found = None if along is None else match(along, index)
        if found is None:
            raise _product(builder, holder, lines)
        held = builder.gather(held, axis, found)
    return held.node


def _labels_at(builder: Builder, node: fx.Node, wanted: Held) -> Bools:
    """Return the labels of a node at places."""
    value = builder.facts.value(node)
    mask = np.zeros(value.count, dtype=bool)
    mask[value.at(wanted.places).reshape(-1).numpy()] = True
    return mask


def _lines(builder: Builder, holder: fx.Node, wanted: Held) -> dict[int, Ints]:
    """Return what a state has along each of its axes, if every row has the same."""
    value, found = builder.facts.value(holder), {}
    for axis, index in value.index(wanted.places).items():
        along = line(index, axis)
        if along is None:
            grids = np.unravel_index(wanted.places.reshape(-1).numpy(), tuple(value.tensor.shape))
            raise _product(builder, holder, {a: np.unique(grids[a]) for a in value.axes})
        found[axis] = along
    return found


def _product(builder: Builder, holder: fx.Node, lines: dict[int, Ints]) -> RaggedError:
    """Return the error that asks for a state of which every row has the same."""
    value = builder.facts.value(holder)
    block = torch.ones_like(value.tensor, dtype=torch.bool)
    for axis, index in lines.items():
        kept = torch.zeros(value.tensor.shape[axis], dtype=torch.bool)
        kept[torch.from_numpy(index)] = True
        block = block & kept.view([-1 if a == axis else 1 for a in range(block.dim())])
    mask = np.zeros(value.count, dtype=bool)
    mask[value.tensor[block].numpy()] = True
    return RaggedError(holder, mask)


def narrowed(made: Program, held: Mapping[str, Held]) -> Program:
    """Return a program with what is left of its states, and with examples of that.

    Args:
        made: The new program, with the states and the examples of the old one.
        held: What it takes, by the states' names.
    """
    states: list[State] = []
    examples: list[Any] = list(made.examples)
    names = [n.name for n in made.placeholders]
    for old in made.states:
        here, places = held[old.name], held[old.name].places.reshape(-1).numpy()
        sizes = [here.shape[a] for a in old.axes]
        states.append(old.narrowed(sizes, places))
        step = State(old.name, old.output, old.axes, old.sizes, old.sizes)
        at = names.index(old.name)
        examples[at] = step.narrowed(sizes, places).gather(examples[at])
    if tuple(states) == made.states:
        return made
    return made.replace(states=tuple(states), examples=tuple(examples))


__all__ = ["narrowed", "returned", "taken"]
