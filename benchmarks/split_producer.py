"""A producer made once per reader, against the best form with one producer.

    python -m benchmarks.split_producer [--json F]

A 1x1 convolution makes 128 channels at 56x56, and two 3x3 convolutions read 64 of them each, drawn
at random. Both forms are narrows' own choice for ONNX Runtime, the second one without the choice of
making the producer twice. They run in turns in one process, batch 1, one thread, by CPU time.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import narrows
from benchmarks.machine import table, write
from benchmarks.reorder.timing import interleaved, ratio, spread
from narrows.backends import make_target
from narrows.passes.pruning import stages

SIZES = ((16, 16), (16, 64), (64, 64))  # channels into the producer, out of each reader
WIDTH, IMAGE = 128, 56


class Fork(nn.Module):
    """A producer with two readers."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, inputs, 3, padding=1)
        self.producer = nn.Conv2d(inputs, WIDTH, 1)
        self.readers = nn.ModuleList(nn.Conv2d(WIDTH, outputs, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.producer(self.stem(x).relu()).relu()
        return tuple(reader(x) for reader in self.readers)


def measure(inputs: int, outputs: int, rounds: int, budget: float) -> dict[str, Any]:
    """Return what both forms take, measured and predicted."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, IMAGE, IMAGE, generator=draw)
    program = narrows.capture(Fork(inputs, outputs).eval(), (x,))
    keep = {
        f"readers.{i}.weight": sorted(torch.randperm(WIDTH, generator=draw)[: WIDTH // 2].tolist())
        for i in range(2)
    }
    plan = narrows.plan(program, keep_inputs=keep, zeros=False)
    forms = {"split": narrows.apply(program, plan, target="onnx")}
    with mock.patch.object(stages, "apart", return_value=None):
        forms["one"] = narrows.apply(program, plan, target="onnx")
    costs = make_target("onnx").costs()
    assert costs is not None
    predicted = {name: sum(s for _, s in costs.predict(form)) for name, form in forms.items()}
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for name, form in forms.items():
            narrows.lower(form, "onnx").save(Path(folder) / name)
            opened = narrows.load(Path(folder) / name)
            runs[name] = lambda opened=opened: opened.run_flat([x.numpy()])
            runs[name]()
        found = interleaved(runs, rounds, budget)
    return {
        "inputs": inputs, "outputs": outputs, "ms": 1e3 * min(found["one"]),
        "producers": sum("producer" in n.name and "conv2d" in str(n.target)
                         for n in forms["split"].graph.nodes),
        "ratio": ratio(found, "split", "one"), "quartiles": spread(found, "split", "one"),
        "predicted": predicted["split"] / predicted["one"],
    }  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing per network")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(*sizes, options.rounds, options.budget) for sizes in SIZES]
    rows = [
        (f"{r['inputs']} to {WIDTH}, to twice {r['outputs']}", str(r["producers"]),
         f"{r['ms']:.2f}", f"{r['ratio']:.2f}", "{:.2f}-{:.2f}".format(*r["quartiles"]),
         f"{r['predicted']:.2f}")
        for r in results
    ]  # fmt: skip
    header = ("channels", "producers", "ms with one", "split / one", "quartiles", "predicted")
    print(table(header, rows))
    write(options.json, results)


if __name__ == "__main__":
    main()
