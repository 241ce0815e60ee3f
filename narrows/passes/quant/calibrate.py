"""From a prepared program and data to a `QuantPlan`: observers, exponents, corrected biases.

Start at `calibrate`. The data is streamed once; what is kept of every tensor is a histogram
(`narrows.passes.quant.observe`), whatever the amount of data. Scales are powers of two, so a method
only chooses exponents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from narrows.errors import PassError, UsageError
from narrows.ir.integer.bounds import SHIFTS
from narrows.ir.integer.grid import (
    BITS,
    EXPONENTS,
    WIDE_BITS,
    Grid,
    WeightGrid,
)
from narrows.ir.integer.library import weight_codes
from narrows.ir.meta import Meta, shape_of, where
from narrows.ir.ops.args import arguments
from narrows.ir.ops.integer import LayerWeights, Moves
from narrows.ir.ops.integer_forms import Matmul
from narrows.ir.program import Note, Program
from narrows.passes.plans.plan import fingerprint
from narrows.passes.quant.asked import asked_for, refuse_unmatched
from narrows.passes.quant.choose_parts import by_name, choose_parts, scaled
from narrows.passes.quant.lost_parts import notes_of_borders, notes_of_parts
from narrows.passes.quant.merges import merges
from narrows.passes.quant.options import FLOAT, Quantization
from narrows.passes.quant.parts import find_parts
from narrows.passes.quant.plan import QuantPlan
from narrows.passes.quant.survey import SCALE_PARTS, Survey, survey
from narrows.passes.quant.watch import Watch, summed_axis
from narrows.version import VERSION

BIAS_BITS = 23  # at most for a bias: the accumulator is then a float32 if the products' sum is
WIDE_BIAS_BITS = 30  # at most for one beside wide codes, whose steps are finer by as much


def calibrate(program: Program, data: Iterable[Any] | None, settings: Quantization) -> QuantPlan:
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
    return planned(look(program, data, settings), settings)


@dataclass(frozen=True)
class Seen:
    """What calibration saw of a program: enough for a plan by any method.

    Attributes:
        program: The prepared program.
        watch: The histograms.
        batches: How many batches there were.
    """

    program: Program
    watch: Watch
    batches: int


def look(
    program: Program,
    data: Iterable[Any] | None,
    settings: Quantization,
    hold_back: Callable[[list[Any]], list[Any] | None] | None = None,
) -> Seen:
    """Stream the data through a prepared program once; else as `calibrate`.

    Args:
        program: The program.
        data: Its inputs.
        settings: What stays floating-point.
        hold_back: Returns of a batch what is looked at, or ``None``.
    """
    found = _surveyed(program, settings)
    if not found.forms:
        raise PassError(
            f"nothing of {program.name} can be quantized",
            why="every operator stays floating-point",
            hint="print the report: it has a reason for each",
        )
    watch = Watch(found, find_parts(program, found), merges(program, found))
    return Seen(program, watch, watch.run(program, data, hold_back))


def planned(seen: Seen, settings: Quantization, wide: Collection[str] = frozenset()) -> QuantPlan:
    """Return the plan that settings make of what was seen; else as `calibrate`.

    Args:
        seen: What was seen.
        settings: How grids are chosen.
        wide: Names of tensors that have the most bits there are, whatever the settings ask for.
            They reach twice as far as what was seen: what others see of an outlier may be larger.
    """
    program, watch, found = seen.program, seen.watch, seen.watch.found
    floats = {n.name: reason for n, reason in found.floats.items()}
    notes = list(watch.notes())
    powers = choose_parts(program, watch, settings.method, settings.percentile, settings.weights)
    parts, whole = by_name(watch.parts, powers), watch
    if parts:
        program, watch = scaled(program, watch, powers)
        found = watch.found
    activations = _activation_grids(found, watch, settings, notes, wide)
    notes += notes_of_parts(whole, powers, found, activations, settings.allow_lost)
    notes += notes_of_borders(found, activations)
    weights = _weight_grids(program, found, activations, settings)
    offsets = {}
    if settings.correct_bias:
        offsets = _offsets(program, found, watch, activations, weights)
    text = f"on {seen.batches:,} batches, {settings.method}"
    return QuantPlan(
        activations=activations,
        weights=weights,
        offsets=offsets,
        floats=floats,
        parts=parts,
        rounding=settings.rounding,
        fingerprint=fingerprint(program),
        narrows=VERSION,
        notes=(*notes, Note(program.name, "calibrated", text)),
    )


def _surveyed(program: Program, settings: Quantization) -> Survey:
    """Return what can work on codes, and may."""
    found = survey(program, settings.skip, strict=settings.strict)
    if settings.first_last != FLOAT:
        return found
    outer = [n.name for n in _outer_layers(found)]
    return survey(program, settings.skip, floats=outer, strict=settings.strict)


# ------------------------------------------------------------------ grids


def _activation_grids(
    found: Survey,
    watch: Watch,
    settings: Quantization,
    notes: list[Note],
    wide: Collection[str],
) -> dict[str, Grid]:
    """Return the grid of every site; adds a note where one cannot be as wide as asked."""
    grids: dict[fx.Node, Grid] = {}
    outer, multiplied = _outer_sites(found), _multiplied(found, settings.align)
    narrow = found.narrow()
    chains = {n: found.chain(n) for n in watch.histograms}
    refuse_unmatched(settings.activations, "activations", chains.values())
    for node, histogram in watch.histograms.items():
        if not histogram.finite:
            raise PassError(
                "calibration met NaN or infinity",
                where=where(node),
                why="no grid holds them",
                hint="look for NaN in the calibration data and the weights; mask with a large "
                "negative number, not with -inf",
            )
        bits = asked_for(chains[node], settings.activations, "activations")
        if node in outer or node not in multiplied:
            bits = max(bits, settings.outer)
        method = settings.method
        if node.name in wide:
            bits, method = WIDE_BITS[-1], "minmax"
            histogram = histogram.times(1)
        if bits > BITS[-1] and node in narrow:
            text = f"has {BITS[-1]} bits, not {bits}: {narrow[node]}"
            notes.append(Note(node.name, "narrow", text, 0, Meta(node).source))
            bits = BITS[-1]
        try:
            grids[node] = histogram.grid(method, bits, settings.percentile)
        except UsageError as error:
            raise PassError(
                f"the range of {node.name} cannot be quantized",
                where=where(node),
                why=f"it reaches from {histogram.low:g} to {histogram.high:g}; {error.why}",
                hint="scale the data, or skip the node",
            ) from error
    for group in found.shared_grids() if settings.align else ():
        # Only among their like: a range of one sign would lose half of its codes to the other.
        # So do those in 8 bits and in more: either steps or codes would be wasted.
        for kind in {(grids[n].negative, grids[n].wide) for n in group}:
            alike = [n for n in group if (grids[n].negative, grids[n].wide) == kind]
            coarsest = min(grids[n].exponent - group[n] for n in alike)
            bits = max(grids[n].bits for n in alike)
            grids.update({n: Grid.of(coarsest + group[n], bits, kind[0]) for n in alike})
    return {n.name: g for n, g in grids.items()}


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
        sites.update(map(found.origin, form.operands(node)))
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
            if any(_leaves(u) for u in end.users):
                outer.add(node)
                break
            ends += [u for u in end.users if u in found.forms and _follows(found, u, node)]
    return outer


def _leaves(node: fx.Node) -> bool:
    """Whether a reader is the output, or makes an output of codes."""
    return node.op == "output" or (
        node.target is SCALE_PARTS and any(u.op == "output" for u in node.users)
    )


def _follows(found: Survey, node: fx.Node, site: fx.Node) -> bool:
    """Whether a node's codes come from a site."""
    placed = found.placed(node)
    return placed is not None and placed[0] is site


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
    program: Program, found: Survey, activations: Mapping[str, Grid], settings: Quantization
) -> dict[str, WeightGrid]:
    grids: dict[str, WeightGrid] = {}
    outer = _outer_layers(found)
    refuse_unmatched(settings.weights, "weights", [[n] for n in found.layers()])
    for node in found.layers():
        layer = found.forms[node].weights(node)
        assert layer is not None
        name = str(layer.weight.target)
        coding = asked_for([node], settings.weights, "weights")
        if isinstance(settings.first_last, int) and (node in outer or one_each(layer)):
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
    operand, y = found.forms[node].operands(node)[0], found.tail(node)
    x, wide = _exponent(found, activations, operand), activations[found.origin(operand).name].wide
    limits = [SHIFTS[-1] + activations[y.name].exponent - x] * count
    if layer.bias is not None:
        sizes = program.tensor(layer.bias).detach().double().abs()
        each = sizes if len(sizes) == count else sizes.amax().expand(count)
        bits = WIDE_BIAS_BITS if wide else BIAS_BITS
        room = [bits - math.frexp(size)[1] - x if size > 0 else limits[0] for size in each]
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
        placed = found.placed(operand)
        spatial = program.tensor(layer.weight).dim() > 2
        mean = watch.mean_input(operand, summed_axis(found, node))
        if layer.axis != 0 or placed is None or mean is None:
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
        site, power = placed
        steps = 2.0 ** (activations[site.name].exponent - power) / scale
        made = (-shift * steps).round().clamp(-(2**30), 2**30).long()
        offsets[name] = tuple(made.tolist())
    # A weight that several layers share has no one mean input.
    return {n: o for n, o in offsets.items() if users[n] == 1 and any(o)}


__all__ = ["Seen", "calibrate", "look", "planned"]
