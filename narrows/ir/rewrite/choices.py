"""What a rewrite may choose among exact forms: wider reads, wider tensors, another order.

The smallest program is not always the fastest one. A consumer may read channels that count as zero
for it rather than have the others copied together; a tensor may keep channels that nobody reads
rather than have an awkward width; and the channels of a tensor may stand in any order. `Choices`
says which of these to do, `Base` is what they are done to, and `emit` does them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from narrows.ir.channels import Facts, analyse
from narrows.ir.labels import Bools, Ints, Value
from narrows.ir.liveness import Demand
from narrows.ir.ops import table

if TYPE_CHECKING:
    import torch

    from narrows.ir.program import Program


@dataclass(frozen=True, eq=False)
class Choices:
    """Deviations from the smallest form, all by node name in the base program.

    Attributes:
        forced: Labels that a node's result holds although nobody needs them.
        columns: The input channels that a contraction reads, those included that count as zero
            for it. It reads no others, even where reading them would spare a copy.
        order: For a node that makes channels, a rank per label: lower ones come first.
    """

    forced: Mapping[str, Bools] = field(default_factory=dict)
    columns: Mapping[str, Bools] = field(default_factory=dict)
    order: Mapping[str, Ints] = field(default_factory=dict)

    def holds_like(self, other: Choices) -> bool:
        """Whether both were made with the same channels, in whatever order."""
        own, others = (self.forced, self.columns), (other.forced, other.columns)
        return all(a is b or not (a or b) for a, b in zip(own, others, strict=True))


def everything(facts: Facts) -> Choices:
    """Return the choice of a program as it is: channels that count as zero have zero weights."""
    held, columns = {}, {}
    for node, flow in facts.flows.items():
        if not isinstance(flow.value, Value) or flow.value.free:
            continue
        held[node.name] = np.ones(flow.value.count, dtype=bool)
        c = table.contraction(facts, node)
        if c is not None and isinstance(flow.facts, tuple):
            columns[node.name] = np.ones(c.inputs, dtype=bool)
    return Choices(held, columns)


@dataclass(frozen=True, eq=False)
class Base:
    """What a pruned program was made from, so that a later pass can choose another exact form.

    Attributes:
        program: The program before its channels went.
        ignored: Per name of a contraction's node, the input channels that count as zero for it.
        choices: What was chosen so far.
        pending: The form that was chosen together with this one, for the next pass.
    """

    program: Program
    ignored: Mapping[str, Bools] = field(default_factory=dict)
    choices: Choices = field(default_factory=Choices)
    pending: Program | None = None
    _facts: list[Facts] = field(default_factory=list)
    _demands: list[tuple[Choices, Demand]] = field(default_factory=list)

    @property
    def facts(self) -> Facts:
        """The analysis of the program, made at most once for all choices."""
        if not self._facts:
            self._facts.append(analyse(self.program, self.ignored))
        return self._facts[0]

    @property
    def demand(self) -> Demand:
        """The liveness of what is chosen, made at most once for forms that only order differs."""
        for choices, demand in self._demands:
            if choices.holds_like(self.choices):
                return demand
        nodes = {node.name: node for node in self.program.graph.nodes}
        forced = {nodes[n]: mask for n, mask in self.choices.forced.items()}
        columns = {nodes[n]: mask for n, mask in self.choices.columns.items()}
        self._demands.append((self.choices, Demand(self.facts, forced, columns)))
        return self._demands[-1][1]

    def choose(self, choices: Choices) -> Base:
        """Return the base with other choices."""
        return replace(self, choices=choices, pending=None)

    def to(self, dtype: torch.dtype) -> Base:
        """Return the base with its program in ``dtype``."""
        pending = None if self.pending is None else self.pending.to(dtype)
        return Base(self.program.to(dtype), self.ignored, self.choices, pending)
