"""From a prepared program and data to a `QuantPlan`: observers, exponents, corrected biases.

Start at `calibrate`. The data is streamed once; what is kept of every tensor is a histogram
(`narrows.passes.quant.observe`), whatever the amount of data. Scales are powers of two, so a method
only chooses exponents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from narrows.errors import PassError, UsageError
from narrows.ir.integer.bounds import SHIFTS
from narrows.ir.integer.grid import BITS, EXPONENTS, Grid, WeightGrid, check_rounding
from narrows.ir.integer.library import weight_codes
from narrows.ir.ops.args import arguments
from narrows.ir.ops.integer import LayerWeights, Moves
from narrows.ir.ops.integer_forms import Matmul
from narrows.ir.program import Meta, Note, Program, shape_of, where
from narrows.passes.plans.plan import fingerprint
from narrows.passes.quant.batches import batches
from narrows.passes.quant.observe import Histogram
from narrows.passes.quant.plan import QuantPlan
from narrows.passes.quant.survey import Survey, matches, survey

BIAS_BITS = 23  # at most for a bias: the accumulator is then a float32 if the products' sum is
LEVEL_BITS = 5  # at most where levels are chosen: with more, their steps are a code or two
METHODS = ("mse", "minmax", "percentile", "rapq")

Bits = int | Mapping[str, int]
Codings = int | str | Mapping[str, int | str]


@dataclass(frozen=True)
class Settings:
    """How grids are chosen; see `narrows.quantize`.

    Attributes:
        weights: Bits of the weights, or ``pot4``, ``pot4x2`` for sums of one or two signed powers
            of two: one for all, or one per glob, the first match counts and ``*`` is for the rest.
        activations: Bits of the activations, likewise.
        method: ``mse``, ``minmax``, ``percentile`` or ``rapq``, which begins with ``mse``.
        percentile: The share of the magnitudes that ``percentile`` covers, in percent.
        first_last: At least this many bits for the first and the last layers and what they read,
            for the outputs, and for what no multiplication is saved by: a layer with one weight a
            channel, activations that are only added, averaged, gated or scaled channel by channel;
            ``None`` makes no exception of them.
        skip: Globs of what stays floating-point.
        rounding: ``half_even`` or ``half_up``.
        align: Whether tensors that are concatenated share one grid.
        equalize: Whether powers of two move between layers to balance channel ranges.
        correct_bias: Whether the mean error of every layer's weights is taken from its bias.
        strict: Whether an operator without an integer form is an error.
        levels: Whether activations of 5 bits and fewer may have levels of unequal width.
    """

    weights: Codings = 8
    activations: Bits = 8
    method: str = "mse"
    percentile: float = 99.99
    first_last: int | None = 8
    skip: tuple[str, ...] = ()
    rounding: str = "half_even"
    align: bool = True
    equalize: bool = False
    correct_bias: bool = True
    strict: bool = False
    levels: bool = False

    def __post_init__(self) -> None:
        check_rounding(self.rounding)
        if self.method not in METHODS:
            raise UsageError(f"method is {', '.join(METHODS)}, got {self.method!r}")
        if not isinstance(self.percentile, int | float) or not 0 < self.percentile <= 100:
            raise UsageError(f"percentile lies above 0 and up to 100, got {self.percentile!r}")
        for glob in self.skip:
            if not isinstance(glob, str):
                raise UsageError(f"skip takes globs, got {glob!r}", hint="skip=['head', 'norm*']")
        for what in ("weights", "activations"):
            given = getattr(self, what)
            for bits in given.values() if isinstance(given, Mapping) else (given,):
                if isinstance(bits, str) and what == "weights":
                    check_coding(bits)
                else:
                    check_bits(what, bits)
        if self.first_last is not None:
            check_bits("first_last", self.first_last)
        least = self.activations if isinstance(self.activations, int) else BITS[0]
        if self.levels and least > LEVEL_BITS:
            raise UsageError(
                f"levels of unequal width are for activations of {LEVEL_BITS} bits and fewer",
                why="their thresholds lie between codes of 8 bits",
                hint="activations=4",
            )
        codings = self.weights.values() if isinstance(self.weights, Mapping) else (self.weights,)
        named = [coding for coding in codings if isinstance(coding, str)]
        if named and self.method == "rapq":
            raise UsageError(
                f"rapq does not learn weights of the coding {named[0]!r}",
                why="it rounds to one of the two whole numbers next to a weight",
                hint="method='mse', or a number of bits",
            )


def check_bits(what: str, bits: Any) -> None:
    """Raise `UsageError` unless ``bits`` is a number of bits that codes can have."""
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in BITS:
        raise UsageError(
            f"{what} takes {BITS[0]} to {BITS[-1]} bits, got {bits!r}",
            why="codes are stored in 8 bits, and one bit holds no sign and magnitude",
            hint=f"{what}=8",
        )


def check_coding(coding: str) -> None:
    """Raise `UsageError` unless ``coding`` names powers of two."""
    try:
        WeightGrid.spelled(coding)
    except UsageError as error:
        raise UsageError(
            f"weights takes 2 to 8 bits, or pot2, pot3, pot4, got {coding!r}",
            why=error.why,
            hint="weights='pot4' for signed powers of two, 'pot4x2' for sums of two of them",
        ) from error


def calibrate(program: Program, data: Iterable[Any] | None, settings: Settings) -> QuantPlan:
    """Return the plan that calibration data and settings give.

    Args:
        program: A prepared program; see `narrows.quantize`.
        data: Inputs of the program: each item is a tuple of positional inputs, a dict of inputs by
            name, or one tensor.
        settings: How grids are chosen.

    Raises:
        UsageError: There is no data, or an item does not fit the program.
        PassError: A tensor holds NaN or infinity, an extreme range, or, with ``strict``, an
            operator has no integer form.
    """
    found = survey(program, settings.skip, strict=settings.strict)
    if not found.forms:
        raise PassError(
            f"nothing of {program.name} can be quantized",
            why="every operator stays floating-point",
            hint="print the report: it has a reason for each",
        )
    watch = Watch(program, found)
    count = watch.run(program, data)
    notes = list(watch.notes())
    activations = _activation_grids(found, watch, settings)
    weights = _weight_grids(program, found, activations, settings)
    offsets = {}
    if settings.correct_bias:
        offsets = _offsets(program, found, watch, activations, weights)
    import narrows

    return QuantPlan(
        activations=activations,
        weights=weights,
        offsets=offsets,
        floats={n.name: reason for n, reason in found.floats.items()},
        rounding=settings.rounding,
        fingerprint=fingerprint(program),
        narrows=narrows.__version__,
        notes=(
            *notes,
            Note(program.name, "calibrated", f"on {count:,} batches, {settings.method}"),
        ),
    )


# ------------------------------------------------------------------ watching


class Watch:
    """Histograms of every site, and the mean input of every layer, while a program runs."""

    def __init__(self, program: Program, found: Survey) -> None:
        self.found = found
        self.histograms = {n: Histogram() for n in found.sites}
        self.layers = {found.forms[n].operands(n)[0]: 0 for n in found.layers()}
        self.totals: dict[fx.Node, Tensor] = {}
        self.seen: dict[fx.Node, int] = {}
        self._observed = {*self.histograms, *self.layers}

    def run(self, program: Program, data: Iterable[Any] | None) -> int:
        """Run the program on all data; return how many batches there were."""
        count = 0
        for flat in batches(program, data, "calibrating"):
            with torch.no_grad():
                program.run_flat(flat, observe=self._observe)
            count += 1
        return count

    def _observe(self, node: fx.Node, value: Any) -> None:
        if node not in self._observed:
            return
        if node in self.histograms:
            self.histograms[node].add(value)
        if node in self.layers and value.dim() > 1:
            # Per channel of a convolution's input; the channels of a linear layer's come last.
            for axis in {1, value.dim() - 1}:
                other = [a for a in range(value.dim()) if a != axis]
                total = value.detach().double().sum(other)
                key = (node, axis)
                self.totals[key] = self.totals.get(key, 0) + total  # type: ignore[index]
                self.seen[key] = self.seen.get(key, 0) + value.numel() // total.numel()  # type: ignore

    def mean_input(self, node: fx.Node, axis: int) -> Tensor | None:
        """Return the mean of a layer's input per channel, in float64."""
        key: Any = (node, axis)
        return self.totals[key] / self.seen[key] if key in self.totals else None

    def notes(self) -> Iterable[Note]:
        """Yield what is odd about the data."""
        for node, histogram in self.histograms.items():
            if histogram.constant and node.op != "get_attr":
                text = f"it was {histogram.high + 0.0:g} throughout the calibration data"
                yield Note(node.name, "constant", text, 0, Meta(node).source)


