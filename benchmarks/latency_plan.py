"""Score mass kept at a latency: plans that aim at it, beside one ratio for every layer.

    python -m benchmarks.latency_plan [--models resnet18 ...] [--cache /tmp/reorder] [--json F]

apple-upscale gets the L1 input masks that take the same share of every layer, and its faster export
is measured in ONNX Runtime, batch 1, one thread, relative to the unpruned model. Where it is
faster than that, narrows is asked for a plan of the same latency, and what it compiles to is
measured in turns with both. Where it comes out slower than the export by more than 2 %, the request
is tightened by as much and all is measured again. Compared is the score mass that is kept: the L1
norms of the kept input channels over those of all, mean over the layers; over all that sum over
channels, and over only those that have a mask in apple-upscale's form.

With --cache the forms are shared with ``python -m benchmarks.reorder``. The first interrupt ends
the run and prints what is measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import narrows
from benchmarks.machine import table, write
from benchmarks.reorder.__main__ import prepare
from benchmarks.reorder.apart import apart
from benchmarks.reorder.case import CAPTURED, EIGHT, Case
from benchmarks.reorder.forms import tidied
from benchmarks.reorder.peers import UPSCALE
from benchmarks.reorder.prepare import Shelf, open_onnx
from benchmarks.reorder.prepare import write as write_form
from benchmarks.reorder.ratios import EXACT, geomean, relative, shown
from benchmarks.reorder.timing import ratio, spread, time_forms
from narrows.backends import costs_of
from narrows.ir.compare import relative_error
from narrows.passes.plans.mass import kept_mass

GOAL = 1.15  # times the score mass
SLACK = 1.02  # how much slower counts as no slower
TURNS = 4  # plans per model, at most
OURS = "narrows-latency"


def measure(case: Case, options: argparse.Namespace, shelf: Shelf) -> dict[str, Any]:
    """Return what was found on a model: latencies, score masses, or why there are none."""
    forms = prepare(case, options, shelf)
    result: dict[str, Any] = {"model": case.model, "amount": case.amount, "forms": forms}
    there = [name for name in ("unpruned", *UPSCALE) if "onnx" in forms[name]]
    result["latency"] = {"onnx-1": timed(case, there, options, shelf)}
    found = [(x, f) for f in UPSCALE if (x := relative(result, "onnx-1", f)) is not None]
    if not found:
        return {**result, "failure": "apple-upscale has no right export"}
    result["upscale"], result["export"] = min(found)
    if result["upscale"] >= 1:
        return result
    result["asked"] = result["upscale"]
    for _ in range(TURNS):
        made = apart(make_plan, case, result["asked"], shelf, limit=options.limit)
        if "failure" in made:
            return {**result, **made}
        timing = timed(case, ["unpruned", result["export"], OURS], options, shelf)
        if "failure" in timing:
            return {**result, **timing}
        rounds = timing["rounds"]
        result |= made
        result["measured"] = ratio(rounds, OURS, "unpruned")
        result["against"] = ratio(rounds, OURS, result["export"])
        result["quartiles"] = spread(rounds, OURS, result["export"])
        if result["against"] <= SLACK:
            break
        result["asked"] /= result["against"]
        result["tightened"] = True
    return result


def timed(
    case: Case, names: list[str], options: argparse.Namespace, shelf: Shelf
) -> dict[str, Any]:
    """Return the seconds of some forms, measured in turns in a process of their own."""
    folders = {name: folder_of(case, name, shelf) for name in names}
    return apart(
        time_forms, case, folders, "onnx", 1, options.rounds, options.budget,
        limit=options.limit + options.budget,
    )  # fmt: skip


def folder_of(case: Case, name: str, shelf: Shelf) -> Path:
    """Return where a form is; what narrows makes here is not kept."""
    return shelf.passing / case.key / OURS if name == OURS else shelf.folder(case, name)


def make_plan(case: Case, share: float, shelf: Shelf) -> dict[str, Any]:
    """Write down what narrows makes for a latency; return its prediction and the score masses."""
    module = case.build()
    keep = case.keep(module)
    program = narrows.capture(module, case.inputs(CAPTURED, seed=0), name=case.model)
    start = time.thread_time()
    plan = narrows.plan(program, latency=share, target="onnx")
    seconds = time.thread_time() - start
    made = narrows.apply(program, plan, target="onnx")
    folder = folder_of(case, OURS, shelf)
    folder.mkdir(parents=True, exist_ok=True)
    facts = write_form({"onnx": made}, tidied(program), None, folder)
    costs = costs_of("onnx")
    assert costs is not None
    whole, now = (sum(s for _, s in costs.predict(p, 1)) for p in (program, made))
    inputs = case.inputs(CAPTURED, seed=2)
    masked = plan.masked(program).run_flat(list(inputs))
    theirs = narrows.plan(program, keep_inputs=keep, zeros=False)
    return {
        "seconds": seconds,
        "predicted": now / whole,
        "facts": facts["onnx"],
        "error": relative_error(open_onnx(folder)(*inputs), masked),
        "mass": {
            "all": [kept_mass(program, p) for p in (theirs, plan)],
            "masked": [kept_mass(program, p, weights=keep) for p in (theirs, plan)],
        },
    }


# ------------------------------------------------------------------ the report


def report(results: list[dict[str, Any]]) -> str:
    """Return the table in markdown, and what became of the goal."""
    header = [
        "model", "upscale / unpruned", "asked", "predicted", "measured", "measured / upscale",
        "mass kept upscale", "narrows", "ratio", "masked layers upscale", "narrows", "ratio",
        "plan s",
    ]  # fmt: skip
    lines = [table(header, [row(r) for r in results]), ""]
    lines += [f"- {r['model']}: {text}" for r in results if (text := remark(r))]
    for layers in ("all", "masked"):
        found = [gain(r, layers) for r in results if "mass" in r]
        if found:
            lines.append(
                f"- {layers} layers: score mass kept over apple-upscale's, geomean "
                f"{geomean(found):.3f}, least {min(found):.3f} of {len(found)} (goal {GOAL}): "
                f"{'met' if min(found) >= GOAL else 'missed'}"
            )
    return "\n".join(lines) + "\n"


def row(result: dict[str, Any]) -> list[str]:
    """Return the cells of a model."""
    cells = [result["model"], shown(result.get("upscale"))]
    if "mass" not in result:
        return [*cells, *["-"] * 11]
    cells += [f"{result[key]:.3f}" for key in ("asked", "predicted", "measured")]
    low, high = result["quartiles"] or (result["against"],) * 2
    cells.append(f"{result['against']:.3f} ({low:.3f} to {high:.3f})")
    for layers in ("all", "masked"):
        cells += [f"{x:.3f}" for x in (*result["mass"][layers], gain(result, layers))]
    return [*cells, f"{result['seconds']:.2f}"]


def gain(result: dict[str, Any], layers: str) -> float:
    """Return the score mass that narrows keeps over that of apple-upscale's masks."""
    theirs, ours = result["mass"][layers]
    return ours / theirs


