"""Models that another tool pruned, as they are and compiled by narrows.

    python -m benchmarks.odd_widths [--models resnet18 ...] [--amounts 0.3] [--json F]

Torch-Pruning prunes each model by L1, without rounding its widths. The same module then goes to
ONNX by the same exporter twice: with norms folded and no more, and through narrows' usual pipeline
for ONNX Runtime, which may add channels of zeros. Both run in turns in one process, batch 1, one
thread, by CPU time; the error is that of the compiled program against the pruned module, float64.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import narrows
from benchmarks.machine import table, write
from benchmarks.reorder.case import EIGHT, Case
from benchmarks.reorder.forms import tidied
from benchmarks.reorder.peers import torch_pruning, without_inplace
from benchmarks.reorder.prepare import in_a_line
from benchmarks.reorder.ratios import geomean
from benchmarks.reorder.timing import interleaved, ratio, spread
from narrows.ir.compare import relative_error


def measure(case: Case, rounds: int, budget: float) -> dict[str, Any]:
    """Return the latency of both forms of one pruned model."""
    module = without_inplace(case.build())
    torch_pruning(module, case.inputs(1), case.amount, None)
    program = narrows.capture(module.eval(), case.inputs(2))
    compiled = narrows.apply(program, target="onnx")
    double = program.to(torch.float64)
    inputs = [x.double() for x in case.inputs(2)]
    error = relative_error(narrows.apply(double, target="onnx")(*inputs), double(*inputs))
    feed = [x.numpy() for x in case.inputs(1)]
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for name, form in (("as it is", tidied(program)), ("narrows", compiled)):
            artifact = narrows.lower(form)
            artifact.save(Path(folder) / name)
            opened = narrows.load(Path(folder) / name)
            runs[name] = lambda opened=opened: opened.run_flat(feed)
            runs[name]()
        found = interleaved(runs, rounds, budget)
    added = sum(n.channels for n in compiled.notes if n.reason == "width")
    return {
        "model": case.model, "amount": case.amount, "error": error, "added": added,
        "ms": 1e3 * min(found["as it is"]), "ratio": ratio(found, "narrows", "as it is"),
        "quartiles": spread(found, "narrows", "as it is"),
    }  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(EIGHT))
    parser.add_argument("--amounts", nargs="+", type=float, default=[0.3])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing per model")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results, rows = [], []
    for amount in options.amounts:
        for model in options.models:
            try:
                one = measure(Case(model, amount), options.rounds, options.budget)
            except Exception as error:
                print(f"{model} {amount}: {in_a_line(error)}", flush=True)
                continue
            results.append(one)
            low, high = one["quartiles"]
            rows.append(
                (model, f"{amount}", f"{one['ms']:.1f}", f"{one['ratio']:.2f}",
                 f"{low:.2f}-{high:.2f}", str(one["added"]), f"{one['error']:.0e}")
            )  # fmt: skip
            print(" ".join(rows[-1]), flush=True)
    header = ("model", "amount", "ms as it is", "narrows", "quartiles", "added", "error")
    print(table(header, rows))
    print(f"geometric mean {geomean([r['ratio'] for r in results]):.3f}")
    write(options.json, results)


if __name__ == "__main__":
    main()