# ------------------------------------------------------------------ grids


def _activation_grids(found: Survey, watch: Watch, settings: Settings) -> dict[str, Grid]:
    grids: dict[fx.Node, Grid] = {}
    outer, multiplied = _outer_sites(found), _multiplied(found, settings.align)
    _refuse_unmatched(settings.activations, "activations", watch.histograms)
    for node, histogram in watch.histograms.items():
        if not histogram.finite:
            raise PassError(
                "calibration met NaN or infinity",
                where=where(node),
                why="no grid holds them",
                hint="look for NaN in the calibration data and the weights; mask with a large "
                "negative number, not with -inf",
            )
        bits = _asked(node, settings.activations, "activations")
        if settings.first_last is not None and (node in outer or node not in multiplied):
            bits = max(bits, settings.first_last)
        try:
            grids[node] = histogram.grid(settings.method, bits, settings.percentile)
        except UsageError as error:
            raise PassError(
                f"the range of {node.name} cannot be quantized",
                where=where(node),
                why=f"it reaches from {histogram.low:g} to {histogram.high:g}; {error.why}",
                hint="scale the data, or skip the node",
            ) from error
    for group in found.shared_grids() if settings.align else ():
        # Only among their like: a range of one sign would lose half of its codes to the other.
        for zero in {grids[n].zero for n in group}:
            alike = [n for n in group if grids[n].zero == zero]
            coarsest = min(grids[n].exponent for n in alike)
            bits = max(grids[n].bits for n in alike)
            grids.update(dict.fromkeys(alike, Grid(coarsest, zero, bits)))
    return {n.name: g for n, g in grids.items()}


