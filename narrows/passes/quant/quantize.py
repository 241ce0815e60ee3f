"""`Quantize`: a plan's grids become explicit nodes; the program stays floating-point.

The result is the *fake-quantized* program: every activation is rounded to its grid, every weight
and bias to its own, and all arithmetic is floating-point. In float64 it computes exactly what the
integer program of ``fold-shifts`` does; in float32, too, where every accumulator stays below 2**24.
It is differentiable but for the rounding, which is what a reconstruction trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from narrows.errors import PlanError, PlanUsageError
from narrows.ir.integer.codes import WeightCodes
from narrows.ir.integer.grid import Grid, Levels, WeightGrid
from narrows.ir.integer.library import weight_codes
from narrows.ir.meta import Meta, copy_meta, shape_of, where
from narrows.ir.ops.args import arguments, changed
from narrows.ir.ops.integer import IntegerForm, LayerWeights, Moves
from narrows.ir.program import Draft, Note, Program
from narrows.passes.base import Fidelity, Pass, PassResult
from narrows.passes.plans.plan import fingerprint
from narrows.passes.quant.plan import QuantPlan, of_pass
from narrows.passes.quant.record import (
    Record,
    about,
    activation_codes,
    key,
    norm_weights,
)
from narrows.passes.quant.survey import Survey, survey

ops: Any = torch.ops.narrows

BIAS_LOW, BIAS_HIGH = -(2**31), 2**31 - 1


@dataclass(frozen=True)
class Quantize(Pass):
    """Rounds activations, weights and biases to the grids of a plan.

    Attributes:
        plan: The plan, or the path of a saved one.
    """

    name: ClassVar[str] = "quantize"
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY

    plan: QuantPlan | str | None = None

    def run(self, program: Program) -> PassResult:
        """Return the fake-quantized program.

        Raises:
            PassError: There is no plan.
            PlanError: The plan is of another program.
        """
        plan = of_pass(self.name, self.plan)
        result = program.copy()
        found = survey(result, floats=plan.floats)
        _check(plan, program, found)
        _Inserter(result, plan, found).run()
        notes = tuple(
            Note(name, "float", f"stays floating-point: {reason}", 0, _source(result, name))
            for name, reason in plan.floats.items()
        )
        return PassResult(result, True, (*plan.notes, *notes))


def _source(program: Program, name: str) -> str:
    return next((Meta(n).source for n in program.graph.nodes if n.name == name), "")


def _check(plan: QuantPlan, program: Program, found: Survey) -> None:
    """Raise `PlanError` unless the plan has a grid for every site and every weight."""
    hint = "calibrate this program with narrows.quantize; QuantPlan.follow fits a pruned one"
    if plan.fingerprint and plan.fingerprint != fingerprint(program):
        what = "the plan is of another program"
        raise PlanUsageError(what, why="the fingerprints differ", hint=hint)
    for node in found.sites:
        if node.name not in plan.activations:
            raise PlanError("the plan has no grid for a tensor", where=where(node), hint=hint)
    for name in plan.levels:
        if name not in plan.activations:
            raise PlanError(f"the plan has levels for {name!r}, which has no grid", hint=hint)
    for node, reason in found.narrow().items():
        if plan.activations[node.name].wide:
            bits = plan.activations[node.name].bits
            raise PlanError(f"{node.name} cannot have {bits} bits", where=where(node), why=reason)
    for node in found.layers():
        layer = found.forms[node].weights(node)
        assert layer is not None
        name = str(layer.weight.target)
        grid = plan.weights.get(name)
        width = program.weights[name].shape[layer.axis]
        if grid is None or grid.axis != layer.axis or len(grid.exponents) not in (1, width):
            raise PlanError(f"the plan has no grid for {name!r}", where=where(node), hint=hint)
        if len(plan.offsets.get(name, ())) not in (0, width):
            why = f"it has {width} channels, the plan {len(plan.offsets[name])} offsets for them"
            raise PlanError(
                f"the plan does not fit {name!r}", where=where(node), why=why, hint=hint
            )
        if name in plan.codes:
            _check_codes(plan.codes[name], grid, program.weights[name].detach(), name, node)


def _check_codes(
    codes: WeightCodes, grid: WeightGrid, weight: torch.Tensor, name: str, node: fx.Node
) -> None:
    """Raise `PlanError` unless every code is one of the two next to its weight, or an end."""
    fits = codes.shape == tuple(weight.shape)
    if fits:
        steps = (weight.cpu().double() * _scale(grid, weight)).clamp(-grid.high, grid.high)
        held = codes.tensor().double()
        # A hundredth: a weight may have been folded anew, on another machine.
        fits = bool(((held - steps).abs() <= 1.01).all() & (held.abs() <= grid.high).all())
    if not fits:
        raise PlanError(
            f"the plan's codes of {name!r} are of other weights",
            where=where(node),
            why="a reconstruction rounds every weight to one of the two codes next to it",
            hint="quantize this checkpoint with narrows.quantize(..., method='rapq')",
        )


def _scale(grid: WeightGrid, weight: torch.Tensor) -> torch.Tensor:
    """Return steps per unit, which broadcast over a weight."""
    shape = [-1 if a == grid.axis else 1 for a in range(weight.dim())]
    return torch.exp2(torch.tensor(grid.exponents, dtype=torch.float64)).reshape(shape)


def _other(what: str, node: fx.Node) -> PlanError:
    """Return the error for a record of another checkpoint."""
    return PlanError(
        f"the plan's {what} are of other weights",
        where=where(node),
        why="a plan keeps what rounding made of one checkpoint, and the numbers here are further "
        "from those than another order of operations or another precision takes them",
        hint="quantize this checkpoint with narrows.quantize, or use plan.bare(), the grids alone",
    )


class _Inserter:
    """Puts the rounding nodes of a plan into a draft."""

    def __init__(self, program: Draft, plan: QuantPlan, found: Survey) -> None:
        self.program, self.plan, self.found = program, plan, found
        self.record = Record() if plan.record is None else plan.record
        self.graph = program.graph
        self.grids: dict[fx.Node, Grid] = {}  # of every node on codes, before nodes are put between
        self.weights: dict[tuple[fx.Node, WeightGrid], fx.Node] = {}

    def run(self) -> None:
        self._spread_grids()
        self._norms()
        self._tables()
        for node, form in self.found.forms.items():
            layer = form.weights(node)
            if layer is not None:
                self._layer(node, form, layer)
            if layer is not None or form.kind not in ("computes", "moves"):
                continue
            grids = [self.grids[n] for n in form.operands(node)]
            moved = form.kind == "moves"
            out = grids[0] if moved else self.plan.activations[self.found.tail(node).name]
            fake = form.fake(node, grids, out, self.plan.rounding)
            if fake is not None:
                node.target, node.args, node.kwargs = fake[0], fake[1], {}
        for site in self.found.sites:
            self._site(site)

    def _spread_grids(self) -> None:
        """Note on which grid every node's codes lie."""
        for node in self.graph.nodes:
            form = self.found.forms.get(node)
            if node.name in self.plan.levels:
                self.grids[node] = self.plan.levels[node.name].grid
            elif node.name in self.plan.activations:
                self.grids[node] = self.plan.activations[node.name]
            elif isinstance(form, Moves):
                self.grids[node] = form.regrid(node, self.grids[form.operands(node)[0]])

    def _norms(self) -> None:
        """Put the numbers that norms compute with to those of the record."""
        for name in norm_weights(self.found):
            if name not in self.record.norms:
                continue
            held, made = self.record.norms[name].tensor(), self.program.weights[name].detach()
            if not about(held, made):
                raise _other(f"numbers of {name!r}", self.program.users_of(name)[0])
            if not torch.equal(held, made.cpu().float()):
                self.program.weights[name] = held.to(made.device, made.dtype)

    def _tables(self) -> None:
        """Leave the tables of the record with their nodes, where ``fold-shifts`` looks for them."""
        for node, form in self.found.forms.items():
            kept = self.record.tables.get(node.name)
            if kept is None:
                continue
            grids = [self.grids[n] for n in form.operands(node)]
            out = self.plan.activations[self.found.tail(node).name]
            if kept.on == key(*grids, out):  # of other grids it is another table
                Meta(node).table = kept.codes.tensor()

    def _site(self, site: fx.Node) -> None:
        """Round a tensor; what stays floating-point reads an entry unrounded."""
        grid = self.plan.activations[site.name]
        entry = site in self.found.entries
        readers = [
            u for u in site.users
            if not entry or (u in self.found.forms and site in self.found.forms[u].operands(u))
        ]  # fmt: skip
        # A float becomes a code by the rounding of IEEE 754; the flag is about shifts.
        how: dict[str, Any] = {"entry": True} if entry else {"rounding": self.plan.rounding}
        source = self._entry(site, grid, readers) if site.op == "get_attr" else site
        with self.graph.inserting_after(source):
            rounded = self.graph.create_node(
                "call_function",
                ops.fake_quantize.default,
                (source, grid.exponent, grid.zero, grid.low, grid.high),
                how,
                name=f"{site.name}_q",
            )
        _describe(rounded, site)
        if site.name in self.plan.levels:
            rounded = self._levels(site, rounded, grid, self.plan.levels[site.name])
        for reader in readers:
            reader.replace_input_with(site, rounded)

    def _entry(self, site: fx.Node, grid: Grid, readers: list[fx.Node]) -> fx.Node:
        """Return a weight that is read as an activation, with the codes of the record."""
        kept = self.record.activations.get(site.name)
        if kept is None or kept.on != key(grid):
            return site
        tensor = self.program.tensor(site).detach()
        codes = kept.codes.codes(tensor.double() * 2.0**grid.exponent + grid.zero, grid.codes)
        if codes is None:
            raise _other(f"codes of {str(site.target)!r}", site)
        if torch.equal(codes, activation_codes(tensor, grid)):
            return site
        numbers = (codes - grid.zero).double() * grid.scale
        return self._put(site, numbers, set(readers))

    def _put(self, source: fx.Node, numbers: torch.Tensor, readers: set[fx.Node]) -> fx.Node:
        """Return a weight with other numbers: itself, if nothing else reads it."""
        name, tensor = str(source.target), self.program.tensor(source)
        moved = numbers.to(tensor.device, tensor.dtype)
        if set(self.program.users_of(name)) <= readers:
            self.program.weights[name] = moved
            return source
        return self._attribute(source, f"{name}_codes", moved)  # it is read unrounded, too

    def _levels(self, site: fx.Node, rounded: fx.Node, own: Grid, levels: Levels) -> fx.Node:
        """Return the levels that the codes of a tensor become: a table of them, once folded."""
        grid, made = levels.grid, rounded
        calls = (
            (ops.staircase.default, levels.arguments(own), f"{site.name}_levels"),
            (ops.fake_quantize.default, (grid.exponent, grid.zero, grid.low, grid.high),
             f"{site.name}_levels_q"),
        )  # fmt: skip
        for target, args, name in calls:
            with self.graph.inserting_after(made):
                made = self.graph.create_node("call_function", target, (made, *args), name=name)
            _describe(made, site)
        return made

    def _layer(self, node: fx.Node, form: IntegerForm, layer: LayerWeights) -> None:
        """Round the weight and the bias of a layer."""
        grid = self.plan.weights[str(layer.weight.target)]
        x = self.grids[form.operands(node)[0]]
        roles = {n: role for role, n in arguments(node).items() if isinstance(n, fx.Node)}
        changes: dict[str, Any] = {roles[layer.weight]: self._weight(layer.weight, grid)}
        exponents = [x.exponent + e for e in grid.exponents]
        offsets = self.plan.offsets.get(str(layer.weight.target))
        bias = layer.bias
        if bias is None and offsets is not None and any(offsets):
            bias = self._new_bias(node, layer)
        if bias is not None:
            role = roles.get(bias, "bias")
            changes[role] = self._bias(node, bias, exponents, offsets)
        node.args, node.kwargs = changed(node, changes)

    def _weight(self, weight: fx.Node, grid: WeightGrid) -> fx.Node:
        key = (weight, grid)
        if key not in self.weights:
            source = self._chosen(weight, grid)
            self.weights[key] = self._rounded(source, (source, *grid.arguments))
        return self.weights[key]

    def _chosen(self, weight: fx.Node, grid: WeightGrid) -> fx.Node:
        """Return a weight that plain rounding takes to the codes of the plan."""
        name, tensor = str(weight.target), self.program.tensor(weight).detach()
        kept = self.record.weights.get(name)
        codes = self.plan.codes[name].tensor() if name in self.plan.codes else None
        if codes is None and kept is not None and kept.on == key(grid):
            codes = kept.codes.codes(tensor.cpu().double() * _scale(grid, tensor), grid.codes)
            if codes is None:
                raise _other(f"codes of {name!r}", next(iter(weight.users)))
            if torch.equal(codes, weight_codes(tensor.cpu(), *grid.arguments)):
                return weight
        if codes is None:
            return weight
        layers = {n for n in self.found.layers() if self._weight_of(n) == name}
        return self._put(weight, codes.double() / _scale(grid, tensor), layers)

    def _weight_of(self, node: fx.Node) -> str:
        layer = self.found.forms[node].weights(node)
        return "" if layer is None else str(layer.weight.target)

    def _bias(
        self, node: fx.Node, bias: fx.Node, exponents: list[int], offsets: tuple[int, ...] | None
    ) -> fx.Node:
        """Return a bias rounded: that of the record or else the program's, and its correction."""
        tensor = self.program.tensor(bias).detach()
        steps = torch.tensor([2.0**-e for e in exponents], dtype=torch.float64)
        numbers = self._recorded(node, tensor, steps)
        if offsets is not None and any(offsets):
            numbers = numbers + torch.tensor(offsets, dtype=torch.float64) * steps
        codes = (numbers / steps).round()
        moved = numbers.to(tensor.device, tensor.dtype)
        if len(bias.users) > 1:
            bias = self._attribute(node, f"{bias.target}_{node.name}", moved)
        elif not torch.equal(codes, (tensor.cpu().double() / steps).round()):
            self.program.weights[str(bias.target)] = moved
        return self._rounded(bias, (bias, exponents, 0, BIAS_LOW, BIAS_HIGH))

    def _recorded(self, node: fx.Node, tensor: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Return the bias of the record in whole steps, or the program's where there is none."""
        kept = self.record.biases.get(node.name)
        if kept is None:
            return tensor.cpu().double()
        held, result = kept.numbers(), self.plan.activations[self.found.tail(node).name]
        if not about(held, tensor, (2 * steps).clamp(min=result.scale)):
            raise _other(f"bias codes of {node.name}", node)
        return (held / steps).round() * steps  # on other grids it has other steps

    def _new_bias(self, node: fx.Node, layer: LayerWeights) -> fx.Node:
        weight = self.program.tensor(layer.weight)
        name = str(layer.weight.target).removesuffix("weight") + "bias"
        return self._attribute(node, name, weight.new_zeros(weight.shape[layer.axis]))

    def _attribute(self, node: fx.Node, name: str, tensor: torch.Tensor) -> fx.Node:
        taken, base, count = {*self.program.weights, *self.program.aliases}, name, 1
        while name in taken:
            name, count = f"{base}_{count}", count + 1
        self.program.weights[name] = tensor
        with self.graph.inserting_before(node):
            made = self.graph.get_attr(name)
        copy_meta(node, made)
        Meta(made).dynamic = ()
        Meta(made).shape, Meta(made).dtype = tuple(tensor.shape), tensor.dtype
        return made

    def _rounded(self, source: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        with self.graph.inserting_after(source):
            made = self.graph.create_node(
                "call_function", ops.fake_quantize_weight.default, args, {}, f"{source.name}_q"
            )
        _describe(made, source)
        return made


def _describe(node: fx.Node, source: fx.Node) -> None:
    copy_meta(source, node)
    Meta(node).shape, Meta(node).dtype = shape_of(source), Meta(source).dtype


__all__ = ["Quantize"]
