"""A small language model with weights in few bits: its perplexity.

    python -m benchmarks.weight_only KIT [--bits 8 4 3] [--group 32] [--rows 48]

KIT is a folder with ``zoo.py``, which loads a Llama of 260,000 parameters (``load_stories260k``)
and rows of tokens (``load_tinystories``). Calibrated on the first 16 rows, measured on the next
ones. One line per number of bits, method and axis of the groups; the embedding, which is the head,
too, stays floating-point.
"""

from __future__ import annotations

import argparse
import importlib
import sys

import narrows
from benchmarks.machine import table

CALIBRATION = 16  # rows


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weight_only")
    parser.add_argument("kit")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3])
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--rows", type=int, default=48)
    given = parser.parse_args()
    sys.path.insert(0, given.kit)
    zoo = importlib.import_module("zoo")
    tokens = zoo.load_tinystories()
    calibration = [rows[:, :-1] for rows in tokens[:CALIBRATION].split(8)]
    rows = tokens[CALIBRATION : CALIBRATION + given.rows]
    program = narrows.capture(zoo.load_stories260k(), (tokens[:2, :-1],), name="stories260k")
    header = ("bits", "method", "groups", "perplexity", "along output channels")
    found = [("32", "", "", f"{zoo.perplexity(program, rows)[1]:.4f}", "")]
    for bits in given.bits:
        for method in ("nearest", "gptq"):
            for groups in ("input", "output", "auto"):
                how = {"bits": bits, "group": given.group, "groups": groups, "method": method}
                made = narrows.quantize_weights(program, calibration, **how)
                axes = [n.message.endswith("channels") for n in made.notes if n.reason == "weights"]
                score = f"{zoo.perplexity(made, rows)[1]:.4f}"
                found.append((str(bits), method, groups, score, f"{sum(axes)} of {len(axes)}"))
                print(" ".join(found[-1]), file=sys.stderr, flush=True)
    print(table(header, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