def _asked(node: fx.Node, asked: Codings, what: str) -> Any:
    """Return the bits, or the coding, that settings ask for at a node."""
    if not isinstance(asked, Mapping):
        return asked
    for glob, bits in asked.items():
        if matches(node, glob) or glob == "*":
            return bits
    raise UsageError(
        f"{what} says nothing of {node.name}", hint=f"{what}={{..., '*': 8}} is for the rest"
    )


def _refuse_unmatched(asked: Codings, what: str, nodes: Iterable[fx.Node]) -> None:
    """Raise `UsageError` for a glob that would have no effect."""
    for glob in asked if isinstance(asked, Mapping) else ():
        if glob != "*" and not any(matches(n, glob) for n in nodes):
            raise UsageError(
                f"{what} has bits for {glob!r}, which matches nothing that has {what}",
                hint="globs are held against node names, module paths and weight names, as in "
                "print(program); a layer and the ReLU behind it have one grid, the ReLU's",
            )


def _multiplied(found: Survey, align: bool) -> set[fx.Node]:
    """Return the sites whose codes are summed in products: with weights, or with each other.

    What is only added, averaged, gated, or scaled channel by channel is not among them: few bits
    would save no multiplication there. Nor is what the last layers read.
    """
    sites: set[fx.Node] = set()
    outer = _outer_layers(found)
    for node, form in found.forms.items():
        layer = form.weights(node)
        plain = layer is None or one_each(layer) or node in outer
        if plain and not isinstance(form, Matmul):
            continue
        for operand in form.operands(node):
            while operand not in found.entries and isinstance(found.forms[operand], Moves):
                operand = found.forms[operand].operands(operand)[0]
            sites.add(operand if operand in found.entries else found.tail(operand))
    for group in found.shared_grids() if align else ():
        if not sites.isdisjoint(group):
            sites.update(group)
    return sites


