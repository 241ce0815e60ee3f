"""`choose_method`: calibrates by the method whose integers keep most of what the network says.

No one way to choose exponents is the best for every network: the smallest squared error clips the
few large numbers that some networks go by, and covering all that was seen spends codes on numbers
that others make nothing of. Integers cost the same by all of them. So a few samples are held back
from calibration, each method's fake-quantized program runs on them, and its outputs are compared
with the network's own (`narrows.passes.choosing.divergence`), without labels. Then the samples are
looked at, too, and the plan is the one of the chosen method on all data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from narrows.errors import PassError
from narrows.ir.meta import Meta
from narrows.ir.program import Note, Program
from narrows.passes.choosing.divergence import NOTHING, Compared, Divergence
from narrows.passes.quant.advice import advice
from narrows.passes.quant.calibrate import Seen, look, planned
from narrows.passes.quant.options import Quantization
from narrows.passes.quant.plan import QuantPlan
from narrows.passes.quant.quantize import Quantize
from narrows.passes.quant.scale_parts import ScaleParts
from narrows.passes.quant.widen_outliers import notes_of_outliers, outliers, widen_outliers

TRIED = ("mse", "minmax", "percentile")  # in this order
HELD = 32  # samples that are held back at most
SHARE = 4  # of a batch, or of the batches, one in so many is held back

# What the outputs may lose. The trained networks that were looked at lose a tenth of these nats to
# half of them in 8 bits; a thousandth of the variance is a signal-to-noise ratio of 30 dB.
NATS, NOISE = 0.02, 1e-3
CLEAR = 0.1  # a method that costs this share of it needs no comparison


def choose_method(
    program: Program, data: Iterable[Any] | None, settings: Quantization
) -> QuantPlan:
    """Return the plan of the method that costs the outputs least; its notes say what was tried.

    The data is streamed once; up to `HELD` samples of it are kept.

    Args:
        program: A prepared program.
        data: As for `narrows.passes.quant.calibrate.calibrate`.
        settings: How grids are chosen otherwise.

    Raises:
        UsageError: As by `calibrate`.
        PassError: As by `calibrate` with the first method.
    """
    held = Held(program)
    seen = look(program, data, settings, held.hold_back)
    judge = Judge.of(program, held.samples or held.last)
    losses: dict[str, float] = {}
    for method in TRIED:
        try:
            plan = planned(seen, replace(settings, method=method))
        except PassError:
            if not losses:
                raise
            continue  # by this one a tensor has no grid, or is lost beside others
        losses[method] = judge.loss(plan)
        if losses[method] <= CLEAR:
            break
    chosen = min(losses, key=losses.__getitem__)
    settings = replace(settings, method=chosen)
    wide = _Wide.chosen(seen, settings, judge, losses[chosen])
    told = ""
    if wide.loss > 1 and not judge.blind:
        how = replace(settings, method=wide.method)
        told = advice(seen, how, wide.names, judge, wide.loss)
    for flat in held.samples:
        seen.watch.take(program, flat)
    seen.watch.settle()
    plan = planned(seen, replace(settings, method=wide.method), wide.names)
    return plan.with_notes(*_notes(seen.program.name, judge, losses, wide, told))


@dataclass(frozen=True)
class _Wide:
    """Which tensors have 16 bits because of outlier channels.

    Attributes:
        names: Their names.
        loss: What the outputs lose then.
        method: The method for the others.
        notes: What is to be said of them, and of those that cannot.
    """

    names: frozenset[str]
    loss: float
    method: str
    notes: tuple[Note, ...] = ()

    @staticmethod
    def chosen(seen: Seen, settings: Quantization, judge: Judge, loss: float) -> _Wide:
        """Return those that the outputs need, where they lose too much in 8 bits."""
        if loss <= 1:
            return _Wide(frozenset(), loss, settings.method)
        found, narrow = outliers(seen.watch, planned(seen, settings)), seen.watch.found.narrow()
        able = [one for one in found if one.node not in narrow]
        kept, left = widen_outliers(
            able, loss, lambda names: judge.loss(planned(seen, settings, names))
        )
        names, method = frozenset(one.node.name for one in kept), settings.method
        for other in TRIED if kept else ():  # what is left to round may be another method's
            lost = judge.loss(planned(seen, replace(settings, method=other), names))
            left, method = min((left, method), (lost, other))
        return _Wide(names, left, method, tuple(notes_of_outliers(kept, found, narrow)))


@dataclass
class Held:
    """Samples that calibration does not look at until its method is chosen.

    Attributes:
        program: What they are inputs of.
        samples: Flat inputs.
        last: The last batch that was looked at: what methods are judged by where none was held
            back, as there are too few samples.
    """

    program: Program
    samples: list[list[Any]] = field(default_factory=list)
    last: list[list[Any]] = field(default_factory=list)
    _count: int = 0
    _batches: int = 0

    def hold_back(self, flat: list[Any]) -> list[Any] | None:
        """Return what calibration looks at of a batch, or ``None`` where that is all held back."""
        self.program.start(flat)  # refuses what does not fit, before it is cut
        self._batches += 1
        free = self._free(flat)
        sizes = {flat[i].shape[0] for i in free}
        size = sizes.pop() if len(sizes) == 1 else 1
        part = min(size // SHARE, HELD - self._count)
        if part > 0:
            self._count += part
            self.samples.append(_rows(flat, free, size - part, part))
            flat = _rows(flat, free, 0, size - part)
        elif self._batches % SHARE == 0 and self._count + size <= HELD:
            self._count += size
            self.samples.append(flat)
            return None
        self.last = [flat]
        return flat

    def _free(self, flat: Sequence[Any]) -> list[int]:
        """Return which inputs have a batch whose size is free."""
        nodes = self.program.placeholders
        return [
            i for i, (node, value) in enumerate(zip(nodes, flat, strict=True))
            if isinstance(value, Tensor) and 0 in Meta(node).dynamic
        ]  # fmt: skip


def _rows(flat: Sequence[Any], free: Sequence[int], start: int, count: int) -> list[Any]:
    return [v.narrow(0, start, count) if i in free else v for i, v in enumerate(flat)]


@dataclass(frozen=True)
class Judge:
    """Tells what a plan costs the outputs.

    Attributes:
        program: The prepared program.
        samples: Flat inputs.
        own: Its outputs on them.
        how: How each output is compared.
    """

    program: Program
    samples: Sequence[list[Any]]
    own: Sequence[list[Any]]
    how: tuple[Compared, ...]

    @staticmethod
    def of(program: Program, samples: Sequence[list[Any]]) -> Judge:
        """Return a judge that goes by some inputs."""
        with torch.no_grad():
            own = [program.run_flat(flat) for flat in samples]
        return Judge(program, samples, own, Divergence.of(own[0]).outputs)

    @property
    def blind(self) -> bool:
        """Whether there is no output to go by."""
        return all(how.kind == NOTHING for how in self.how)

    def fake(self, plan: QuantPlan) -> Program:
        """Return the fake-quantized program."""
        fitting = ScaleParts(plan).run(self.program).program if plan.parts else self.program
        return Quantize(plan).run(fitting).program

    def loss(self, plan: QuantPlan) -> float:
        """Return what the outputs lose by a plan; see `lost`."""
        return self.lost(self.fake(plan).run_flat)

    def lost(self, run: Callable[[list[Any]], list[Any]]) -> float:
        """Return what the outputs lose, in shares of what they may, of the one that loses most."""
        lost, places = [0.0] * len(self.how), [0.0] * len(self.how)
        for flat, own in zip(self.samples, self.own, strict=True):
            with torch.no_grad():
                other = run(flat)
            for i, (how, a, b) in enumerate(zip(self.how, own, other, strict=True)):
                if how.kind != NOTHING and isinstance(a, Tensor) and a.numel():
                    lost[i] += float(how.between(a, b))
                    places[i] += a.numel() / (a.shape[how.axis] if how.classes else 1)
        each = [
            lost[i] / places[i] / (NATS if how.classes else NOISE / 2)
            for i, how in enumerate(self.how)
            if places[i]
        ]
        # Rounding may take a divergence below zero.
        return max((max(v, 0.0) if math.isfinite(v) else math.inf for v in each), default=0.0)


def _notes(
    name: str, judge: Judge, losses: Mapping[str, float], wide: _Wide, told: str
) -> list[Note]:
    """Return what was tried, and that nothing holds where it does not."""
    if judge.blind:
        return [
            Note(name, "auto", f"{wide.method}: no output is floating-point, so none was compared")
        ]
    each = ", ".join(f"{m} {loss:.2g}" for m, loss in losses.items())
    one = f"1 is {NATS:g} nats a place of classes, {NOISE:g} of the variance of values"
    if wide.names:
        each += f", {wide.method} with 16 bits for {', '.join(sorted(wide.names))} {wide.loss:.2g}"
    notes = [
        Note(name, "auto", f"{wide.method}, by what the outputs lose ({one}): {each}"),
        *wide.notes,
    ]
    if told:
        text = f"the outputs lose {wide.loss:.2g} times what they may by the best method"
        notes.append(Note(name, "loss", f"{text}; {told}"))
    return notes


__all__ = ["choose_method"]
