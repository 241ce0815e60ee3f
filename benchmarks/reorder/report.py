"""Tables of the results, and what became of each goal."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from benchmarks.machine import table
from benchmarks.reorder.case import EIGHT
from benchmarks.reorder.forms import PEERS, SAME_FUNCTION
from benchmarks.reorder.goals import goals
from benchmarks.reorder.ratios import (
    EXACT,
    Result,
    geomean,
    macs_ratio,
    moved,
    predicted,
    quickest,
    relative,
    rounds_of,
    shown,
    title,
    worst_error,
)

EXACT_DOUBLE = 1e-12


def report(results: Sequence[Result]) -> str:
    """Return all tables and the goals in markdown."""
    parts = []
    amounts = sorted({r["amount"] for r in results})
    for amount in amounts:
        of_amount = [r for r in results if r["amount"] == amount]
        parts += [f"## amount {amount:g}", "", work_table(of_amount), ""]
        for key in sorted({k for r in of_amount for k in r["latency"]}):
            parts += [f"{title(key)}, time over the unpruned model's", ""]
            parts += [latency_table(of_amount, key), ""]
        costs = cost_table(of_amount)
        parts += ["Cost table, ONNX Runtime, batch 1", "", costs, ""] if costs else []
        parts += [f"- {line}" for line in failures(of_amount)]
        parts += [""]
    parts += ["## goals", ""]
    parts += [f"- {line}" for amount in amounts for line in goals(results, amount)]
    return "\n".join(parts) + "\n"


# ------------------------------------------------------------------ tables


def forms_of(results: Sequence[Result]) -> list[str]:
    """Return the forms in the results, those of the same function first."""
    seen = [f for f in (*SAME_FUNCTION, *PEERS) if any(f in r["forms"] for r in results)]
    return list(dict.fromkeys(seen))


def latency_table(results: Sequence[Result], key: str) -> str:
    """Return the ratios to the unpruned model, with geometric means."""
    forms = [f for f in forms_of(results) if f != "unpruned"]
    lines = [
        [r["model"], milliseconds(r, key), *(shown(relative(r, key, f)) for f in forms)]
        for r in results
    ]
    eight = [r for r in results if r["model"] in EIGHT]
    for name, chosen in (
        (
            "mean of the eight"
            if len(eight) == len(EIGHT)
            else f"mean of {len(eight)} of the eight",
            eight,
        ),
        ("mean of the others", [r for r in results if r["model"] not in EIGHT]),
    ):
        if len(chosen) > 1:
            lines.append([name, "", *(mean_cell(chosen, key, form) for form in forms)])
    return table(["model", "unpruned ms", *forms], lines)


def milliseconds(result: Result, key: str, form: str = "unpruned") -> str:
    """Return the median time of a form."""
    rounds = rounds_of(result, key).get(form)
    return f"{1e3 * statistics.median(rounds):.1f}" if rounds else "-"


def mean_cell(results: Sequence[Result], key: str, form: str) -> str:
    """Return a geometric mean, and of how many models where some are missing."""
    found = [x for r in results if (x := relative(r, key, form)) is not None]
    if not found:
        return "-"
    some = f" of {len(found)}" if len(found) < len(results) else ""
    return f"{geomean(found):.3f}{some}"


def work_table(results: Sequence[Result]) -> str:
    """Return MACs over the unpruned model's, copies with their megabytes, and compile times."""
    forms = [f for f in forms_of(results) if f != "unpruned"]
    header = ["model", *(f"MACs {f}" for f in forms)]
    header += [f"copies {f} (MB)" for f in forms if f in SAME_FUNCTION and f != "common-16"]
    header += ["narrows s", "upscale s", "error f32", "error f64"]
    lines = []
    for r in results:
        line = [r["model"], *(shown(macs_ratio(r, f)) for f in forms)]
        line += [copies(r, f) for f in forms if f in SAME_FUNCTION and f != "common-16"]
        ours = r["forms"].get("narrows", {})
        line += [seconds(ours), seconds(quickest(r)), f"{worst_error(r):.0e}"]
        line += [f"{ours['float64']:.0e}" if "float64" in ours else "-"]
        lines.append(line)
    return table(header, lines)


def cost_table(results: Sequence[Result]) -> str:
    """Return measured and predicted times of the unpruned model and of narrows, and the bound."""
    lines = []
    for r in results:
        found = predicted(r, "onnx")
        if found:
            name, (now, least) = next(iter(found["lost"].items()))
            lines.append(
                [
                    r["model"],
                    *(milliseconds(r, "onnx-1", form) for form in ("unpruned", "narrows")),
                    *(f"{1e3 * found[key]:.1f}" for key in ("original", "made", "bound")),
                    f"{name} {1e6 * (now - least):.0f} us",
                ]
            )
    header = ["model", "unpruned ms", "narrows ms", "unpruned predicted", "narrows predicted"]
    return table([*header, "bound predicted", "most lost at"], lines) if lines else ""


def copies(result: Result, form: str) -> str:
    """Return how many copies a form makes for ONNX Runtime, and the megabytes of one image."""
    found = moved(result, form)
    return f"{found[0]} ({found[1]:.1f})" if found else "-"


def seconds(facts: Result) -> str:
    """Return the seconds of plan and rewrite."""
    return f"{facts['seconds']:.3f}" if "seconds" in facts else "-"


def failures(results: Sequence[Result]) -> Iterator[str]:
    """Yield what failed, and what is not exact."""
    for r in results:
        for form, facts in r["forms"].items():
            if "failure" in facts:
                yield f"{r['model']}, {form}: {facts['failure']}"
            if "capture" in facts:
                yield f"{r['model']}, {form}: written by torch.onnx; {facts['capture']}"
            for runtime in ("onnx", "eager"):
                error = facts.get(runtime, {}).get("error", 0.0)
                if error > EXACT:
                    yield f"{r['model']}, {form}, {runtime}: wrong by {error:.0e}"
            if facts.get("float64", 0.0) > EXACT_DOUBLE:
                yield f"{r['model']}, {form}: wrong by {facts['float64']:.0e} in float64"
        for key, timing in r["latency"].items():
            if "failure" in timing:
                yield f"{r['model']}, {title(key)}: {timing['failure']}"
            for form, line in timing.get("failures", {}).items():
                yield f"{r['model']}, {form}, {title(key)}: {line}"
