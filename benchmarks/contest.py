"""Is the form that a compile ships the fastest of all, by prediction and by the clock?

    OMP_NUM_THREADS=1 python -m benchmarks.contest --models mixnet_s ghostnet_100 --shares 0.3 0.5
        --numbers floats int8 --json contest.json

Models of timm with random weights, at their usual size, batch 1; every layer that reads channels
loses those of the smallest L1 norms. A row is a model, a share, floats or int8, and a runtime. The
contest is held as in `narrows.compile`; then *all* forms are timed in turns for ``--seconds``.
Times are over those of the unpruned form, as ``predicted/measured``: of the pick, the common mask,
and the fastest other form. ``pick / fastest`` is the pick's time over that of the fastest form,
``forms`` how many were timed, ``contest`` what the contest took in seconds of the clock. ``whole``
is another function at the same share: whole couplings by L1, as wide as the target likes. With
``--json`` rows that are there already are not measured again. OpenVINO is left out where it is not
installed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import narrows
from benchmarks.machine import table, write
from benchmarks.reorder.case import maskable, strongest
from narrows.api import contest
from narrows.api.integers import asked_of, quick
from narrows.api.passes import passes_for
from narrows.backends import make_target
from narrows.backends.base import Target
from narrows.backends.timing import race
from narrows.ir.program import Program
from tests.networks.zoo import timm_model

SIZE = 224
SLACK = 0.01  # how much slower than another form is as fast
ALL = 99  # forms: more than there are

Quantize = Callable[[Program], Program] | None


def measured(
    program: Program, plan: Any, target: Target, quantize: Quantize, seconds: float
) -> dict[str, Any]:
    """Return what the contest took and found, and the times of all forms, in milliseconds."""
    passes = passes_for(program, plan, target, None, None, quantize is not None)
    held = contest.run(program, passes, target, quantize=quantize).contest
    usual = contest.BEST, contest.MAKING, contest.SECONDS
    try:
        contest.BEST, contest.MAKING, contest.SECONDS = ALL, float("inf"), seconds
        whole = contest.run(program, passes, target, quantize=quantize).contest
    finally:
        contest.BEST, contest.MAKING, contest.SECONDS = usual
    if held is None or whole is None or held.why or whole.why:
        why = next((c.why for c in (held, whole) if c is not None), "nothing is pruned")
        raise SystemExit(f"no contest was held: {why}")
    forms = {e.name: entry for e in whole.entries if (entry := whole.entry(e.name)) is not None}
    return {
        "winner": held.winner, "seconds": held.seconds, "predicted": whole.entries[0].name,
        "ms": {n: e.measured * 1e3 for n, e in forms.items() if e.measured is not None},
        "costs": {e.name: e.predicted * 1e3 for e in whole.entries},
        "failed": {n: e.failed for n, e in forms.items() if e.failed},
    }  # fmt: skip


def coupled(
    program: Program, share: float, target: Target, quantize: Quantize, seconds: float
) -> float | None:
    """Return the time of whole couplings at the same share, over the unpruned program's."""
    place = target.track()
    if place is None:
        return None
    plan = narrows.plan(program, ratio=share, target=target)
    made = []
    for one in (None, plan):
        passes = passes_for(program, one, target, None, None, quantize is not None)
        small = contest.run(program, passes, target, asked=False).result.program
        made.append(small if quantize is None else quantize(small))
    with place as trial:
        found = race({str(i): trial(p, 1) for i, p in enumerate(made)}, seconds)
    before, after = (sorted(times)[len(times) // 2] for times in found.values())
    return after / before


def line(name: str, found: Mapping[str, Any]) -> list[str]:
    """Return the row of a table."""
    ms, costs = found["ms"], found["costs"]
    fastest, pick = min(ms, key=ms.__getitem__), found["winner"]
    commons = [form for form in ms if form.startswith("common")]
    common = min(commons, key=ms.__getitem__, default="")
    others = [form for form in ms if form not in (pick, common, "unpruned")]
    other = min(others, key=ms.__getitem__, default="")

    def ratios(form: str) -> str:
        if form not in ms:
            return "-"
        return f"{costs[form] / costs['unpruned']:.3f}/{ms[form] / ms['unpruned']:.3f}"

    whole = "-" if found["whole"] is None else f"{found['whole']:.3f}"
    return [
        name, f"{ms['unpruned']:.2f}", f"{pick} {ratios(pick)}", f"{common} {ratios(common)}",
        f"{other} {ratios(other)}", whole, f"{ms[pick] / ms[fastest]:.3f}", str(len(ms)),
        f"{found['seconds']:.1f}",
    ]  # fmt: skip


HEADER = (
    "model, share, numbers, runtime", "unpruned ms", "pick", "common", "best other", "whole",
    "pick / fastest", "forms", "contest s",
)  # fmt: skip


def counted(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return how often the pick is not slower than any other form."""
    near = [f["ms"][f["winner"]] <= (1 + SLACK) * min(f["ms"].values()) for f in results.values()]
    return f"never slower than another form beyond {SLACK:.0%}: {sum(near)} of {len(near)} rows"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["mixnet_s", "ghostnet_100"])
    parser.add_argument("--shares", "--amounts", nargs="+", type=float, default=[0.3, 0.5, 0.7])
    parser.add_argument("--numbers", nargs="+", choices=["floats", "int8"], default=["floats"])
    parser.add_argument("--size", type=int, default=SIZE, help="height and width of the images")
    parser.add_argument("--targets", "--target", nargs="+", default=["onnx", "openvino"])
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing all forms")
    parser.add_argument("--json", metavar="FILE", help="where results are, and are kept")
    arguments = parser.parse_args(argv)
    results = kept(arguments.json)
    targets = [make_target(name) for name in arguments.targets]
    for target in targets:
        if (missing := target.available()) is not None:
            print(f"{target.name} is left out: {missing}", flush=True)
    here = [target for target in targets if target.available() is None]
    rows = []
    for model in arguments.models:
        for share in arguments.shares:
            for numbers in arguments.numbers:
                for target in here:
                    key = f"{model} {share:g} {numbers} {target.name}"
                    if key not in results:
                        results[key] = row(model, share, numbers, target, arguments)
                        write(arguments.json, results)
                    rows.append(key)
                    print("  ".join(line(key, results[key])), flush=True)
    print(table(HEADER, [line(key, results[key]) for key in rows]))
    print(counted({key: results[key] for key in rows}))
    return 0


def row(
    model: str, share: float, numbers: str, target: Target, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Return what is measured of one model at one share."""
    module, images = timm_model(model, arguments.size)
    module, inputs = module.float().eval(), (images[0].float(),)
    program = narrows.capture(module, inputs)
    plan = narrows.ChannelPlan.given(program, dict(strongest(maskable(module, inputs), share)))
    quantize = quick(asked_of(list(inputs), False) if numbers == "int8" else None)
    found = measured(program, plan, target, quantize, arguments.seconds)
    return {**found, "whole": coupled(program, share, target, quantize, arguments.seconds / 6)}


def kept(path: str | None) -> dict[str, Any]:
    """Return the rows that were measured before."""
    if path is None or not Path(path).exists():
        return {}
    return json.loads(Path(path).read_text())["results"]


if __name__ == "__main__":
    sys.exit(main())
