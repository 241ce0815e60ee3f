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

import narrows.ir.integer.library  # noqa: F401  (defines torch.ops.narrows)
from narrows.errors import PassError, PlanError, PlanUsageError
from narrows.ir.integer.codes import WeightCodes
from narrows.ir.integer.grid import Grid, Levels, WeightGrid
from narrows.ir.ops.args import arguments, changed
from narrows.ir.ops.integer import IntegerForm, LayerWeights, Moves
from narrows.ir.program import Meta, Note, Program, copy_meta, shape_of, where
from narrows.passes.base import Fidelity, Pass, PassResult
from narrows.passes.plans.plan import fingerprint
from narrows.passes.quant.plan import QuantPlan
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
        if self.plan is None:
            raise PassError(
                "quantize has no plan", hint="narrows.quantize makes one from calibration data"
            )
        plan = QuantPlan.load(self.plan) if isinstance(self.plan, str) else self.plan
        result = program.copy()
        found = survey(result, plan.floats)
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
        shape = [-1 if a == grid.axis else 1 for a in range(weight.dim())]
        scale = torch.exp2(torch.tensor(grid.exponents, dtype=torch.float64)).reshape(shape)
        steps = (weight.cpu().double() * scale).clamp(-grid.high, grid.high)
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


class _Inserter:
    """Puts the rounding nodes of a plan into a program that the pass owns."""

    def __init__(self, program: Program, plan: QuantPlan, found: Survey) -> None:
        self.program, self.plan, self.found = program, plan, found
        self.graph = program.graph
        self.grids: dict[fx.Node, Grid] = {}  # of every node on codes, before nodes are put between
        self.weights: dict[tuple[fx.Node, WeightGrid], fx.Node] = {}

    def run(self) -> None:
        self._spread_grids()
        for node, form in self.found.forms.items():
            layer = form.weights(node)
            if layer is not None:
                self._layer(node, form, layer)
            if layer is not None or form.kind != "computes":
                continue
            out = self.plan.activations[self.found.tail(node).name]
            operands = form.operands(node)
            fake = form.fake(node, [self.grids[n] for n in operands], out, self.plan.rounding)
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
        with self.graph.inserting_after(site):
            rounded = self.graph.create_node(
                "call_function",
                ops.fake_quantize.default,
                (site, grid.exponent, grid.zero, grid.low, grid.high),
                how,
                name=f"{site.name}_q",
            )
        _describe(rounded, site)
        if site.name in self.plan.levels:
            rounded = self._levels(site, rounded, grid, self.plan.levels[site.name])
        for reader in readers:
            reader.replace_input_with(site, rounded)

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
        name = str(weight.target)
        codes = self.plan.codes.get(name)
        if codes is None:
            return weight
        tensor = self.program.tensor(weight)
        shape = [-1 if a == grid.axis else 1 for a in range(tensor.dim())]
        scale = torch.exp2(torch.tensor(grid.exponents, dtype=torch.float64)).reshape(shape)
        moved = (codes.tensor().double() / scale).to(tensor.device, tensor.dtype)
        layers = {n for n in self.found.layers() if self._weight_of(n) == name}
        if set(self.program.users_of(name)) <= layers:
            self.program.weights[name] = moved
            return weight
        return self._attribute(weight, f"{name}_codes", moved)  # it is read unrounded, too

    def _weight_of(self, node: fx.Node) -> str:
        layer = self.found.forms[node].weights(node)
        return "" if layer is None else str(layer.weight.target)

    def _bias(
        self, node: fx.Node, bias: fx.Node, exponents: list[int], offsets: tuple[int, ...] | None
    ) -> fx.Node:
        if offsets is not None and any(offsets):
            tensor = self.program.tensor(bias).detach()
            steps = torch.tensor([2.0**-e for e in exponents], dtype=torch.float64)
            moved = tensor.double() + torch.tensor(offsets, dtype=torch.float64) * steps
            if len(bias.users) > 1:
                bias = self._attribute(node, f"{bias.target}_{node.name}", moved.to(tensor.dtype))
            else:
                self.program.weights[str(bias.target)] = moved.to(tensor.dtype)
        return self._rounded(bias, (bias, exponents, 0, BIAS_LOW, BIAS_HIGH))

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
