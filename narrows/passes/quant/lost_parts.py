"""What a common grid leaves of the parts that are joined, and the refusal to lose one.

The ratio of a part is that of its squares to the squared errors of rounding, in dB, on the steps
that the joined tensor has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from narrows.errors import PassError
from narrows.ir.integer.grid import Grid
from narrows.ir.meta import Meta, where
from narrows.ir.ops.args import arguments
from narrows.ir.ops.integer_forms import Softmax
from narrows.ir.ops.integer_padding import Padding
from narrows.ir.program import Note
from narrows.passes.quant.figures import LOW
from narrows.passes.quant.merges import parts_of
from narrows.passes.quant.observe import Histogram
from narrows.passes.quant.survey import Survey
from narrows.passes.quant.watch import Watch

FEW = 4  # channels, below which there is nothing to tell of most of them
SPARE = 6.0  # dB that a part has to lose for its neighbours' sake, else its own range is to blame


def notes_of_parts(
    watch: Watch,
    powers: Sequence[int],
    found: Survey,
    grids: Mapping[str, Grid],
    allowed: bool,
) -> Iterator[Note]:
    """Yield what was done for parts that are unlike, and which keep little.

    Args:
        watch: What was seen of the program before its parts were scaled.
        powers: Per label.
        found: What works on codes in the program as it is quantized.
        grids: The grids of its sites.
        allowed: Whether a part may become one number.

    Raises:
        PassError: It would, and may not.
    """
    nodes, read = {n.name: n for n in found.forms}, watch.parts.read_at_all()
    for label, (cat, index) in enumerate(watch.parts.sources, 1):
        if watch.parts.leader(label) not in read:
            continue
        name, power = f"{index} ({arguments(cat)['tensors'][index].name})", powers[label]
        if power:
            text = f"its part {name} is multiplied by 2^{power}, and divided behind"
            yield Note(cat.name, "parts", text, 0, Meta(cat).source)
        others = [h for x, (_, h) in watch.joined[cat].items() if x != label]
        reason = watch.parts.reasons.get(label) or _neighbours(others)
        grid = grids[found.tail(nodes[cat.name]).name]
        part = _Part(cat, name, watch.joined[cat][label][1], power, grid, reason)
        yield from part.notes(allowed)
    for site, parts in watch.merged.items():
        for operand in parts if parts_of(site) else ():
            others = [watch.histograms[site]]
            part = _Part(site, operand.name, watch.beside[operand], 0, grids[site.name],
                         _neighbours(others))  # fmt: skip
            yield from part.notes(allowed)
    yield from _channels(watch, grids)


def notes_of_borders(found: Survey, grids: Mapping[str, Grid]) -> Iterator[Note]:
    """Yield the numbers that are put around tensors whose codes do not reach as far."""
    for node, form in found.forms.items():
        if not isinstance(form, Padding):
            continue
        placed = found.placed(form.operands(node)[0])
        if placed is None:
            continue
        own = grids[placed[0].name]
        grid = replace(own, exponent=own.exponent - placed[1])
        if form.saturates(node, grid):
            end = (grid.code(form.value(node)) - grid.zero) * grid.scale
            text = f"pads with {end:g}, the end of its codes, not with {form.value(node):g}"
            yield Note(node.name, "border", text, 0, Meta(node).source)


def _channels(watch: Watch, grids: Mapping[str, Grid]) -> Iterator[Note]:
    """Yield the tensors whose largest channels leave little of most others."""
    joined = {watch.found.origin(arguments(cat)["tensors"][i]) for cat, i in watch.parts.sources}
    for site, energy in watch.energies.items():
        if site in {*watch.joined, *joined} or isinstance(watch.found.forms.get(site), Softmax):
            continue
        alive = energy[energy > 0]
        count = watch.histograms[site].total / len(energy)
        noise = grids[site.name].scale ** 2 / 12 * count
        low = int((alive < noise * 10 ** (LOW / 10)).sum())
        if len(alive) >= FEW and 2 * low > len(alive):
            text = (
                f"{low} of its {len(energy)} channels keep less than {LOW:g} dB: "
                f"{_neighbours([watch.histograms[site]])}"
            )
            yield Note(site.name, "lost", text, 0, Meta(site).source)


@dataclass(frozen=True)
class _Part:
    """What was seen of a part, and the grid that it comes to lie on."""

    node: fx.Node
    name: str
    seen: Histogram
    power: int
    grid: Grid
    reason: str

    def notes(self, allowed: bool) -> Iterator[Note]:
        """Yield that it keeps little, where it does; refuse if that is one number."""
        seen = self.seen.times(self.power)
        if seen.power is None or seen.constant:
            return
        step = self.grid.scale
        left = _ratio(seen, step)
        alone = _ratio(seen, seen.grid("minmax", self.grid.bits).scale)
        if left >= LOW or alone - left < SPARE:
            return
        if round(seen.low / step) == round(seen.high / step) and not allowed:
            raise self._refusal()
        text = f"its part {self.name} keeps {left:.1f} dB, and would have {alone:.1f} alone: "
        yield Note(self.node.name, "lost", text + self.reason, 0, Meta(self.node).source)

    def _refusal(self) -> PassError:
        step = self.grid.scale * 2.0**-self.power
        low, high = self.seen.low, self.seen.high
        return PassError(
            f"part {self.name} of {self.node.name} would become one number",
            where=where(self.node),
            why=f"it reaches from {low:.3g} to {high:.3g}, and the common grid has steps of "
            f"{step:.3g}; {self.reason}",
            hint="return the parts one by one, or keep in float what joins and what reads them: "
            f"skip=[{self.node.name!r}, ...]; allow_lost=True goes on",
        )


def _ratio(seen: Histogram, step: float) -> float:
    noise = seen.rounding(step)
    return 10 * math.log10(seen.energy / noise) if noise > 0 else math.inf


def _neighbours(others: Sequence[Histogram]) -> str:
    reach = max((max(-h.low, h.high) for h in others), default=0.0)
    return f"the largest reaches {reach:.3g}"


__all__ = ["notes_of_borders", "notes_of_parts"]
