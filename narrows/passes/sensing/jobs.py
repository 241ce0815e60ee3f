"""Jobs: one change of a network each, as a value that tells all of it.

A job does not say by which criterion its channels were chosen, nor from which data a grid: two that
change the same are the same, and are measured once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from narrows.ir.program import Program
from narrows.passes.choosing.solved import checkpoint
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.sensing.identity import identity
from narrows.version import VERSION

Keeps = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Untouched:
    """No change: the network as it is."""


@dataclass(frozen=True)
class Masked:
    """Channels that go.

    Attributes:
        inputs: Per weight the inputs that it keeps.
        outputs: Per weight the outputs that it keeps.
    """

    inputs: Keeps
    outputs: Keeps

    @staticmethod
    def of(plan: ChannelPlan) -> Masked:
        """Return what a plan masks."""
        return Masked(tuple(sorted(plan.inputs.items())), tuple(sorted(plan.outputs.items())))

    def plan(self, program: Program) -> ChannelPlan:
        """Return the plan of a program that masks so."""
        return ChannelPlan.given(program, dict(self.inputs), dict(self.outputs))


@dataclass(frozen=True)
class Rounded:
    """A weight or an activation that is rounded.

    Attributes:
        bits: To how many bits, which says how the network is prepared.
        weight: The weight; or else ``node``: the node whose result it is.
        operator: The operator of narrows that rounds, by its name.
        grid: Its arguments behind the tensor.
    """

    bits: int
    weight: str
    node: str
    operator: str
    grid: tuple[Any, ...]

    def of(self, prepared: Program) -> Program:
        """Return the prepared program with that one rounded."""
        rounds = getattr(torch.ops.narrows, self.operator).default
        grid = [list(part) if isinstance(part, tuple) else part for part in self.grid]
        if self.weight:
            rounded = rounds(prepared.weights[self.weight].detach(), *grid)
            return prepared.with_weights({**prepared.weights, self.weight: rounded})
        draft = prepared.copy()
        node = draft.node(self.node)
        with draft.graph.inserting_after(node):
            made = draft.graph.call_function(rounds, (node, *grid))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
        return draft.seal()


Change = Untouched | Masked | Rounded


@dataclass(frozen=True)
class Job:
    """One change, and the key under which what is measured of it is kept."""

    key: str
    change: Change

    @staticmethod
    def of(context: str, change: Change) -> Job:
        """Return the job of a change; the context is `context_of`'s."""
        return Job(hashlib.sha256(f"{context}\0{change!r}".encode()).hexdigest()[:32], change)


@dataclass(frozen=True)
class _Place:
    """A node as an argument: its place in the graph."""

    at: int


def context_of(
    program: Program, measured: Sequence[Any], solved: Sequence[Any], **settings: Any
) -> str:
    """Return a hash of all that a result hangs on beside the change.

    Args:
        program: The network, with its weights.
        measured: The batches that outputs are compared on.
        solved: Those that weights are found anew on.
        settings: How both are done, by what errors call it.

    Raises:
        PlanUsageError: A setting cannot be told from others.
    """
    told = [f"{name} {identity(name, value)}" for name, value in sorted(settings.items())]
    told += [VERSION, torch.__version__, checkpoint(program), *_graph(program)]
    told += [identity("data", [measured, solved])]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def _graph(program: Program) -> Iterator[str]:
    """Yield every node with all its arguments: slopes and strides as well as what it reads."""
    place: dict[fx.Node, Any] = {node: _Place(i) for i, node in enumerate(program.graph.nodes)}
    for node in program.graph.nodes:
        given = fx.map_arg((node.args, node.kwargs), place.__getitem__)
        yield identity("network", [node.op, node.target, _plain(given)])


def _plain(value: Any) -> Any:
    """Return arguments in lists and dicts of Python, not those that torch.fx makes of them."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value


__all__ = ["Change", "Job", "Masked", "Rounded", "Untouched", "context_of"]
