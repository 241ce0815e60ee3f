"""`advice`: what helps where no method holds, and what costs most, by trials of the same judge.

Nothing is suggested that was not tried: a tensor in 16 bits changes nothing where the operator that
reads it works on 8 anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from narrows.errors import PassError
from narrows.ir.integer.grid import ACTIVATION_BITS, BITS
from narrows.passes.quant.calibrate import Seen, planned
from narrows.passes.quant.measure import Switch, activation_switches, without
from narrows.passes.quant.options import Quantization
from narrows.passes.quant.plan import QuantPlan
from narrows.passes.quant.widen_outliers import weight_shares

NAMED = 3  # tensors that are named at most
LOOKED_AT = 12  # the noisiest, whose quantizers are switched off in turn
HELPS = 0.9  # of what is lost: a trial that leaves more helps nothing

Judge = Any  # `narrows.passes.quant.choose_method.Judge`


def advice(
    seen: Seen, settings: Quantization, wide: frozenset[str], judge: Judge, lost: float
) -> str:
    """Return what is to be said of a plan by which the outputs lose too much.

    Args:
        seen: What calibration saw, without the samples of the judge.
        settings: How the plan was made.
        wide: The tensors that have 16 bits in it, whatever the settings say.
        judge: Tells what a plan costs the outputs.
        lost: What this one costs them.
    """
    plan = planned(seen, settings, wide)
    alone = _alone(seen, plan, judge)
    blamed = [name for name in alone if alone[name] < HELPS * lost][:NAMED]
    tried: dict[str, float] = {}
    for change in _changes(settings, blamed):
        try:
            other = planned(seen, replace(settings, **change), wide)
        except PassError:
            continue  # by this one a tensor has no grid
        tried[_spelled(change, other, blamed)] = judge.loss(other)
    told = "no tensor's rounding can be left out alone"
    if alone:
        first = next(iter(alone))
        told = f"most is lost by the rounding of {first!r}: {alone[first]:.2g} without it"
    helping = sorted((t for t in tried if tried[t] < HELPS * lost), key=tried.__getitem__)
    if helping:
        return f"{told}; try " + ", or ".join(f"{t}: {tried[t]:.2g}" for t in helping)
    rounded = weight_shares(seen.program, seen.watch, plan)
    if worst := sorted(rounded, key=rounded.__getitem__, reverse=True)[:NAMED]:
        told += f"; of weights most is rounded away of {', '.join(worst)}"
    but = "nothing that was tried holds" + (f" ({', '.join(tried)})" if tried else "")
    if blamed:
        but += f"; skip=[{blamed[0]!r}] leaves it floating-point"
    return f"{told}; {but}"


def _changes(settings: Quantization, blamed: list[str]) -> Iterator[dict[str, Any]]:
    """Yield options to try: some tensors in more bits, and all in 8."""
    if blamed:
        asked = settings.activations
        usual: Mapping[str, int] = asked if isinstance(asked, Mapping) else {"*": asked}
        rest = {glob: bits for glob, bits in usual.items() if glob not in blamed}
        yield {"activations": {**dict.fromkeys(blamed, ACTIVATION_BITS[-1]), **rest}}
    for name in ("weights", "activations"):
        bits = getattr(settings, name)
        if name == "activations" and settings.levels:
            continue  # which are for few bits alone
        if bits != BITS[-1] and not (isinstance(bits, int) and bits > BITS[-1]):
            yield {name: BITS[-1]}


def _spelled(change: dict[str, Any], plan: QuantPlan, blamed: list[str]) -> str:
    """Return how an option is given, without the tensors that stay in 8 bits whatever is asked."""
    ((name, given),) = change.items()
    if isinstance(given, Mapping):
        idle = {n for n in blamed if not plan.activations[n].wide}
        given = {glob: bits for glob, bits in given.items() if glob not in idle}
    return f"{name}={given}"


def _alone(seen: Seen, plan: QuantPlan, judge: Judge) -> dict[str, float]:
    """Return what the outputs lose without the rounding of one tensor or another, least first."""
    fake = judge.fake(plan)
    noisy = _noisiest(seen, plan)
    found: dict[str, float] = {}
    for switch in activation_switches(fake, plan):
        name = switch.key[1]
        if name in noisy:
            found[name] = judge.lost(_off(fake.start, switch))
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def _off(start: Callable[[list[Any]], Any], switch: Switch) -> Callable[[list[Any]], list[Any]]:
    """Return what runs a fake-quantized program without one quantizer."""
    return lambda flat: without(start(flat), switch).finish()


def _noisiest(seen: Seen, plan: QuantPlan) -> set[str]:
    """Return the tensors that keep the least of themselves on their own grids."""
    shares = {
        node.name: histogram.error(plan.activations[node.name]) / histogram.energy
        for node, histogram in seen.watch.histograms.items()
        if histogram.power is not None
        and node.name in plan.activations
        and node not in seen.watch.joined
    }
    return {*sorted(shares, key=shares.__getitem__, reverse=True)[:LOOKED_AT]}


__all__ = ["advice"]
