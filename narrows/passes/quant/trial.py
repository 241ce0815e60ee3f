"""`Trial`: a fake-quantized program whose grids and rounding are still open, run block by block.

It runs the graph that the pass ``quantize`` makes, node for node, in one of three ways:

* ``float``: nothing is rounded; what every block is held to;
* ``hard``: everything is, as the fake-quantized program does it;
* ``soft``: weights are rounded by numbers that are being learned, activations straight through,
  each of them dropped at random, that is, left unrounded (QDrop, Wei et al., ICLR 2022).

A scale is kept as the step between two codes, a float; a power of two is one exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

import narrows.ir.integer.library  # noqa: F401  (defines torch.ops.narrows)
from narrows.ir.integer.grid import Grid, Levels
from narrows.ir.integer.rounding import round_float
from narrows.ir.integer.statistics import PLAIN
from narrows.ir.ops import table
from narrows.ir.ops.args import arguments, with_argument
from narrows.ir.ops.integer import Moves
from narrows.ir.program import Program
from narrows.passes.quant.calibrate import finest
from narrows.passes.quant.plan import QuantPlan
from narrows.passes.quant.quantize import Quantize
from narrows.passes.quant.survey import Survey

ops: Any = torch.ops.narrows
LOW, HIGH = -0.1, 1.1  # AdaRound's stretched sigmoid; its ends are reached


@dataclass(eq=False)
class Site:
    """The open grid of an activation.

    Attributes:
        name: Of the node that is rounded, as in `QuantPlan.activations`.
        node: The node that rounds it.
        step: Between two codes.
        low: The smallest number of steps, 0 or negative.
        high: The largest one.
        levels: Where the steps are not equally wide: the grid of the codes between whose
            thresholds they lie, and the levels.
    """

    name: str
    node: fx.Node
    step: float
    low: int
    high: int
    levels: tuple[Grid, Levels] | None = None


@dataclass(eq=False)
class Kernel:
    """The open grid of a layer's weight, and what is learned of the layer.

    Attributes:
        name: Of the weight.
        layer: The node that sums against it.
        weight: The floating-point weight.
        axis: Of the output channels.
        high: The largest code; the smallest is its negative.
        steps: Between two codes, one per output channel or one for all, ready to broadcast.
        finest: The finest steps that the layer's accumulator has room for.
        x: The site of the layer's input.
        bias: The floating-point bias, or ``None``.
        unit: Per output channel, what a step of the bias is over the product of the two steps.
        codes: The codes, where they were learned.
        shift: What was learned to be added to the bias.
        alpha: While they are learned, the rounding of every weight before the sigmoid.
    """

    name: str
    layer: fx.Node
    weight: Tensor
    axis: int
    high: int
    steps: Tensor
    finest: Tensor
    x: Site | None = None
    bias: Tensor | None = None
    unit: Tensor | None = None
    codes: Tensor | None = None
    shift: Tensor | None = None
    alpha: Tensor | None = None

    def nearest(self) -> Tensor:
        """Return the codes of plain rounding."""
        return (self.weight / self.steps).round().clamp(-self.high, self.high)

    def hard(self) -> Tensor:
        """Return the rounded weight."""
        return (self.nearest() if self.codes is None else self.codes) * self.steps

    def rounding(self) -> Tensor:
        """Return how far every weight is rounded up, from 0 to 1."""
        assert self.alpha is not None
        return (torch.sigmoid(self.alpha) * (HIGH - LOW) + LOW).clamp(0, 1)

    def soft(self) -> Tensor:
        """Return the weight as its rounding is at present."""
        if self.alpha is None:
            return self.hard()
        low = (self.weight / self.steps).floor()
        return (low + self.rounding()).clamp(-self.high, self.high) * self.steps

    def open(self) -> None:
        """Begin to learn the rounding: from what the weight is, between two codes."""
        steps = self.weight / self.steps
        part = (steps - steps.floor()).clamp(0.01, 0.99)
        # The inverse of `rounding`.
        self.alpha = -torch.log((HIGH - LOW) / (part - LOW) - 1)

    def settle(self) -> None:
        """Take the side that every weight is closer to."""
        low = (self.weight / self.steps).floor()
        self.codes = (low + (self.rounding() >= 0.5)).clamp(-self.high, self.high).detach()
        self.alpha = None
        self.shift = None if self.shift is None else self.shift.detach()

    def bias_steps(self) -> Tensor:
        """Return the steps of the bias: those of the accumulator."""
        assert self.unit is not None
        assert self.x is not None
        return self.steps.flatten() * self.unit * self.x.step

    def rounded_bias(self) -> Tensor:
        """Return the bias on the steps of the accumulator; gradients pass straight through."""
        assert self.bias is not None
        bias = self.bias if self.shift is None else self.bias + self.shift
        steps = self.bias_steps()
        made = (bias.detach() / steps).round() * steps
        return made + (bias - bias.detach())


@dataclass(eq=False)
class Span:
    """The part of the graph between some values and one value.

    Attributes:
        nodes: What to run, in execution order.
        reads: The values it starts from: tensors that were computed before.
        exit: What it ends in.
    """

    nodes: list[fx.Node]
    reads: list[fx.Node]
    exit: fx.Node


@dataclass(eq=False)
class Drop:
    """Which activations are left unrounded: each element of each with a probability."""

    share: float
    generator: torch.Generator

    def mask(self, like: Tensor) -> Tensor:
        """Return one where an element of a tensor is left as it is, and zero elsewhere."""
        # A byte of chance an element: eight times as fast as a float of it.
        words = torch.empty(-(-like.numel() // 8), dtype=torch.int64, device=like.device)
        chance = words.random_(-(2**63), None, generator=self.generator).view(torch.uint8)
        left = chance[: like.numel()].reshape(like.shape) < round(256 * self.share)
        return left.to(like.dtype)


class _Through(torch.autograd.Function):
    """Rounds and clips, but for dropped elements; gradients pass where nothing was clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, site: Site, rounding: str, dropped: Tensor) -> Tensor:
        steps = x / site.step
        clipped = steps.clamp(site.low - 0.5, site.high + 0.5)
        ctx.save_for_backward((clipped == steps).to(x.dtype).maximum(dropped))
        made = round_float(clipped, rounding).clamp_(site.low, site.high).mul_(site.step)
        return torch.lerp(made, x, dropped)  # not where, which takes ten times as long

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.saved_tensors[0], None, None, None


