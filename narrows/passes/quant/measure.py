"""Measures what quantization costs, on data: `measure` makes a `QuantReport`.

*Tensor by tensor*: the float and the quantized program run side by side, so that no more is held
than what each still needs. A tensor of the float program is put on its grid, which tells what its
quantizer does alone, and compared with that of the quantized program.

*Culprits*: one quantizer after the other hands on what it reads, with all others at work. A run for
each branches off where that quantizer is, as nothing changes before it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from narrows.errors import PassError, UsageError
from narrows.ir.graph import Run
from narrows.ir.integer.grid import Grid
from narrows.ir.integer.library import weight_codes
from narrows.ir.meta import Meta, where
from narrows.ir.ops.args import arguments
from narrows.ir.ops.integer_forms import Concat
from narrows.ir.program import Program
from narrows.passes.quant.batches import batches
from narrows.passes.quant.figures import Measured, Part
from narrows.passes.quant.parts import joined_axis, joined_widths
from narrows.passes.quant.plan import QuantPlan
from narrows.passes.quant.report import QuantReport
from narrows.passes.quant.scale_parts import unscaled
from narrows.passes.quant.survey import Survey, survey

ops: Any = torch.ops.narrows

SAMPLES = 32  # on how many samples quantizers are switched off, unless told otherwise


def measure(
    prepared: Program,
    fake: Program,
    integers: Program,
    plan: QuantPlan,
    data: Iterable[Any],
    samples: int = SAMPLES,
) -> QuantReport:
    """Return the report of a quantized program; `Quantized.report` tells of the arguments."""
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 0:
        raise UsageError(f"samples counts from 0, got {samples!r}")
    side_by_side = _SideBySide(prepared, fake, plan)
    kept: list[list[Any]] = []
    count = held = 0
    with torch.no_grad():
        for flat in batches(prepared, data, "measuring"):
            side_by_side.add(flat)
            count += _size(flat)
            if held < samples:
                kept.append(_first(prepared, flat, samples - held))
                held += _size(kept[-1])
        gains = _gains(fake, prepared, plan, kept) if kept else {}
    tensors = (replace(t, gain=gains.get((t.kind, t.name))) for t in side_by_side.measured())
    return QuantReport(
        prepared.name, tuple(tensors), side_by_side.outputs.sqnr(), islands(prepared, plan),
        _bytes(prepared), _bytes(integers), count, held, tuple(side_by_side.parts()),
    )  # fmt: skip


def islands(prepared: Program, plan: QuantPlan) -> dict[str, str]:
    """Return why nodes stay floating-point, with their source lines."""
    sources = {n.name: Meta(n).source for n in prepared.graph.nodes}
    return {
        name: f"{reason}  ({sources[name]})" if sources.get(name) else reason
        for name, reason in plan.floats.items()
    }


def _size(flat: Sequence[Any]) -> int:
    return next((len(x) for x in flat if isinstance(x, Tensor) and x.dim()), 1)


def _first(program: Program, flat: Sequence[Any], count: int) -> list[Any]:
    """Return the first samples of a batch, where the batch size is free; else all."""

    def cut(node: fx.Node, value: Any) -> Any:
        for axis in Meta(node).dynamic if isinstance(value, Tensor) else ():
            value = value.narrow(axis, 0, min(count, value.shape[axis]))
        return value

    return [cut(n, v) for n, v in zip(program.placeholders, flat, strict=True)]


def _bytes(program: Program) -> int:
    return sum(t.numel() * t.element_size() for t in program.weights.values())


def decibels(signal: float, noise: float) -> float:
    """Return a signal-to-noise ratio in dB; infinite without noise."""
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


# ------------------------------------------------------------------ tensor by tensor


@dataclass
class Tally:
    """Running sums over a tensor's values and their errors."""

    count: int = 0
    clipped: int = 0
    low: float = math.inf
    high: float = -math.inf
    signal: float = 0.0
    rounding: float = 0.0
    clipping: float = 0.0
    along: float | None = None

    def add(self, x: Tensor, quantized: Tensor, beyond: Tensor) -> None:
        """Take in numbers, what they become, and which of them lie beyond the grid."""
        error = (quantized - x).double().square()
        outside = float((error * beyond).sum())
        self.count += x.numel()
        self.clipped += int(beyond.sum())
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        self.signal += float(x.double().square().sum())
        self.clipping += outside
        self.rounding += float(error.sum()) - outside

    def measured(self, name: str, node: fx.Node, **grid: Any) -> Measured:
        """Return what the sums say."""
        count = max(self.count, 1)
        noise = max(self.rounding, 0.0) + self.clipping
        return Measured(
            name, **grid, low=self.low, high=self.high, rms=math.sqrt(self.signal / count),
            clipped=self.clipped / count, rounding=math.sqrt(max(self.rounding, 0.0) / count),
            clipping=math.sqrt(self.clipping / count), sqnr=decibels(self.signal, noise),
            along=None if self.along is None else decibels(self.signal, self.along),
            source=Meta(node).source,
        )  # fmt: skip


