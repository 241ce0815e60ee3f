"""`Record`: what a plan keeps of a checkpoint, so that the same integers come of it everywhere.

Grids say how a number becomes a code. The number itself hangs on how it was computed: folding a
norm in another order, on another processor or from a checkpoint of another precision moves it in
its last places, and now and then to the next code. So a plan keeps what rounding made of weights,
biases and tables. Numbers that are about the same give the same codes again, others are refused.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

import narrows.ir.integer.library  # noqa: F401  (defines torch.ops.narrows)
from narrows.files.reading import Exponent, fit
from narrows.ir.integer.codes import Numbers, Parities
from narrows.ir.integer.grid import Grid, WeightGrid
from narrows.ir.integer.library import weight_codes
from narrows.ir.meta import Meta
from narrows.ir.ops.args import arguments
from narrows.ir.program import Program
from narrows.passes.quant.survey import Survey

ops: Any = torch.ops.narrows

# How far apart two computations of one number may be, relative to it and to the largest of its
# tensor: that of bfloat16, a few times over.
RELATIVE, ABSOLUTE = 2.0**-6, 2.0**-10


@dataclass(frozen=True)
class Kept:
    """Something that holds on some grids alone.

    Attributes:
        on: The `key` of these grids.
        codes: What is kept.
    """

    on: str
    codes: Any


@dataclass(frozen=True)
class Bias:
    """The bias of a layer, without the correction in a plan's ``offsets``.

    Attributes:
        codes: Whole numbers.
        exponents: The exponent of each, or one for all: a step is ``2**-exponent``.
    """

    codes: Numbers
    exponents: tuple[int, ...]

    def numbers(self) -> Tensor:
        """Return what the codes stand for, in float64."""
        steps = torch.exp2(-torch.tensor(self.exponents, dtype=torch.float64))
        return self.codes.tensor().double() * steps


@dataclass(frozen=True)
class Record:
    """What rounding made of a checkpoint.

    Attributes:
        weights: Per weight of layers the `Parities` of its codes.
        activations: The same, per node, of a weight that is read as an activation.
        biases: Per layer its bias.
        tables: Per node the table of its function.
        norms: Per name the float32 numbers that a norm computes with.
    """

    weights: Mapping[str, Kept] = field(default_factory=dict)
    activations: Mapping[str, Kept] = field(default_factory=dict)
    biases: Mapping[str, Bias] = field(default_factory=dict)
    tables: Mapping[str, Kept] = field(default_factory=dict)
    norms: Mapping[str, Numbers] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""

        def listed(kept: Mapping[str, Kept]) -> dict[str, Any]:
            return {n: {"on": k.on, **k.codes.to_json()} for n, k in kept.items()}

        return {
            "weights": listed(self.weights),
            "activations": listed(self.activations),
            "biases": {
                n: {"exponents": list(b.exponents), **b.codes.to_json()}
                for n, b in self.biases.items()
            },
            "tables": listed(self.tables),
            "norms": {n: v.to_json() for n, v in self.norms.items()},
        }

    @staticmethod
    def from_json(data: Any) -> Record:
        """Return what `to_json` wrote; `ValueError`, `KeyError` or `TypeError` if it is damaged."""

        def read(what: str, kind: type[Parities] | type[Numbers]) -> dict[str, Kept]:
            return {str(n): Kept(str(k["on"]), kind.from_json(k)) for n, k in data[what].items()}

        return Record(
            read("weights", Parities),
            read("activations", Parities),
            {str(n): _bias(b) for n, b in data["biases"].items()},
            read("tables", Numbers),
            {str(n): Numbers.from_json(v) for n, v in data["norms"].items()},
        )


def _bias(data: Any) -> Bias:
    exponents = fit(data["exponents"], tuple[Exponent, ...])
    codes = Numbers.from_json(data)
    if len(exponents) not in (1, math.prod(codes.shape)):
        raise ValueError(f"{len(exponents)} exponents for a bias of the shape {list(codes.shape)}")
    return Bias(codes, exponents)


def key(*grids: Grid | WeightGrid) -> str:
    """Return a hash of grids."""
    facts = [
        (g.exponent, g.zero, g.bits, g.signed) if isinstance(g, Grid)
        else (g.exponents, g.bits, g.axis, g.terms)
        for g in grids
    ]  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def about(held: Tensor, made: Tensor, step: Tensor | float = 0.0) -> bool:
    """Whether numbers are those that were kept, computed another time.

    Args:
        held: What was kept.
        made: What is there now.
        step: A difference that is small in any case, as of rounding.
    """
    if held.shape != made.shape:
        return False
    made = made.detach().cpu().double()
    room = made.abs() * RELATIVE + made.abs().max() * ABSOLUTE + step if made.numel() else made
    return bool(((held.double() - made).abs() <= room).all())


# ------------------------------------------------------------------ making one


def record(plan: Any, found: Survey, fake: Program, integers: Program) -> Record:
    """Return the record of a program that was quantized by a plan.

    Args:
        plan: The plan; weights whose codes it holds need no record.
        found: The survey of the prepared program.
        fake: The fake-quantized program.
        integers: The integer program.
    """
    named = {n.name: n for n in fake.graph.nodes}
    weights: dict[str, Kept] = {}
    biases: dict[str, Bias] = {}
    for node in found.layers():
        layer, made = found.forms[node].weights(node), found.forms[node].weights(named[node.name])
        assert layer is not None
        assert made is not None
        name = str(layer.weight.target)
        if name not in plan.codes:
            grid = plan.weights[name]
            codes = _codes(fake, made.weight)
            weights[name] = Kept(key(grid), Parities.of(codes, grid.codes))
        if layer.bias is not None and made.bias is not None:
            codes = _codes(fake, made.bias) - torch.tensor(plan.offsets.get(name, 0))
            biases[node.name] = Bias(Numbers.of(codes), tuple(arguments(made.bias)["exponents"]))
    layers = {*weights, *plan.codes}
    norms = {n: Numbers.of(fake.weights[n].float()) for n in norm_weights(found) if n not in layers}
    return Record(weights, _entries(plan, found, fake), biases, _tables(named, integers), norms)


def norm_weights(found: Survey) -> list[str]:
    """Return the names of the floating-point numbers that integer operators compute with."""
    names: dict[str, None] = {}
    for node, form in found.forms.items():
        layer = form.weights(node)
        others = set() if layer is None else {layer.weight, layer.bias}
        for operand in node.all_input_nodes:
            coded = operand in others or operand in found.entries
            if operand.op == "get_attr" and not coded and Meta(operand).dtype.is_floating_point:
                names[str(operand.target)] = None
    return list(names)


def _codes(fake: Program, rounded: fx.Node) -> Tensor:
    args = arguments(rounded)
    call = (args["exponents"], args["axis"], args["low"], args["high"], args["levels"])
    return weight_codes(fake.tensor(args["x"]).detach().cpu(), *call)


def _entries(plan: Any, found: Survey, fake: Program) -> dict[str, Kept]:
    """Return what is kept of weights that are read as activations."""
    made: dict[str, Kept] = {}
    quantizers = [n for n in fake.graph.nodes if n.target is ops.fake_quantize.default]
    for site in found.entries:
        if site.op == "get_attr":
            grid = plan.activations[site.name]
            rounded = next(n for n in quantizers if n.all_input_nodes[0].name == site.name)
            codes = activation_codes(fake.tensor(rounded.all_input_nodes[0]), grid)
            made[site.name] = Kept(key(grid), Parities.of(codes, grid.codes))
    return made


def activation_codes(tensor: Tensor, grid: Grid) -> Tensor:
    """Return the int64 codes of a weight that is read as an activation."""
    call = (grid.exponent, grid.zero, grid.low, grid.high)
    return ops.quantize.default(tensor.detach().cpu(), *call, wide=grid.wide).to(torch.int64)


def _tables(named: Mapping[str, fx.Node], integers: Program) -> dict[str, Kept]:
    """Return the tables of functions; levels of unequal width stand in the plan themselves."""
    made: dict[str, Kept] = {}
    for node in integers.graph.nodes:
        ours = getattr(node.target, "namespace", "") == "narrows"
        table = arguments(node).get("table") if ours else None
        stairs = node.name not in named or named[node.name].target is ops.staircase.default
        if not isinstance(table, fx.Node) or table.op != "get_attr" or stairs:
            continue
        grids = (Meta(arguments(node)["x"]).grid, Meta(node).grid)
        made[node.name] = Kept(key(*grids), Numbers.of(integers.tensor(table)))
    return made


__all__ = ["Bias", "Kept", "Record", "about", "activation_codes", "key", "norm_weights",
           "record"]  # fmt: skip
