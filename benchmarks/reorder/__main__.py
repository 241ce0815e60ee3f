"""Latency of one set of masks in every exact form, and beside Torch-Pruning at equal MACs.

    python -m benchmarks.reorder [--models resnet18] [--amounts 0.3] [--cache /tmp/reorder]
    python -m benchmarks.reorder --batch 1 8 --runtime onnx eager --json r.json --markdown r.md
    python -m benchmarks.reorder --dense-blocks

The same input masks go into every form: narrows, apple-upscale's two exports, and the mask common
to all consumers with widths rounded up to 16. Each form is checked against the masked model, then
all of them run in turns in one process, one thread, and the medians of the rounds' ratios are
shown. Torch-Pruning chooses its own channels, as many as bring it to the MACs of narrows' form.
Norms are folded in every form, and the same exporter writes all of them.

With --cache the peers' forms are kept, so that a run after a change of narrows makes only its own
anew. The first interrupt ends the run and keeps what is measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import write
from benchmarks.reorder.apart import TIME_OUT, apart
from benchmarks.reorder.case import BEYOND, EIGHT, Case
from benchmarks.reorder.dense_blocks import SIZES, dense_blocks
from benchmarks.reorder.forms import FORMS, PEERS
from benchmarks.reorder.peers import (
    CLOSE,
    TORCH_PRUNING,
    UPSCALE,
    make_torch_pruning,
    make_upscale,
)
from benchmarks.reorder.prepare import RUNTIMES, Facts, Shelf, make
from benchmarks.reorder.ratios import relative, shown
from benchmarks.reorder.report import report
from benchmarks.reorder.timing import time_forms

ALL_FORMS = (*FORMS, *PEERS)
USUAL_FORMS = tuple(f for f in ALL_FORMS if f not in ("narrows-masks", "narrows-plain"))


def measure(case: Case, options: argparse.Namespace, shelf: Shelf) -> dict[str, Any]:
    """Return what is known of every form of a case, and the seconds of every round."""
    forms = prepare(case, options, shelf)
    latency = {}
    for runtime in options.runtime:
        folders = {n: shelf.folder(case, n) for n, facts in forms.items() if runtime in facts}
        for batch in options.batch:
            latency[f"{runtime}-{batch}"] = apart(
                time_forms, case, folders, runtime, batch, options.rounds, options.budget,
                limit=options.limit + options.budget,
            )  # fmt: skip
    return {
        "model": case.model, "amount": case.amount, "masks": case.masks, "size": case.images,
        "forms": forms, "latency": latency,
    }  # fmt: skip


def prepare(case: Case, options: argparse.Namespace, shelf: Shelf) -> dict[str, Facts]:
    """Return the facts of all forms of a case, each made in a process of its tool."""
    wanted = [form for form in ALL_FORMS if form in ("unpruned", *options.forms)]
    limit = options.limit
    mine = [form for form in wanted if form in FORMS]
    made = apart(make, case, mine, options.runtime, options.pipeline, shelf, limit=limit)
    forms = of_tool(made, mine)
    theirs = [form for form in wanted if form in UPSCALE]
    forms |= {f: facts for f in theirs if (facts := shelf.facts(case, f))}
    missing = [f for f in theirs if f not in forms]
    if missing:
        made = apart(make_upscale, case, missing, shelf, limit=limit)
        forms |= keep_time_outs(case, of_tool(made, missing), shelf)
    theirs = [form for form in wanted if form in TORCH_PRUNING]
    target = forms.get("narrows", forms["unpruned"]).get("onnx", {}).get("macs")
    if theirs and target:
        kept = {f: facts for f in theirs if (facts := shelf.facts(case, f))}
        forms |= {f: facts for f, facts in kept.items() if near(facts, target)}
        missing = [f for f in theirs if f not in forms]
        if missing:
            made = apart(make_torch_pruning, case, missing, target, shelf, limit=limit)
            found = of_tool(made, missing)
            forms |= keep_time_outs(case, found, shelf, {"wanted": target})
    return {form: forms[form] for form in wanted if form in forms}


def near(facts: Facts, target: int) -> bool:
    """Whether a kept form of Torch-Pruning was made for about these MACs, or failed at any."""
    return "failure" in facts or abs(facts["wanted"] / target - 1) <= CLOSE


def of_tool(made: dict[str, Any], names: list[str]) -> dict[str, Facts]:
    """Return facts per form; a process that failed has failed for all its forms."""
    if isinstance(made.get("failure"), str):
        return {name: dict(made) for name in names}
    return made


def keep_time_outs(
    case: Case, forms: dict[str, Facts], shelf: Shelf, known: Facts | None = None
) -> dict[str, Facts]:
    """Put what timed out on the shelf, so that the next run need not wait for it again."""
    return {
        name: shelf.put(case, name, {**facts, **(known or {})})
        if facts.get("failure", "").startswith(TIME_OUT)
        else facts
        for name, facts in forms.items()
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; the exit code is 1 when narrows itself fails on a model."""
    options = parse(arguments)
    results: list[dict[str, Any]] = []
    if options.dense_blocks is not None:
        text, results = dense_blocks(options.dense_blocks or list(SIZES), options.limit)
        print(text)
        write(options.json, results)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(options.cache) if options.cache else Path(scratch)
        shelf = Shelf(kept, Path(scratch), tuple(options.redo))
        try:
            for model in options.models:
                for amount in options.amounts:
                    case = Case(model, amount, options.masks, options.size, options.choose_for)
                    results.append(measure(case, options, shelf))
                    print(summary(results[-1]), file=sys.stderr)
                keep(options, results)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
    print(report(results))
    keep(options, results)
    return int(any("failure" in r["forms"].get("narrows", {}) for r in results))