@dataclass
class _Outputs:
    """Signal and noise of every floating-point output."""

    sums: dict[int, list[float]] = field(default_factory=dict)

    def add(self, expected: Sequence[Any], got: Sequence[Any]) -> None:
        for i, (a, b) in enumerate(zip(expected, got, strict=True)):
            if not isinstance(a, Tensor) or not a.is_floating_point():
                continue
            pair = self.sums.setdefault(i, [0.0, 0.0])
            pair[0] += float(a.double().square().sum())
            pair[1] += float((b.double() - a.double()).square().sum())

    def sqnr(self) -> float:
        """Return one ratio; every output weighs the same, whatever its magnitude."""
        shares = [noise / signal if signal > 0 else noise for signal, noise in self.sums.values()]
        return decibels(1.0, sum(shares) / max(len(shares), 1))


@dataclass
class _Joined:
    """A concatenation, and the sums of each of its parts."""

    node: fx.Node
    axis: int
    widths: list[int]
    tallies: list[Tally]

    @staticmethod
    def of(node: fx.Node) -> _Joined:
        widths = joined_widths(node, arguments(node)["tensors"])
        return _Joined(node, joined_axis(node), widths, [Tally(along=0.0) for _ in widths])

    def add(self, x: Tensor, got: Tensor) -> None:
        """Take in a tensor and its quantized one."""
        pairs = zip(x.split(self.widths, self.axis), got.split(self.widths, self.axis), strict=True)
        for tally, (part, rounded) in zip(self.tallies, pairs, strict=True):
            tally.add(part, part, torch.zeros((), dtype=torch.bool))
            tally.along = (tally.along or 0.0) + float((rounded - part).double().square().sum())

    def measured(self) -> Iterator[Part]:
        """Yield what the sums say, in the numbers that the parts have before they are joined."""
        operands = zip(arguments(self.node)["tensors"], self.tallies, strict=True)
        for index, (operand, tally) in enumerate(operands):
            origin, factor = unscaled(operand)
            yield Part(
                self.node.name, f"{index} ({origin.name})", tally.low / factor, tally.high / factor,
                decibels(tally.signal, tally.along or 0.0), Meta(self.node).source,
            )  # fmt: skip


