"""What trained networks keep when channels go, without labels and without training.

    python -m benchmarks.choosing --zoo DIR --models resnet20_cifar10 --macs 0.7 0.5 --draws 3
        --results choosing.json

``DIR`` holds trained networks and data, as for `benchmarks.quantized_accuracy`. Channels are chosen
on ``--images`` calibration images, and the figure is of the test images. Every row is kept in the
file of results as soon as it is there, and is not measured again.

The methods: ``losses`` is `narrows.plan` with a budget and data, each layer choosing for itself;
``couplings`` the same for whole couplings; ``l1``, ``l2`` and other criteria are the same budget by
that criterion, over the whole network, each layer for itself. With ``+repair`` the weights that are
left are solved for (`narrows.compensate`), which is always done for the first two, unless there is
``+none``. Any other compensation stands there by its name: ``couplings+fold``.
``allocator:uniform`` is ``losses`` with another allocator (``narrows allocators``),
``allocator:uniform:couplings`` for whole couplings. ``onnx`` is a latency in place of
multiply-accumulates, predicted for ONNX Runtime; the row in the file also says what it took there,
over the unpruned network. ``cpu`` are all seconds, ``solved`` those of the compensation.

``onnx:8`` is the same and then quantized to 8 bits, ``int8`` a latency that is predicted for
integers, over the unpruned network in integers, and ``int8:measured`` one that is measured; with a
budget of 1 both are quantized alone. Figure and ``took`` are of the integers, in ONNX Runtime; what
they took is over the unpruned network in floats.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import narrows
from benchmarks.machine import table
from benchmarks.quantized_accuracy import Case, Results, load_zoo
from narrows.api.stopwatch import Stopwatch
from narrows.ir.program import Program
from narrows.ir.workload import macs, works_of
from narrows.passes.choosing.criteria.catalog import find, measures

TIMED = ("onnx", "int8")  # a latency in place of multiply-accumulates
METHODS = ("losses", "couplings", "l1+repair", "l1")
BATCH = 32


def drawn(case: Case, images: int, draw: int, flips: bool) -> list[Tensor]:
    """Return calibration images in batches, each image beside its mirror image."""
    generator = torch.Generator().manual_seed(draw)
    order = torch.randperm(len(case.calibration), generator=generator)[:images]
    chosen = case.calibration[order if draw else torch.arange(images)]
    if not flips:
        return list(chosen.split(BATCH))
    return [torch.cat([part, part.flip(-1)]) for part in chosen.split(BATCH // 2)]


def share(program: Program, plan: Any) -> float:
    """Return the share of the multiply-accumulates that is left."""
    small = narrows.apply(program, plan, check=False)
    return count(small) / count(program)


def count(program: Program) -> int:
    """Return the multiply-accumulates of a program."""
    works = works_of(program)
    return sum(macs(node, works) for node in program.graph.nodes if node.op == "call_function")


def chosen(case: Case, name: str, budget: float, data: list[Tensor]) -> Any:
    """Return the plan of a method, without its repair."""
    kind, _, allocator = name.partition(":")
    allocator, _, couplings = allocator.partition(":")
    searched = kind in ("losses", "couplings", "allocator")
    if searched:
        return narrows.plan(
            case.program, macs=budget, data=data, constrained="couplings" in (kind, couplings),
            allocator=allocator or None,
        )  # fmt: skip
    if kind in TIMED:
        limit = {"latency": budget}
        if allocator == "measured":
            limit = {"limits": {"measured{bits=8}": budget}}
        return narrows.plan(
            case.program, target="onnx", integers=kind == "int8", data=data, **limit
        )
    seen = data if measures(find(name)) else None
    return narrows.plan(case.program, macs=budget, criterion=name, constrained=False, data=seen)


def figure(case: Case, method: str, budget: float, data: list[Tensor]) -> dict[str, Any]:
    """Return what a method keeps."""
    start = time.process_time()
    name, _, repair = method.partition("+")
    kind = name.partition(":")[0]
    integers = kind == "int8" or name == "onnx:8"
    made, plan = case.program, None
    if budget < 1:
        plan = chosen(case, name, budget, data)
    found = time.process_time()
    usual = "repair" if kind in ("losses", "couplings", "allocator", *TIMED) else "none"
    repair = repair or usual
    if plan is not None and repair != "none":
        solve = "least-squares" if repair == "repair" else repair
        made = narrows.compensate(case.program, plan, data=data, method=solve)
    end = time.process_time()
    row = {
        "share": round(1.0 if plan is None else share(made, plan), 4),
        "cpu": round(end - start, 1), "solved": round(end - found, 1),
    }  # fmt: skip
    small = made
    if kind in TIMED:
        small = narrows.apply(made, plan, target="onnx", integers=integers)
    if integers:
        small = narrows.quantize(small, data).program
    if kind in TIMED:
        row["took"] = round(Stopwatch(case.program, "onnx")(small), 3)
    runs = small if integers or plan is None else plan.masked(made)
    with torch.no_grad():
        return {**case.measure(runner(case, runs, integers)), **row}


def runner(case: Case, program: Program, integers: bool) -> Callable[[Tensor], Tensor]:
    """Return what runs a program: integers in ONNX Runtime, whose bits are the interpreter's."""
    if not integers:
        return lambda x: program.run_flat([x])[0]
    artifact = narrows.lower(program, "onnx")
    return lambda x: torch.from_numpy(artifact.run(x, threads=1))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--zoo", required=True, metavar="DIR")
    parser.add_argument("--models", nargs="+", default=["resnet20_cifar10"])
    parser.add_argument("--macs", nargs="+", type=float, default=[0.7, 0.5])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--flips", action="store_true", help="each image beside its mirror image")
    parser.add_argument("--draws", type=int, default=1, help="of the calibration images")
    parser.add_argument("--tested", type=int, default=5000, help="samples of the figure")
    parser.add_argument("--results", metavar="FILE", help="JSON, kept and gone on with")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    zoo, results = load_zoo(arguments.zoo), Results(arguments.results)
    lines = []
    for name in arguments.models:
        case = Case(zoo, name, 512, arguments.tested)
        full = results.row(f"{name} {case.tested}", lambda c=case: c.measure(c.model))
        for budget in arguments.macs:
            for method in arguments.methods:
                rows = []
                for draw in range(arguments.draws):
                    data = drawn(case, arguments.images, draw, arguments.flips)
                    label = f"{name} {case.tested} {budget} {method} {arguments.images} {draw}"
                    label += " flips" if arguments.flips else ""
                    rows.append(
                        results.row(
                            label, lambda c=case, m=method, b=budget, d=data: figure(c, m, b, d)
                        )
                    )
                found = [row["figure"] for row in rows]
                lines.append([
                    name, f"{full['figure']:.2f}", f"{budget:g}", method,
                    " ".join(f"{value:.2f}" for value in found),
                    f"{max(row['share'] for row in rows):.3f}",
                    " ".join(f"{row['took']:.3f}" for row in rows if "took" in row),
                    f"{max(row['cpu'] for row in rows):.0f}",
                ])  # fmt: skip
    header = ["network", "unpruned", "budget", "method", "per draw", "macs", "took", "CPU seconds"]
    print(table(header, lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
