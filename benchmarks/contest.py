"""Does the contest at the end of a compile find the fastest form, and how long does it take?

    OMP_NUM_THREADS=1 python -m benchmarks.contest --models mixnet_s ghostnet_100 --amounts 0.3 0.5
        --json contest.json

Models of timm with random weights, at their usual size, batch 1; every layer that reads channels
loses those of the smallest L1 norms. The contest is held as in `narrows.compile`; then *all* forms
are timed in turns in ONNX Runtime, for ``--seconds``, and the contest's pick is held to the fastest
of them, to the unpruned form and to that of the common mask. ``pick`` is its time over that of the
fastest form, ``predicted`` the same of the form that the cost table alone would have taken.
``contest`` is what the contest took, in seconds of the clock.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import narrows
from benchmarks.machine import table, write
from benchmarks.reorder.case import maskable, strongest
from narrows.api import contest
from narrows.api.passes import passes_for
from narrows.backends import make_target
from narrows.ir.program import Program
from tests.networks.zoo import timm_model

SIZE = 224


def measured(program: Program, plan: Any, target: str, seconds: float) -> dict[str, Any]:
    """Return what the contest took and found, and the times of all forms, in milliseconds."""
    emitted = make_target(target)
    passes = passes_for(program, plan, emitted, None, None, False)
    _, held = contest.decide(program, passes, emitted)
    usual = contest.BEST, contest.SECONDS
    try:
        contest.BEST, contest.SECONDS = 99, seconds
        _, whole = contest.decide(program, passes, emitted)
    finally:
        contest.BEST, contest.SECONDS = usual
    if held is None or whole is None or held.why or whole.why:
        why = next((c.why for c in (held, whole) if c is not None), "nothing is pruned")
        raise SystemExit(f"no contest was held: {why}")
    forms = {e.name: entry for e in whole.entries if (entry := whole.entry(e.name)) is not None}
    return {
        "winner": held.winner, "seconds": held.seconds, "predicted": whole.entries[0].name,
        "ms": {n: e.measured * 1e3 for n, e in forms.items() if e.measured is not None},
        "failed": {n: e.failed for n, e in forms.items() if e.failed},
    }  # fmt: skip


def line(name: str, amount: float, found: dict[str, Any]) -> list[str]:
    """Return the row of a table."""
    ms = found["ms"]
    fastest = min(ms, key=ms.__getitem__)
    common = min((v for n, v in ms.items() if n.startswith("common")), default=float("nan"))
    pick, least = ms[found["winner"]], ms[fastest]
    return [
        name, f"{amount:g}", f"{ms['unpruned']:.2f}", f"{pick / ms['unpruned']:.3f}",
        f"{common / ms['unpruned']:.3f}", found["winner"], fastest, f"{pick / least:.3f}",
        f"{ms[found['predicted']] / least:.3f}", str(len(ms)), f"{found['seconds']:.1f}",
    ]  # fmt: skip


HEADER = (
    "model", "mask", "unpruned ms", "pick / unpruned", "common / unpruned", "picked", "fastest",
    "pick", "predicted", "forms", "contest s",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["mixnet_s", "ghostnet_100"])
    parser.add_argument("--amounts", nargs="+", type=float, default=[0.3, 0.5, 0.7])
    parser.add_argument("--size", type=int, default=SIZE, help="height and width of the images")
    parser.add_argument("--target", default="onnx")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing all forms")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args(argv)
    rows, results = [], {}
    for name in arguments.models:
        module, images = timm_model(name, arguments.size)
        module, inputs = module.float().eval(), (images[0].float(),)
        program = narrows.capture(module, inputs)
        weights = maskable(module, inputs)
        for amount in arguments.amounts:
            plan = narrows.ChannelPlan.given(program, dict(strongest(weights, amount)))
            found = measured(program, plan, arguments.target, arguments.seconds)
            results[f"{name} {amount:g}"] = found
            rows.append(line(name, amount, found))
            print("  ".join(rows[-1]), flush=True)
            write(arguments.json, results)
    print(table(HEADER, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