class _SideBySide:
    """Runs the float and the quantized program together, from tensor to tensor."""

    def __init__(self, prepared: Program, fake: Program, plan: QuantPlan) -> None:
        self.prepared, self.fake, self.plan = prepared, fake, plan
        self.found: Survey = survey(prepared, floats=plan.floats)
        self.tallies = {n: Tally() for n in self.found.sites}
        self.rounded = activation_quantizers(fake, plan)
        self.weights = weight_quantizers(fake, self.found)
        self.outputs = _Outputs()
        joins = [n for n, form in self.found.forms.items() if isinstance(form, Concat)]
        self.joins = {self.found.tail(n): _Joined.of(n) for n in joins}

    def add(self, flat: list[Any]) -> None:
        """Take in a batch."""
        exact, coarse = self.prepared.start(flat), self.fake.start(flat)
        for site, tally in self.tallies.items():
            rounding = self.rounded[site.name]
            x, got = exact.to(site), coarse.to(rounding[-1])
            if not x.numel():
                continue
            if not bool(x.isfinite().all()):
                raise PassError(
                    "the report's data gives NaN or infinity",
                    where=where(site),
                    hint="look for NaN in the data",
                )
            alone, beyond = _on_grid(x, self.plan.activations[site.name])
            for node in rounding[1:]:
                target: Any = node.target
                alone = target(alone, *node.args[1:])
            tally.add(x, alone, beyond)
            tally.along = (tally.along or 0.0) + float((got - x).double().square().sum())
            if site in self.joins:
                self.joins[site].add(x, got)
        self.outputs.add(exact.finish(), coarse.finish())

    def parts(self) -> Iterator[Part]:
        """Yield what is left of the parts of concatenations."""
        for joined in self.joins.values():
            yield from joined.measured()

    def measured(self) -> Iterator[Measured]:
        """Yield what was measured, a layer's weight before its result."""
        told: set[str] = set()
        for node in self.prepared.graph.nodes:
            form = self.found.forms.get(node)
            layer = None if form is None else form.weights(node)
            if layer is not None and str(layer.weight.target) not in told:
                name = str(layer.weight.target)
                told.add(name)
                yield self._weight(name, node, self.prepared.tensor(layer.weight).detach())
            if node in self.tallies:
                levels = self.plan.levels.get(node.name)
                on = self.plan.activations[node.name] if levels is None else levels.grid
                count = 0 if levels is None else len(levels.thresholds) + 1
                yield self.tallies[node].measured(
                    node.name, node, kind="activation", exponents=(on.exponent,), zero=on.zero,
                    bits=on.bits, signed=on.signed, levels=count,
                )  # fmt: skip

    def _weight(self, name: str, node: fx.Node, weight: Tensor) -> Measured:
        """Return what the quantizer of a layer's weight does."""
        grid, tally, rounded = self.plan.weights[name], Tally(), self.weights[name]
        target: Any = rounded.target
        source = self.fake.tensor(rounded.all_input_nodes[0]).detach()
        scale = torch.tensor([2.0**e for e in grid.exponents], dtype=torch.float64)
        codes = weight.double() * scale.reshape(
            [-1 if a == grid.axis else 1 for a in range(weight.dim())]
        )
        beyond = codes.abs() > grid.reach
        tally.add(weight.double(), target(source, *rounded.args[1:]).double(), beyond)
        return tally.measured(
            name, node, kind="weight", exponents=grid.exponents, zero=0, bits=grid.bits,
            terms=grid.terms,
        )  # fmt: skip


def activation_quantizers(fake: Program, plan: QuantPlan) -> dict[str, list[fx.Node]]:
    """Return what rounds every activation, by its name: a quantizer, and levels behind it."""
    found: dict[str, list[fx.Node]] = {}
    for node in fake.graph.nodes:
        if node.target is not ops.fake_quantize.default:
            continue
        name = node.all_input_nodes[0].name
        if name not in plan.activations:
            continue
        found[name] = [node]
        while name in plan.levels and len(found[name]) < 3:
            found[name] += found[name][-1].users
    return found


def weight_quantizers(fake: Program, found: Survey) -> dict[str, fx.Node]:
    """Return what rounds every weight in a quantized program, by the weight's name."""
    nodes = {n.name: n for n in fake.graph.nodes}
    quantizers: dict[str, fx.Node] = {}
    for node in found.layers():
        layer = found.forms[node].weights(node)
        assert layer is not None
        (role,) = (r for r, value in arguments(node).items() if value is layer.weight)
        quantizers.setdefault(str(layer.weight.target), arguments(nodes[node.name])[role])
    return quantizers