def remark(result: dict[str, Any]) -> str:
    """Return what has to be said of a model beside its numbers."""
    if "failure" in result:
        return result["failure"]
    if result["upscale"] >= 1:
        return "apple-upscale's export is not faster than unpruned"
    if result["error"] > EXACT:
        return f"wrong by {result['error']:.0e}"
    if result["against"] > SLACK:
        return f"slower than apple-upscale's export after {TURNS} plans"
    if result.get("tightened"):
        return f"asked for {result['asked']:.3f}: at {result['upscale']:.3f} it was slower"
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit code is 1 where a model failed."""
    options = parse(arguments)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(options.cache) if options.cache else Path(scratch) / "kept"
        shelf = Shelf(kept, Path(scratch))
        try:
            for model in options.models:
                results.append(measure(Case(model, options.amount), options, shelf))
                print(" | ".join(row(results[-1])), file=sys.stderr)
                write(options.json, results)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
    print(report(results))
    return int(any("failure" in r for r in results))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency_plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", metavar="MODEL", default=EIGHT)
    add("--amount", type=float, default=0.3, help="the share of inputs that the masks take (0.3)")
    add("--rounds", type=int, default=21)
    add("--budget", type=float, default=40, help="seconds of timing per measurement")
    add("--limit", type=float, default=300, help="seconds per model and tool")
    add("--cache", help="a folder in which apple-upscale's forms are kept")
    add("--json", help="also write the results here, after every model")
    options = parser.parse_args(arguments)
    options.forms, options.runtime, options.pipeline = [*UPSCALE], ["onnx"], ""
    return options


if __name__ == "__main__":
    sys.exit(main())
