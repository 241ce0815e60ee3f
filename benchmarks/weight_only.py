"""A language model with weights in few bits: its perplexity, and how fast such layers are.

    python -m benchmarks.weight_only KIT [--bits 8 4 3] [--group 32] [--rows 48]
    OMP_NUM_THREADS=1 python -m benchmarks.weight_only --speed [--width 1024] [--tokens 1 32]

The second needs no KIT: two feed-forward blocks with a gate, random weights, in ONNX Runtime in
turns with the float model: thread CPU time, the median of the turns' ratios, and bytes over bytes.

KIT is a folder with ``zoo.py``, which loads a Llama of 260,000 parameters (``load_stories260k``)
and rows of tokens (``load_tinystories``). Calibrated on the first 16 rows, measured on the next
ones. One line per number of bits, method and axis of the groups; with ``dynamic`` groups lie along
the inputs, and what they multiply is rounded, too. The embedding, which is the head, stays
floating-point.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor, nn

import narrows
from benchmarks.machine import describe, table, write
from narrows.backends.timing import measure

ROUNDS = 25
CALIBRATION = 16  # rows


class Block(nn.Module):
    """A feed-forward block with a gate, as language models have them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        wide = width * 8 // 3 // 128 * 128
        self.gate, self.up = (nn.Linear(width, wide, bias=False) for _ in range(2))
        self.down = nn.Linear(wide, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to tokens ``[tokens, width]``."""
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def speed(given: argparse.Namespace) -> int:
    """Time layers in every form, and print the table."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(given.width), Block(given.width)).eval()
    program = narrows.capture(model, (torch.randn(2, given.width),), name="blocks")
    whole = narrows.lower(program)
    rows, found = [], {}
    for bits in given.bits:
        for activations in ("float", "dynamic"):
            how = {"bits": bits, "group": given.group, "activations": activations}
            small = narrows.quantize_weights(program, method="nearest", groups="input", **how)
            artifact = narrows.lower(small)
            row = [str(bits), activations, f"{artifact.size / whole.size:.3f}"]
            for tokens in given.tokens:
                made, plain = measure([artifact, whole], tokens, ROUNDS, 1)
                ratio = median(a / b for a, b in zip(made.cpu, plain.cpu, strict=True))
                row.append(f"{ratio:.2f}")
            rows.append(row)
            found[f"{bits} {activations}"] = row[2:]
    write(given.json, {"machine": describe(), "results": found})
    print(table(["bits", "activations", "bytes", *(f"{t} tokens" for t in given.tokens)], rows))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weight_only")
    parser.add_argument("kit", nargs="?")
    parser.add_argument("--speed", action="store_true", help="times of layers, without a KIT")
    parser.add_argument("--width", type=int, default=1024, help="of the layers that are timed")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32], help="in a call")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3])
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--rows", type=int, default=48)
    given = parser.parse_args(argv)
    if given.speed:
        return speed(given)
    if given.kit is None:
        parser.error("KIT is a folder with zoo.py; or --speed")
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
            for groups in ("input", "output", "auto", "dynamic"):
                how = {"bits": bits, "group": given.group, "groups": groups, "method": method}
                if groups == "dynamic":
                    how |= {"groups": "input", "activations": "dynamic"}
                made = narrows.quantize_weights(program, calibration, **how)
                axes = [n.message.endswith("channels") for n in made.notes if n.reason == "weights"]
                score = f"{zoo.perplexity(made, rows)[1]:.4f}"
                found.append((str(bits), method, groups, score, f"{sum(axes)} of {len(axes)}"))
                print(" ".join(found[-1]), file=sys.stderr, flush=True)
    print(table(header, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