def _on_grid(x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return a tensor on a grid, and which of its values lie beyond."""
    call = (grid.exponent, grid.zero, grid.low, grid.high)
    codes = x * 2.0**grid.exponent + grid.zero
    beyond = (codes < grid.low - 0.5) | (codes > grid.high + 0.5)
    return ops.fake_quantize.default(x, *call), beyond


# ------------------------------------------------------------------ culprits


@dataclass
class Switch:
    """One quantizer, and what stands in for it when it is off.

    Attributes:
        key: Kind and name of the tensor.
        node: The quantizer.
        begin: The activation, behind which a run branches off; or the first node that computes with
            a weight, before which it does.
        given: For a weight: itself unrounded, and the rounded biases of the layers that read it, as
            they are without the correction of its mean error.
    """

    key: tuple[str, str]
    node: fx.Node
    begin: fx.Node
    given: dict[fx.Node, Tensor] = field(default_factory=dict)


def _gains(
    fake: Program, prepared: Program, plan: QuantPlan, kept: Sequence[list[Any]]
) -> dict[tuple[str, str], float]:
    """Return what the outputs gain without each quantizer, in dB.

    A weight without its rounding has no mean error, so its bias is then the uncorrected one. Where
    an operator computes on codes by itself, as softmax does, it still rounds what it reads.
    """
    switches = _switches(fake, prepared, plan)
    whole, apart = _Outputs(), {s.key: _Outputs() for s in switches}
    show, done, total = sys.stderr.isatty(), 0, len(switches) * len(kept)
    for flat in kept:
        expected = prepared.run_flat(flat)
        base = fake.start(flat)
        for switch in switches:
            apart[switch.key].add(expected, without(base, switch).finish())
            done += 1
            if show:
                text = f"\rswitching quantizers off: {done} of {total}"
                print(text, end="", file=sys.stderr, flush=True)
        whole.add(expected, base.finish())
    if show:
        print(file=sys.stderr)
    full = whole.sqnr()
    found = {key: outputs.sqnr() for key, outputs in apart.items()}
    return {key: 0.0 if sqnr == full else sqnr - full for key, sqnr in found.items()}


def without(base: Run, switch: Switch) -> Run:
    """Return a run without one quantizer, from where it makes a difference."""
    if not switch.given:
        return base.branch({switch.node: base.to(switch.begin)})
    base.before(switch.begin)
    return base.branch(switch.given)


def _switches(fake: Program, prepared: Program, plan: QuantPlan) -> list[Switch]:
    """Return the quantizers in the order in which their runs branch off."""
    order = {n: i for i, n in enumerate(fake.graph.nodes)}
    found = [(order[switch.begin], switch) for switch in activation_switches(fake, plan)]
    for name, node in weight_quantizers(fake, survey(prepared, floats=plan.floats)).items():
        reader = min(node.users, key=order.__getitem__)
        given = {node: prepared.weights[name], **_uncorrected(fake, plan, name, node)}
        found.append((order[reader] - 1, Switch(("weight", name), node, reader, given)))
    return [switch for _, switch in sorted(found, key=lambda pair: pair[0])]


def activation_switches(fake: Program, plan: QuantPlan) -> Iterator[Switch]:
    """Yield the quantizers of activations."""
    for name, rounding in activation_quantizers(fake, plan).items():
        yield Switch(("activation", name), rounding[-1], rounding[0].all_input_nodes[0])


def _uncorrected(
    fake: Program, plan: QuantPlan, name: str, weight: fx.Node
) -> dict[fx.Node, Tensor]:
    """Return the rounded biases of the layers that read a weight, without its correction."""
    offsets = plan.offsets.get(name)
    biases = {
        operand
        for layer in weight.users
        for operand in layer.all_input_nodes
        if operand.target is ops.fake_quantize_weight.default and operand is not weight
    }
    if offsets is None:
        return {}
    made: dict[fx.Node, Tensor] = {}
    for bias in biases:
        args: Mapping[str, Any] = arguments(bias)
        tensor = fake.tensor(args["x"])
        call = (args["exponents"], args["axis"], args["low"], args["high"])
        steps = torch.tensor([2.0**-e for e in args["exponents"]], dtype=torch.float64)
        codes = weight_codes(tensor, *call) - torch.tensor(offsets)
        made[bias] = (codes * steps).to(tensor.dtype)
    return made


__all__ = ["SAMPLES", "activation_switches", "islands", "measure", "without"]