def keep(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Write what is measured so far."""
    write(options.json, results)
    if options.markdown:
        Path(options.markdown).write_text(report(results))


def summary(result: dict[str, Any]) -> str:
    """Return a line about a case, for who is waiting."""
    parts = []
    for key in result["latency"]:
        cells = (f"{f} {shown(relative(result, key, f))}" for f in result["forms"])
        parts.append(f"{key}: {', '.join(cells)}")
    return f"{result['model']} {result['amount']:g}  {'; '.join(parts)}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    from tests.networks.zoo import MODELS

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reorder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=sorted(MODELS), metavar="MODEL", default=[*EIGHT, *BEYOND])
    add("--amounts", nargs="+", type=float, default=[0.3, 0.5, 0.7])
    add("--masks", choices=("l1", "random"), default="l1")
    add("--forms", nargs="+", choices=ALL_FORMS, default=USUAL_FORMS, metavar="FORM",
        help=f"of {', '.join(ALL_FORMS)}")  # fmt: skip
    add(
        "--pipeline", default="", help="the spelling of narrows' pipeline; the usual one by default"
    )
    add("--runtime", nargs="+", choices=RUNTIMES, default=["onnx"])
    add("--batch", nargs="+", type=int, default=[1])
    add("--choose-for", type=int, default=1, metavar="N", help="the batch narrows chooses for")
    add("--rounds", type=int, default=21)
    add("--budget", type=float, default=60, help="seconds of timing per case, runtime and batch")
    add("--limit", type=float, default=300, help="seconds per tool and case")
    add("--size", type=int, default=0, help="of the images, where it is not the usual one")
    add("--cache", help="a folder in which forms are kept that narrows' passes do not change")
    add("--redo", nargs="+", choices=ALL_FORMS, default=[], help="forms to make although kept")
    add("--json", help="also write the results here, after every model")
    add("--markdown", help="also write the report here, after every model")
    add("--dense-blocks", nargs="*", type=int, metavar="LAYERS",
        help="instead: compile times of dense blocks of so many layers")  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