@dataclass(eq=False)
class Trial:
    """The graph, the open grids, and how it is run; see the module's text.

    Args:
        prepared: The prepared program.
        plan: The grids to begin with. Its offsets and codes are part of the biases and weights, in
            ``float``, too.
        found: The survey of ``prepared``.
        device: Where to run.
    """

    prepared: Program
    plan: QuantPlan
    found: Survey
    device: torch.device
    graph: fx.Graph = field(init=False)
    sites: dict[fx.Node, Site] = field(init=False, default_factory=dict)
    kernels: dict[fx.Node, Kernel] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        fake = Quantize(self.plan).run(self.prepared).program
        self.graph, self.rounding = fake.graph, self.plan.rounding
        self.weights = {n: t.detach().to(self.device) for n, t in fake.weights.items()}
        self.order = {n: i for i, n in enumerate(fake.graph.nodes)}
        self.named = {n.name: n for n in fake.graph.nodes}
        self.output = fake.output
        for node in fake.graph.nodes:
            if node.target is ops.fake_quantize.default:
                given = arguments(node)
                zero = given["zero"]
                source = given["x"].name
                self.sites[node] = Site(
                    source, node, 2.0 ** -given["exponent"], given["low"] - zero,
                    given["high"] - zero,
                )  # fmt: skip
        self._static: dict[fx.Node, Any] = {}
        self._find_kernels(fake)
        self._find_static(fake)

    def _find_kernels(self, fake: Program) -> None:
        self._weight_of: dict[fx.Node, Kernel] = {}
        self._bias_of: dict[fx.Node, Kernel] = {}
        shared: dict[str, Kernel] = {}
        for old in self.found.layers():
            layer = self.named[old.name]
            form = table.integer_form(layer)
            given = form.weights(layer) if form is not None else None
            assert form is not None
            assert given is not None
            rounded = arguments(given.weight)
            name = str(rounded["x"].target)
            tensor = self.weights[name]
            steps = _steps(rounded["exponents"], rounded["axis"], tensor)
            count = steps.numel()
            limits = finest(self.prepared, self.found, old, self.plan.activations, count)
            finest_steps = _steps(limits, rounded["axis"], tensor)
            kernel = Kernel(
                name, layer, tensor, rounded["axis"], rounded["high"], steps, finest_steps
            )
            if name in shared:  # one weight, one rounding
                kernel = shared[name]
            shared[name] = self.kernels[layer] = self._weight_of[given.weight] = kernel
            operand = self.rounded_at(form.operands(layer)[0])
            if given.bias is None or operand is None:
                continue
            if kernel.bias is not None or kernel.layer is not layer:
                continue  # a bias of a shared weight is rounded as the plan says
            bias = arguments(given.bias)
            kernel.x, kernel.bias = self.sites[operand], self.weights[str(bias["x"].target)]
            made = _steps(bias["exponents"], 0, kernel.bias)
            kernel.unit = made / (kernel.steps.flatten() * kernel.x.step)
            self._bias_of[given.bias] = kernel

    def make_room(self, activations: Mapping[str, Grid]) -> None:
        """Coarsen the channels whose accumulators have no room beside these grids.

        Their steps had room beside the grids that there were when they were chosen. What they lose
        lies far below a step of the result, as in `narrows.passes.quant.calibrate.finest`.
        """
        for old in self.found.layers():
            kernel = self.kernels[self.named[old.name]]
            limits = finest(self.prepared, self.found, old, activations, kernel.steps.numel())
            steps = kernel.steps.maximum(_steps(limits, kernel.axis, kernel.weight))
            if kernel.codes is not None:
                kernel.codes = (kernel.codes * (kernel.steps / steps)).round()
            kernel.steps = steps

    def rounded_at(self, node: fx.Node) -> fx.Node | None:
        """Return the node at which a tensor that only moved since was rounded."""
        while node not in self.sites:
            form = table.integer_form(node) if node.op == "call_function" else None
            if not isinstance(form, Moves):
                return None
            node = form.operands(node)[0]
        return node

    def _find_static(self, fake: Program) -> None:
        """Compute what hangs on weights alone and is not rounded."""
        open_ = {*fake.placeholders, *self.sites, fake.output}
        for node in fake.graph.nodes:
            if node in open_ or node.target is ops.fake_quantize_weight.default:
                open_.add(node)
            elif node.op == "get_attr":
                self._static[node] = self.weights[str(node.target)]
            elif any(n in open_ for n in node.all_input_nodes):
                open_.add(node)
            else:
                args, kwargs = map_arg((node.args, node.kwargs), self._static.__getitem__)
                self._static[node] = self._plain(node, args, kwargs)

    # ------------------------------------------------------------------ spans

    def span(self, exit: fx.Node, known: Iterable[fx.Node]) -> Span:
        """Return what computes ``exit`` from values that are known.

        A tensor is known as it was before it is rounded; that is part of the span.
        """
        stops = set(known) - {exit}
        nodes = {exit} - self._static.keys()
        reads, waiting = set[fx.Node](), list(nodes)
        while waiting:
            for source in waiting.pop().all_input_nodes:
                if source in self._static or source in nodes:
                    continue
                if source in stops or source.op == "placeholder":
                    reads.add(source)
                    continue
                nodes.add(source)
                waiting.append(source)
        ordered = sorted(nodes, key=self.order.__getitem__)
        return Span(ordered, sorted(reads, key=self.order.__getitem__), exit)

    # ------------------------------------------------------------------ running

    def run(
        self,
        span: Span,
        values: Mapping[fx.Node, Any],
        how: str,
        drop: Drop | None = None,
        keep: dict[fx.Node, Any] | None = None,
    ) -> Any:
        """Return the value of a span's exit.

        Args:
            span: What to run.
            values: One per node it reads.
            how: ``float``, ``hard`` or ``soft``.
            drop: With ``soft``, what is left unrounded.
            keep: Takes in the values of the nodes that are its keys.
        """
        env: dict[fx.Node, Any] = dict(values)
        static = self._static

        def value(node: fx.Node) -> Any:
            return env[node] if node in env else static[node]

        for node in span.nodes:
            args, kwargs = map_arg((node.args, node.kwargs), value)
            env[node] = self._call(node, args, kwargs, how, drop)
            if keep is not None and node in keep:
                keep[node] = env[node]
        return value(span.exit)

    def _call(self, node: fx.Node, args: Any, kwargs: Any, how: str, drop: Drop | None) -> Any:
        if node.op == "output":
            return list(args[0])
        if node in self.sites:
            return args[0] if how == "float" else self._rounded(self.sites[node], args[0], drop)
        if node.target is ops.fake_quantize_weight.default:
            return args[0] if how == "float" else self._weight(node, args, how == "soft")
        if node.target in PLAIN:
            return self._statistic(node, args, how)
        return self._plain(node, args, kwargs)

    def _plain(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Run an operator as it is; one that makes tensors makes them where the others are."""
        target: Any = node.target
        args, kwargs = with_argument(target, args, kwargs, "device", self.device)
        return target(*args, **kwargs)

    def _rounded(self, site: Site, x: Tensor, drop: Drop | None) -> Tensor:
        entry = site.node.kwargs.get("entry", False)
        rounding = "half_even" if entry else self.rounding
        if site.levels is not None:
            own, levels = site.levels
            x = ops.fake_quantize.default(x, own.exponent, own.zero, own.low, own.high, rounding)
            return ops.staircase.default(x, *levels.arguments(own))
        if drop is None or not x.is_floating_point():
            steps = round_float(x / site.step, rounding).clamp_(site.low, site.high)
            return steps.mul_(site.step)
        return _Through.apply(x, site, rounding, drop.mask(x))  # type: ignore[return-value]

    def _weight(self, node: fx.Node, args: Any, soft: bool) -> Tensor:
        if node in self._weight_of:
            kernel = self._weight_of[node]
            return kernel.soft() if soft else kernel.hard()
        if node in self._bias_of:
            return self._bias_of[node].rounded_bias()
        return node.target(*args)  # type: ignore[operator]

    def _statistic(self, node: fx.Node, args: Any, how: str) -> Any:
        """Return a softmax or a norm, which is computed from codes."""
        at = list(arguments(node)).index("grid")
        plain = PLAIN[node.target](*args[:at])
        if how != "hard":
            return plain
        return self._exact(node, args, plain, at)

    def _exact(self, node: fx.Node, args: Any, plain: Tensor, at: int) -> Tensor:
        """Return what the operator gives on the grids as they are, if they are powers of two.

        Its arguments from ``at`` on are the grids of its operand and of its result.
        """
        ends = [u for u in self._tail(node).users if u in self.sites]
        if not ends:
            return plain
        stairs = self.sites[ends[0]].levels  # what is made lies before them
        grids = [
            self._grid(node.all_input_nodes[0]),
            self._grid(ends[0]) if stairs is None else stairs[0],
        ]
        if any(grid is None for grid in grids):
            return plain
        given = [[g.exponent, g.zero, g.low, g.high] for g in grids if g is not None]
        return node.target(*args[:at], *given, *args[at + 2 :])  # type: ignore[operator]

    def _grid(self, node: fx.Node) -> Grid | None:
        """Return the grid of a tensor, which may have moved since it was rounded, or been scaled by
        a power of two; ``None`` if its step is none."""
        if node in self.sites:
            site = self.sites[node]
            exponent, zero = exponent_of(site.step), arguments(node)["zero"]
            ends = (site.low + zero, site.high + zero)
            return None if exponent is None else Grid.read(exponent, zero, *ends)
        form = table.integer_form(node) if node.op == "call_function" else None
        if not isinstance(form, Moves):
            return None
        inner = self._grid(form.operands(node)[0])
        return None if inner is None else form.regrid(node, inner)

    def _tail(self, node: fx.Node) -> fx.Node:
        while len(node.users) == 1 and not any(u in self.sites for u in node.users):
            (node,) = node.users
        return node


def _steps(exponents: Sequence[int], axis: int, tensor: Tensor) -> Tensor:
    steps = torch.tensor([2.0**-e for e in exponents], dtype=tensor.dtype, device=tensor.device)
    return steps.reshape([-1 if a == axis else 1 for a in range(tensor.dim())])


def exponent_of(step: float) -> int | None:
    """Return ``e`` for a step of exactly ``2**-e``, else ``None``."""
    mantissa, power = math.frexp(step)
    return 1 - power if mantissa == 0.5 else None


__all__ = ["Drop", "Kernel", "Site", "Span", "Trial", "exponent_of"]
