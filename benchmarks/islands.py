"""Mixed precision: every node of every test network kept in float, one at a time.

    python -m benchmarks.islands [--networks residual_plain ...] [--forms qdq qlinear integer]

Each network is quantized with one node skipped, written as ONNX and checked, with the runtime's
optimizations and without: what follows an island has to equal the integer program bit for bit.
Prints what fails, and exits with 1 if anything does. All of it takes hours on one core; ``--sample
3`` takes three nodes a network.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence

import torch

import narrows
from narrows.passes.quant.quantization import preparation
from narrows.passes.quant.survey import survey
from tests.networks import NETWORKS

FORMS = ("qdq", "qlinear", "integer")


def captured(name: str) -> tuple[narrows.Program, tuple[torch.Tensor, ...]]:
    """Return a test network in float32, and inputs for it."""
    found = NETWORKS[name]
    inputs = tuple(x.float() if x.is_floating_point() else x for x in found.inputs(4, 1))
    return narrows.capture(found.build().float(), inputs), inputs


def failures(name: str, forms: Sequence[str], sample: int | None) -> Iterator[tuple[str, str]]:
    """Yield a node and what fails, or a node and nothing, for the nodes that could be integers."""
    program, inputs = captured(name)
    nodes = [n.name for n in survey(preparation().run(program).program).forms]
    random.Random(0).shuffle(nodes)
    for node in nodes[:sample]:
        try:
            made = narrows.quantize(program, [inputs], skip=[node]).program
            for form in forms:
                narrows.lower(made, form=form, samples=1)
        except Exception as error:  # a crash is a finding, too
            yield node, f"{type(error).__name__}: {' | '.join(str(error).splitlines())}"
        else:
            yield node, ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--forms", nargs="+", default=["qdq"], choices=FORMS)
    parser.add_argument("--sample", type=int, help="nodes a network; all of them if not given")
    asked = parser.parse_args(arguments)
    tried = failed = 0
    for name in asked.networks:
        for node, why in failures(name, asked.forms, asked.sample):
            tried += 1
            failed += bool(why)
            if why:
                print(f"{name} without {node}: {why}", flush=True)
    print(f"{tried:,} islands in {len(asked.networks)} networks, {failed} fail")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
