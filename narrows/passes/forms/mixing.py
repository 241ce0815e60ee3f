"""One form of several: for every part of a network the form that is cheapest there.

Contractions part a program: what lies between them hands the same channels on, through splits,
concats and sums, and is one *family*. What a family costs depends on its own form, and what a
contraction costs on those of the two families that it stands between. So the accounts of whole
forms say what any mixture of them costs, nearly, and `Mixture` goes from the best of them to one in
which no family alone is better off with another one's form. What it comes to is then made and
predicted like any form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import fx

from narrows.ir.channels import Facts
from narrows.ir.choices import Choices
from narrows.ir.costs import Costs, OpCost
from narrows.ir.program import Program
from narrows.ir.structure.leaders import Leaders
from narrows.passes.forms.common import makes

# Rounds over all families; the second changes little.
ROUNDS = 6
CERTAIN = 1e-9  # of a time: rounding


@dataclass(frozen=True, eq=False)
class Account:
    """What a form costs, node by node.

    Attributes:
        form: The form, or the unpruned graph with its widths.
        costs: The costs of its nodes.
    """

    form: Program
    costs: list[OpCost]

    @property
    def seconds(self) -> float:
        """What all of it takes."""
        return sum(op.total for op in self.costs)


@dataclass(eq=False)
class Mixture:
    """Which form every family has.

    Attributes:
        facts: The analysis of the unpruned program.
        costs: The target's costs.
        accounts: The accounts of the forms, by their names.
    """

    facts: Facts
    costs: Costs
    accounts: Mapping[str, Account]
    _own: dict[tuple[str, str], float] = field(default_factory=dict)
    _between: dict[str, dict[str, OpCost]] = field(default_factory=dict)
    _known: dict[tuple[str, str, str], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.family = _families(self.facts)
        self.reads = {
            node.name: flow.reads[0].operand.name
            for node, flow in self.facts.flows.items()
            if flow.reads and makes(self.facts, node)
        }
        for name, account in self.accounts.items():
            self._sort(name, account)
        self._near: dict[str, list[str]] = {}
        for node in self._between:
            for end in {self.family[node], self.family[self.reads[node]]}:
                self._near.setdefault(end, []).append(node)

    def _sort(self, name: str, account: Account) -> None:
        """Count every node of a form for its family, or between the two of a contraction."""
        nodes = {node.name: node for node in account.form.graph.nodes}
        for op in account.costs:
            if op.node in self.reads and op.work is not None:
                self._between.setdefault(op.node, {})[name] = op
                continue
            key = (self._owner(nodes[op.node]), name)
            self._own[key] = self._own.get(key, 0.0) + op.total

    def _owner(self, node: fx.Node) -> str:
        """Return the family of a node of a form; a copy of channels is its operand's."""
        while node.name not in self.family:
            operands = [n for n in node.all_input_nodes if n.op != "get_attr"]
            if not operands:
                return ""
            node = operands[0]
        return self.family[node.name]

    # ------------------------------------------------------------------ the search

    def run(self, start: str) -> dict[str, str]:
        """Return the form of every family, where ``start`` is that of all at first."""
        chosen = dict.fromkeys([*self.family.values(), ""], start)
        for _ in range(ROUNDS):
            if not any([self._improve(family, chosen) for family in chosen]):
                break
        return chosen

    def _improve(self, family: str, chosen: dict[str, str]) -> bool:
        now = chosen[family]
        seconds = {name: self._seconds(family, {**chosen, family: name}) for name in self.accounts}
        best = min(seconds, key=seconds.__getitem__)
        if seconds[best] >= seconds[now] * (1 - CERTAIN):
            return False
        chosen[family] = best
        return True

    def _seconds(self, family: str, chosen: Mapping[str, str]) -> float:
        """Return what a family and the contractions at its ends take."""
        ends = (
            self._contraction(n, chosen[self.family[self.reads[n]]], chosen[self.family[n]])
            for n in self._near.get(family, ())
        )
        return self._own.get((family, chosen[family]), 0.0) + sum(ends)

    def _contraction(self, node: str, before: str, after: str) -> float:
        """Return what a contraction takes with one form's inputs and another's outputs."""
        key = (node, before, after)
        if key not in self._known:
            self._known[key] = self._crossed(self._between[node], before, after)
        return self._known[key]

    def _crossed(self, forms: Mapping[str, OpCost], before: str, after: str) -> float:
        one, other = forms.get(before), forms.get(after)
        if one is None or other is None:
            return max((op.total for op in (one, other) if op is not None), default=0.0)
        if one is other or one.work is None or other.work is None or other.work.groups > 1:
            return other.total
        work = other.work.resized(inputs=one.work.inputs)
        return self.costs.again(other, work) + one.layout

    # ------------------------------------------------------------------ what it means

    def choices(self, chosen: Mapping[str, str], forms: Mapping[str, Choices]) -> Choices:
        """Return the choices of a mixture.

        Args:
            chosen: Per family the form's name.
            forms: The choices of the forms.
        """
        forced, columns = {}, {}
        for node, family in self.family.items():
            held = forms[chosen[family]].forced.get(node)
            if held is not None:
                forced[node] = held
        for node, operand in self.reads.items():
            read = forms[chosen[self.family[operand]]].columns.get(node)
            if read is not None:
                columns[node] = read
        return Choices(forced, columns)


def _families(facts: Facts) -> dict[str, str]:
    """Return per node of a program the first node of its family."""
    leaders = Leaders()
    for node, flow in facts.flows.items():
        leaders.add(node)
        operands: Iterable[fx.Node] = () if makes(facts, node) else (r.operand for r in flow.reads)
        for operand in operands:
            if operand in leaders:
                leaders.join(node, operand)
    return {node.name: leaders.find(node).name for node in leaders}


__all__ = ["Account", "Mixture"]