def one_each(layer: LayerWeights) -> bool:
    """Whether a layer has one weight per output channel, as a norm that became a layer has."""
    shape = shape_of(layer.weight)
    return math.prod(shape) == shape[layer.axis]


def _outer_sites(found: Survey) -> set[fx.Node]:
    """Return the sites that are inputs of the program, or outputs."""
    outer = {n for n in found.sites if n.op == "placeholder"}
    for node in found.sites:
        ends = [node]
        while ends:
            end = ends.pop()
            if any(u.op == "output" for u in end.users):
                outer.add(node)
                break
            ends += [u for u in end.users if u in found.forms and found.site(u) is node]
    return outer


def _outer_layers(found: Survey) -> set[fx.Node]:
    """Return the layers that read an input of the program, make an output, or have none behind."""
    outer = _outer_sites(found)
    layers = set(found.layers())
    before: set[fx.Node] = set()  # what leads to a layer
    for node in reversed(next(iter(layers)).graph.nodes) if layers else ():
        if any(u in layers or u in before for u in node.users):
            before.add(node)
    return {
        n
        for n in layers
        if found.site(found.forms[n].operands(n)[0]) in outer
        or found.tail(n) in outer
        or n not in before
    }


def _weight_grids(
    program: Program, found: Survey, activations: Mapping[str, Grid], settings: Settings
) -> dict[str, WeightGrid]:
    grids: dict[str, WeightGrid] = {}
    outer = _outer_layers(found)
    _refuse_unmatched(settings.weights, "weights", list(found.layers()))
    for node in found.layers():
        layer = found.forms[node].weights(node)
        assert layer is not None
        name = str(layer.weight.target)
        coding = _asked(node, settings.weights, "weights")
        if settings.first_last is not None and (node in outer or one_each(layer)):
            coding = _finer(coding, settings.first_last)
        if name in grids:
            coding = _finer(coding, grids[name].coding)
        grid = WeightGrid.spelled(coding, layer.axis)
        tensor = program.tensor(layer.weight).detach()
        if not bool(tensor.isfinite().all()):
            raise PassError(f"{name!r} holds NaN or infinity", where=where(node))
        exponents = weight_exponents(tensor, grid, settings.method)
        limits = finest(program, found, node, activations, len(exponents))
        if name in grids:
            limits = list(map(min, limits, grids[name].along(tuple(tensor.shape))))
        exponents = tuple(map(min, exponents, limits))
        if layer.groups > 1:
            exponents = (min(exponents),)
        grids[name] = replace(grid, exponents=exponents)
    return grids


def finest(
    program: Program, found: Survey, node: fx.Node, activations: Mapping[str, Grid], count: int
) -> list[int]:
    """Return per output channel the finest exponent that a layer's accumulator has room for.

    A channel whose weights are nothing beside its bias, or beside the step of the result, would
    else have steps so fine that the bias overflows, or that no shift brings it back. What it loses
    lies far below a step of the result.
    """
    layer = found.forms[node].weights(node)
    assert layer is not None
    x, y = _exponent(found, activations, found.forms[node].operands(node)[0]), found.tail(node)
    limits = [SHIFTS[-1] + activations[y.name].exponent - x] * count
    if layer.bias is not None:
        sizes = program.tensor(layer.bias).detach().double().abs()
        each = sizes if len(sizes) == count else sizes.amax().expand(count)
        room = [BIAS_BITS - math.frexp(size)[1] - x if size > 0 else limits[0] for size in each]
        limits = list(map(min, limits, room))
    return [max(limit, EXPONENTS[0]) for limit in limits]


