"""Numbers of a result: ratios of times and of work, and means of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.reorder.timing import ratio

UPSCALE = ("upscale-default", "upscale-narrow")
EXACT = 1e-4  # float32, relative; a deep network's rounding stays below, a wrong channel does not

Result = dict[str, Any]  # of one model at one amount; see `__main__.measure`


def title(key: str) -> str:
    """Return ``ONNX Runtime, batch 1`` for ``onnx-1``."""
    runtime, _, batch = key.partition("-")
    return f"{ {'onnx': 'ONNX Runtime', 'eager': 'eager torch'}[runtime] }, batch {batch}"


def moved(result: Result, form: str) -> tuple[int, float] | None:
    """Return how many copies a form makes in ONNX Runtime, and the megabytes of one image."""
    facts = result["forms"].get(form, {}).get("onnx", {})
    return (facts["copies"], facts["bytes"] / 1e6) if "copies" in facts else None


def rounds_of(result: Result, key: str) -> dict[str, list[float]]:
    """Return the seconds of all rounds of a runtime and batch."""
    return result["latency"].get(key, {}).get("rounds", {})


def relative(result: Result, key: str, form: str, base: str = "unpruned") -> float | None:
    """Return a form's time over another's; ``None`` for one that is missing or wrong."""
    runtime = key.partition("-")[0]
    if result["forms"].get(form, {}).get(runtime, {}).get("error", 0.0) > EXACT:
        return None
    return ratio(rounds_of(result, key), form, base)


def against_best(result: Result, key: str, others: Iterable[str]) -> tuple[float, str] | None:
    """Return the time of narrows over that of the fastest of some forms, and which one that is."""
    found = [(x, f) for f in others if (x := relative(result, key, f)) is not None]
    if not found or relative(result, key, "narrows") is None:
        return None
    best = min(found)[1]
    own = relative(result, key, "narrows", best)
    return None if own is None else (own, best)


def macs_ratio(result: Result, form: str) -> float | None:
    """Return a form's MACs over those of the unpruned model."""
    own = result["forms"].get(form, {}).get("onnx", {}).get("macs")
    whole = result["forms"].get("unpruned", {}).get("onnx", {}).get("macs")
    return own / whole if own and whole else None


def predicted(result: Result, runtime: str) -> dict[str, Any]:
    """Return what the cost table says of narrows' form; see `bound`. Empty without a table."""
    found = (result["forms"].get("narrows", {}).get("bound") or {}).get(runtime) or {}
    return found if "bound" in found else {}


def quickest(result: Result) -> Result:
    """Return the facts of apple-upscale's run that took less time to plan and prune."""
    found = [f for name in UPSCALE if "seconds" in (f := result["forms"].get(name, {}))]
    return min(found, key=lambda f: f["seconds"], default={})


def worst_error(result: Result) -> float:
    """Return the largest relative error of narrows in float32, over the runtimes."""
    facts = result["forms"].get("narrows", {})
    return max(facts.get(r, {}).get("error", 0.0) for r in ("onnx", "eager"))


def geomean(values: Iterable[float]) -> float:
    """Return the geometric mean."""
    return math.exp(statistics.fmean(math.log(v) for v in values))


def shown(value: float | None) -> str:
    """Return a ratio with two digits."""
    return "-" if value is None else f"{value:.2f}"
