"""`LatencyModel`: the seconds of a program when its couplings keep fewer channels.

It starts from the account of the program as it is (`Costs.account`) and asks the target's costs
again for every operator whose widths change. How an operator is computed stays as it is there: what
is fused stays fused. So it is quick, near the truth, and no more than that: the truth is the
prediction for the program that the passes make.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from narrows.ir.costs import Costs, OpCost
from narrows.ir.program import Program
from narrows.ir.structure import Holds, Structure
from narrows.ir.work import CONVOLUTIONS, ONE_WIDTH, TWO_WIDTHS, Work


@dataclass
class _Node:
    """One operator.

    Attributes:
        cost: What it costs at full widths.
        full: How many channels it reads and makes then.
        known: Seconds by how many it reads and makes.
    """

    cost: OpCost
    full: tuple[int, int]
    known: dict[tuple[int, int], float] = field(default_factory=dict)


@dataclass
class Widths:
    """Widths of all couplings, and what follows from them; `LatencyModel.go` keeps it up.

    Attributes:
        widths: Per coupling.
        channels: Per operator how many channels it reads and makes.
        seconds: Per operator.
        total: The seconds of the program.
    """

    widths: list[int]
    channels: list[tuple[int, int]]
    seconds: list[float]
    total: float

    def copy(self) -> Widths:
        """Return a copy."""
        return Widths([*self.widths], [*self.channels], [*self.seconds], self.total)


class LatencyModel:
    """Seconds of a program by the widths of its couplings.

    Attributes:
        costs: The target's costs.
        widths: Per coupling how many channels it has.
        nodes: Per coupling the operators whose time depends on it, by their numbers, each with how
            many channels more it reads and makes for one channel more of the coupling.
        fixed: The seconds of all other operators.
        steps: Per coupling the step in which its width should change.
    """

    def __init__(
        self,
        program: Program,
        structure: Structure,
        costs: Costs,
        batch: int = 1,
    ) -> None:
        self.costs = costs
        self.widths = [tie.width for tie in structure.ties]
        self.nodes: list[list[tuple[int, int, int]]] = [[] for _ in structure.ties]
        self.fixed = 0.0
        self._nodes: list[_Node] = []
        self._each: list[set[int]] = [set() for _ in structure.ties]
        places = {node.name: node for node in program.graph.nodes}
        for cost in costs.account(program, batch):
            node = places[cost.node]
            made = structure.made(node)
            # Of what nothing is known but its seconds, they go by what it makes.
            known = cost.work is not None or node.name in structure.layer_at
            read = structure.read(node) if known else made
            self._add(cost, read, made)
        self.steps = [self._step(each) for each in self._each]

    def _add(self, cost: OpCost, reads: Holds, makes: Holds) -> None:
        if cost.total == 0 or not (reads or makes):
            self.fixed += cost.total
            return
        more, made = dict(reads), dict(makes)
        for coupling in {**more, **made}:
            each = more.get(coupling, 0), made.get(coupling, 0)
            self.nodes[coupling].append((len(self._nodes), *each))
        full = tuple(sum(self.widths[c] * n for c, n in holds) for holds in (reads, makes))
        work = cost.work
        if work is not None and work.kind in CONVOLUTIONS:
            for number, each in (*reads, *makes):
                self._each[number].add(each)
        self._nodes.append(_Node(cost, (full[0], full[1])))

    def _step(self, each: set[int]) -> int:
        """Return the step for a coupling whose channels are so many of a layer's."""
        step = self.costs.step
        return max([step // math.gcd(step, n) for n in each], default=step)

    # ------------------------------------------------------------------ seconds

    def full(self) -> Widths:
        """Return the widths of the program as it is."""
        seconds = [node.cost.total for node in self._nodes]
        channels = [node.full for node in self._nodes]
        return Widths([*self.widths], channels, seconds, self.fixed + sum(seconds))

    def at(self, widths: Sequence[int]) -> Widths:
        """Return these widths with what follows from them."""
        result = self.full()
        for coupling, width in enumerate(widths):
            self.go(result, coupling, width)
        return result

    def change(self, now: Widths, coupling: int, width: int) -> float:
        """Return the seconds that another width of one coupling costs more."""
        more, total = width - now.widths[coupling], 0.0
        for number, reads, makes in self.nodes[coupling]:
            read, made = now.channels[number]
            at = read + more * reads, made + more * makes
            total += self._known(number, at) - now.seconds[number]
        return total

    def go(self, now: Widths, coupling: int, width: int) -> None:
        """Give one coupling another width."""
        more = width - now.widths[coupling]
        now.widths[coupling] = width
        for number, reads, makes in self.nodes[coupling] if more else ():
            read, made = now.channels[number]
            at = now.channels[number] = read + more * reads, made + more * makes
            now.seconds[number] = self._known(number, at)
        now.total = self.fixed + sum(now.seconds)

    def _known(self, number: int, at: tuple[int, int]) -> float:
        node = self._nodes[number]
        seconds = node.known.get(at)
        if seconds is None:
            seconds = node.known[at] = self._seconds(node, at)
        return seconds

    def _seconds(self, node: _Node, at: tuple[int, int]) -> float:
        cost, work = node.cost, node.cost.work
        if at == node.full:
            return cost.total
        if any(full and not now for full, now in zip(node.full, at, strict=True)):
            return 0.0  # what reads nothing is a constant, what makes nothing is gone
        reads, makes = (a / f if f else 1.0 for a, f in zip(at, node.full, strict=True))
        least = self.costs.least_seconds
        layout = max(least, cost.layout * reads) if cost.layout else 0.0
        if work is None or work.kind == "view" or cost.form == "none":
            return cost.seconds + layout
        if cost.form == "fused":
            return cost.seconds * makes + layout
        if work.kind not in (*TWO_WIDTHS, *ONE_WIDTH):
            return max(min(least, cost.seconds), cost.seconds * makes) + layout
        return self.costs.again(cost, _resized(work, reads, makes)) + layout


# ---------------------------------------------------------------------- widths


def _resized(work: Work, reads: float, makes: float) -> Work:
    """Return a work at shares of its widths."""
    inputs = max(1, round(work.inputs * reads))
    outputs = max(1, round(work.outputs * makes))
    if work.kind == "grouped" and inputs % work.groups == outputs % work.groups == 0:
        return dataclasses.replace(work, inputs=inputs, outputs=outputs)
    if work.kind in TWO_WIDTHS and work.kind != "depthwise":
        return work.resized(inputs=inputs, outputs=outputs)
    return work.resized(outputs=outputs)


__all__ = ["LatencyModel", "Widths"]