def _exponent(found: Survey, activations: Mapping[str, Grid], node: fx.Node) -> int:
    """Return the exponent of the grid that a node's codes lie on."""
    if node.name in activations:
        return activations[node.name].exponent
    form = found.forms[node]
    if not isinstance(form, Moves):
        return activations[found.tail(node).name].exponent
    grid = Grid(_exponent(found, activations, form.operands(node)[0]))
    return form.regrid(node, grid).exponent


def _finer(one: int | str, other: int | str) -> int | str:
    """Return the coding of the larger number of bits; whole numbers before powers of two."""
    if one == other:
        return one
    return max(WeightGrid.spelled(c).bits if isinstance(c, str) else c for c in (one, other))


def weight_exponents(tensor: Tensor, grid: WeightGrid, method: str) -> tuple[int, ...]:
    """Return the exponent of every output channel of a weight.

    ``mse`` takes the one of the smallest squared error among the covering exponent and the two
    finer ones; the other methods cover every weight.

    Args:
        tensor: The weight.
        grid: Its codes and its axis; the exponents do not count.
        method: How they are chosen.
    """
    rows = tensor.double().movedim(grid.axis, 0).flatten(1)
    reach = rows.abs().amax(1)
    # A channel of zeros fits every grid; it takes the finest that the others have.
    covering = torch.floor(math.log2(grid.reach) - torch.log2(reach))
    alive = reach > 0
    spare = covering[alive].max() if bool(alive.any()) else torch.tensor(0.0)
    covering = torch.where(alive, covering, spare).clamp(EXPONENTS[0], EXPONENTS[-1] - 2).long()
    if method != "mse":
        return tuple(covering.tolist())
    best, least = covering, torch.full_like(reach, math.inf)
    for finer in range(3):
        exponents = covering + finer
        tried = replace(grid, exponents=tuple(exponents.tolist()), axis=0)
        codes = weight_codes(rows, *tried.arguments)
        error = ((codes / torch.exp2(exponents.double())[:, None] - rows) ** 2).sum(1)
        best = torch.where(error < least, exponents, best)
        least = torch.minimum(error, least)
    return tuple(best.tolist())


# ------------------------------------------------------------------ biases


def _offsets(
    program: Program,
    found: Survey,
    watch: Watch,
    activations: Mapping[str, Grid],
    weights: Mapping[str, WeightGrid],
) -> dict[str, tuple[int, ...]]:
    """Return per layer what takes the mean error of its rounded weights from its bias.

    With ``e = W_q - W`` the mean error of an output channel is the sum of ``e`` times the mean of
    what it multiplies, per input channel; padding is left out of account. In accumulator steps.
    """
    offsets: dict[str, tuple[int, ...]] = {}
    users: dict[str, int] = {}
    for node in found.layers():
        layer = found.forms[node].weights(node)
        assert layer is not None
        name = str(layer.weight.target)
        users[name] = users.get(name, 0) + 1
        operand = found.forms[node].operands(node)[0]
        site = found.site(operand)
        spatial = program.tensor(layer.weight).dim() > 2
        axis = 1 if spatial else len(shape_of(operand)) - 1
        mean = watch.mean_input(operand, axis)
        if layer.axis != 0 or site is None or mean is None:
            continue
        grid, tensor = weights[name], program.tensor(layer.weight).detach().double()
        exponents = grid.along(tuple(tensor.shape))
        codes = weight_codes(tensor, *grid.arguments)
        scale = torch.tensor([2.0**-e for e in exponents], dtype=torch.float64)
        error = codes * scale.reshape(-1, *[1] * (tensor.dim() - 1)) - tensor
        per_input = error.flatten(2).sum(2) if spatial else error
        groups = arguments(node).get("groups", 1)
        means = mean.reshape(groups, -1).repeat_interleave(len(per_input) // groups, 0)
        shift = (per_input * means).sum(1)
        steps = 2.0 ** activations[site.name].exponent / scale
        made = (-shift * steps).round().clamp(-(2**30), 2**30).long()
        offsets[name] = tuple(made.tolist())
    # A weight that several layers share has no one mean input.
    return {n: o for n, o in offsets.items() if users[n] == 1 and any(o)}


__all__ = ["METHODS", "Settings", "calibrate"]
