"""`survey`: which nodes of a float program can work on codes, and where their grids are decided.

Three passes go by it: calibration watches the *sites*, ``quantize`` puts a grid at each of them,
and the report lists what stays floating-point. A site is a tensor with a grid of its own: what an
operator computes, after the clip that follows it alone, or a floating-point tensor where it enters.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from narrows.errors import PassError, PassUsageError
from narrows.ir.meta import Meta, op_name, where
from narrows.ir.ops import table
from narrows.ir.ops.args import computes_numbers
from narrows.ir.ops.integer import IntegerForm, Moves, Relabel, Tests
from narrows.ir.ops.integer_forms import Concat
from narrows.ir.program import Program

SCALE_PARTS = torch.ops.narrows.scale_parts.default  # part of how codes become floats
SKIPPED = "skipped as asked"


@dataclass
class Survey:
    """What `survey` found.

    Attributes:
        forms: The nodes that work on codes, with their forms, in execution order.
        sites: The nodes whose result has a grid of its own, in execution order.
        entries: Those of them that are floating-point themselves: inputs, weights that are read
            as activations, results of islands. Only what works on codes reads their codes.
        floats: The nodes that stay floating-point although they compute, with the reason.
    """

    forms: dict[fx.Node, IntegerForm] = field(default_factory=dict)
    sites: list[fx.Node] = field(default_factory=list)
    entries: set[fx.Node] = field(default_factory=set)
    floats: dict[fx.Node, str] = field(default_factory=dict)

    def layers(self) -> Iterator[fx.Node]:
        """Yield the nodes that sum against a weight."""
        return (n for n, form in self.forms.items() if form.weights(n) is not None)

    def site(self, node: fx.Node) -> fx.Node | None:
        """Return the site whose grid a node's codes lie on; ``None`` behind a changed exponent."""
        while True:
            if node in self.entries:
                return node
            form = self.forms.get(node)
            if form is None or isinstance(form, Relabel):
                return None
            if not isinstance(form, Moves):
                return self.tail(node)
            node = form.operands(node)[0]

    def origin(self, node: fx.Node) -> fx.Node:
        """Return the site whose codes a node hands on, on its grid or under another exponent."""
        while node not in self.entries and isinstance(self.forms[node], Moves):
            node = self.forms[node].operands(node)[0]
        return node if node in self.entries else self.tail(node)

    def narrow(self) -> dict[fx.Node, str]:
        """Return the sites that have codes of 8 bits at most, with the reason: what makes them, or
        what reads them, takes no others."""
        sites: dict[fx.Node, str] = {}
        for node, form in self.forms.items():
            reason = form.narrow(node)
            if not reason:
                continue
            for site in (*map(self.origin, form.operands(node)), self.origin(node)):
                sites.setdefault(site, f"{reason}, as {node.name}")
        return sites

    def chain(self, site: fx.Node) -> list[fx.Node]:
        """Return a site and the operators that are absorbed into it: it is the result of all."""
        nodes, node = [site], site
        while site not in self.entries:
            form = self.forms[node]
            source = form.operands(node)[0] if form.kind == "clips" else node
            if source is node or source not in self.forms or self.tail(source) is not site:
                break
            node = source
            nodes.append(node)
        return nodes

    def tail(self, node: fx.Node) -> fx.Node:
        """Return the last of the clips that a node's result alone goes through, or the node."""
        while len(node.users) == 1:
            (user,) = node.users
            form = self.forms.get(user)
            if form is None or form.kind != "clips":
                return node
            node = user
        return node

    def placed(self, node: fx.Node) -> tuple[fx.Node, int] | None:
        """Return the site that a node's codes come from, and the power of two that its numbers were
        multiplied by on the way."""
        power = 0
        while node not in self.entries:
            form = self.forms.get(node)
            if form is None:
                return None
            if not isinstance(form, Moves):
                return self.tail(node), power
            power += form.power if isinstance(form, Relabel) else 0
            node = form.operands(node)[0]
        return node, power

    def shared_grids(self) -> list[dict[fx.Node, int]]:
        """Return the sites that should have one grid: tensors that are concatenated, and the
        result.

        They are then put side by side without arithmetic. With each goes the power of two that its
        numbers are multiplied by before: its exponent less that is the same for all.
        """
        leader: dict[fx.Node, tuple[fx.Node, int]] = {}

        def find(node: fx.Node) -> tuple[fx.Node, int]:
            power = 0
            while leader.setdefault(node, (node, 0))[0] is not node:
                node, more = leader[node]
                power += more
            return node, power

        for node, form in self.forms.items():
            if not isinstance(form, Concat):
                continue
            result = self.tail(node)
            for placed in map(self.placed, form.operands(node)):
                if placed is None:
                    continue
                (one, up), (other, down) = find(placed[0]), find(result)
                if one is not other:
                    leader[one] = other, placed[1] + down - up
        grouped: dict[fx.Node, dict[fx.Node, int]] = {}
        for node in self.sites:
            if node in leader:
                root, power = find(node)
                grouped.setdefault(root, {})[node] = power
        return [g for g in grouped.values() if len(g) > 1]


def survey(
    program: Program,
    skip: Iterable[str] = (),
    *,
    floats: Iterable[str] = (),
    strict: bool = False,
) -> Survey:
    """Return which nodes of a prepared program can work on codes.

    Args:
        program: The program.
        skip: Globs on node names, module paths and weight names of what stays floating-point.
        floats: Names of nodes that stay so, too, such as those of a plan.
        strict: Whether an operator without an integer form is an error.

    Raises:
        PassError: A glob matches nothing; or, with ``strict``, an operator has no integer form.
    """
    found = Survey()
    skip, kept = list(skip), set(floats)
    _refuse_unmatched(program, skip)
    _refuse_unmatched(program, kept - {n.name for n in program.graph.nodes})
    fed: set[fx.Node] = set(program.placeholders)
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if any(n in fed for n in node.all_input_nodes):
            fed.add(node)
        reason = _classify(found, node, skip, kept, node in fed)
        if not reason:
            continue
        if strict and reason != SKIPPED:
            raise PassError(
                f"{op_name(node)} would stay floating-point",
                where=where(node),
                why=reason,
                hint="leave out strict=True to compute it as a float island",
            )
        found.floats[node] = reason
    _find_sites(found, program)
    return found


def _classify(found: Survey, node: fx.Node, skip: list[str], kept: set[str], fed: bool) -> str:
    """Enter a node's form, or return why it stays floating-point; nothing where that is plain."""
    form = table.integer_form(node)
    tests = isinstance(form, Tests) and any(map(_is_float, form.operands(node)))
    if not (_is_float(node) or tests) or node.target is SCALE_PARTS:
        return ""
    if form is None:
        how = " for a number that is computed when it runs" if computes_numbers(node) else ""
        return f"{op_name(node)} has no integer form{how}" if fed else ""
    if node.name in kept or any(matches(node, glob) for glob in skip):
        return SKIPPED
    reason = form.obstacle(node)
    if reason:
        return reason
    if form.kind in ("computes", "tests"):
        if not fed:  # computed from weights alone: a weight in all but name
            return ""
        found.forms[node] = form
        return ""
    # What only moves or clips follows its operand.
    operand = form.operands(node)[0]
    if operand in found.forms or operand.op != "call_function":
        found.forms[node] = form
    return ""


def _is_float(node: fx.Node) -> bool:
    """Whether a node's result is floating-point: one tensor, or several."""
    if Meta(node).dtype is not None:
        return Meta(node).dtype.is_floating_point
    if Meta(node).size is not None or not node.all_input_nodes:
        return False
    return _is_float(node.all_input_nodes[0])


def _find_sites(found: Survey, program: Program) -> None:
    absorbed: set[fx.Node] = set()
    sites: set[fx.Node] = set()
    for node, form in found.forms.items():
        for operand in form.operands(node):
            # Truth values that are read as numbers become codes there.
            if operand not in found.forms or isinstance(found.forms[operand], Tests):
                found.entries.add(operand)
                sites.add(operand)
        if isinstance(form, Moves | Tests) or node in absorbed:
            continue
        tail = found.tail(node)
        sites.add(tail)
        while node is not tail:
            (node,) = node.users
            absorbed.add(node)
    found.sites = [n for n in program.graph.nodes if n in sites]


def matches(node: fx.Node, glob: str) -> bool:
    """Return whether a glob fits a node's name, its module path, or a weight it reads."""
    weights = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
    return any(fnmatch.fnmatchcase(n, glob) for n in (node.name, Meta(node).module, *weights))


def _refuse_unmatched(program: Program, globs: Iterable[str]) -> None:
    for glob in globs:
        if not any(matches(n, glob) for n in program.graph.nodes if n.op == "call_function"):
            raise PassUsageError(
                f"{glob!r} matches no node, module or weight",
                hint="names are those of the dump: print(program)",
            )


__all__ = ["Survey", "matches", "survey"]
