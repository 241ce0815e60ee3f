"""What trained networks lose in integers, by bits and by how the grids were chosen.

    python -m benchmarks.quantized_accuracy --zoo DIR --models resnet20_cifar10 --bits 4,4 2,4
        --budget 2200 --results accuracy.json

``DIR`` holds trained networks and data behind a module ``zoo.py``: ``MODELS``, ``load``,
``preprocess``, ``load_cifar10_calib`` and so on. Every row of the table is kept in the file of
results as soon as it is there, and is not measured again.

The methods: ``minmax`` covers every number (naive), ``mse`` has the smallest squared error,
``auto`` is the one that changes the outputs least on samples held back from calibration, and
``rapq`` reconstructs block by block, all three with scales that are powers of two; ``free`` is the
same reconstruction with any scale, which no integer program of shifts can have: an upper line. With
``+levels`` activations of few bits may have levels of unequal width, chosen at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import narrows
from benchmarks.machine import describe, table
from narrows.passes.quant.calibrate import calibrate
from narrows.passes.quant.exactness import assert_exact
from narrows.passes.quant.learning import Learning
from narrows.passes.quant.options import Quantization
from narrows.passes.quant.quantization import preparation, quantize
from narrows.passes.quant.rapq import Reconstruction
from narrows.passes.quant.reconstruct import Steps

BITS = ("8,8", "6,6", "4,4", "3,3", "2,4")
METHODS = ("minmax", "mse", "auto", "rapq", "free")
LEVELS = tuple(f"{method}+levels" for method in METHODS[:4])
FREE = Steps(
    activation=tuple(2 ** (k / 8) for k in (-4, -2, -1, 1, 2, 4)),
    weight=(1.0, *(2 ** (k / 8) for k in range(-8, 9) if k)),
)
BATCH = 32


class Case:
    """A trained network with its data and its figure of merit.

    Args:
        zoo: The module with networks and data.
        name: Of the network.
        samples: For calibration.
        tested: How many samples the figure is of.
    """

    def __init__(self, zoo: Any, name: str, samples: int, tested: int) -> None:
        self.zoo, self.name = zoo, name
        self.kind = zoo.MODELS[name]["data"]
        self.model = zoo.load(name)
        # A causal mask of -inf has no grid: the sum with it, and its softmax, stay float islands.
        self.skip = ("*.mask", "*softmax*") if self.kind == "tinystories" else ()
        self.calibration: Tensor
        self.measure: Callable[[Callable[[Tensor], Tensor]], dict[str, Any]]
        getattr(self, f"_{self.kind}")(samples, tested)
        self.program = narrows.capture(self.model, (self.calibration[:2],), name=name)

    def _cifar10(self, samples: int, tested: int) -> None:
        x, _ = self.zoo.load_cifar10_calib(samples)
        self._images(x, *self.zoo.load_cifar10_test(tested))

    def _imagenet(self, samples: int, tested: int) -> None:
        x, _ = self.zoo.load_imagenet_sample("calib", samples)
        self._images(x, *self.zoo.load_imagenet_sample("val", tested))

    def _images(self, x: Tensor, tested: Tensor, labels: Tensor) -> None:
        self.calibration, self.tested = self.zoo.preprocess(self.name, x), len(labels)

        def measure(run: Callable[[Tensor], Tensor]) -> dict[str, Any]:
            parts = zip(tested.split(2 * BATCH), labels.split(2 * BATCH), strict=True)
            with torch.no_grad():
                right = [run(self.zoo.preprocess(self.name, x)).argmax(1) == y for x, y in parts]
            wrong = (~torch.cat(right)).nonzero().flatten().tolist()
            return {"figure": round(100 - 100 * len(wrong) / self.tested, 3), "wrong": wrong}

        self.measure = measure

    def _tinystories(self, samples: int, tested: int) -> None:
        self.calibration = self.zoo.load_tinystories("calib")[:samples, :-1]
        tokens = self.zoo.load_tinystories("test")[:tested]
        self.tested = len(tokens)
        self.measure = lambda run: {"figure": round(self.zoo.perplexity(run, tokens)[1], 3)}

    def _traffic(self, samples: int, tested: int) -> None:
        # Scenes of the test itself: there are no others, and no labels are used.
        x, truths = self.zoo.load_traffic(tested)
        self.calibration, self.tested = self.zoo.preprocess(self.name, x[:samples]), len(x)
        self.measure = lambda run: {"figure": round(self.zoo.detection_ap50(run, x, truths), 3)}

    def quantized(self, method: str, weights: int, activations: int, learning: Learning) -> Any:
        """Return what runs the network quantized."""
        items = list(self.calibration.split(BATCH))
        if method == "free":
            return self._free(items, weights, activations, learning)
        plain = method.removesuffix("+levels")
        settings = self._settings(weights, activations, method=plain, levels=plain != method)
        made = quantize(self.program, items, settings, learning=learning)
        assert_exact(made.fake, made.program, items[0])
        return made.fake

    def _settings(self, weights: int, activations: int, **more: Any) -> Quantization:
        return Quantization(weights=weights, activations=activations, skip=self.skip, **more)

    def _free(
        self, items: Sequence[Tensor], weights: int, activations: int, learning: Learning
    ) -> Callable[[Tensor], Tensor]:
        settings = self._settings(weights, activations, correct_bias=False)
        prepared = preparation(activations).run(self.program, []).program
        plan = calibrate(prepared, items, dataclasses.replace(settings, method="mse"))
        learned = self._settings(weights, activations, method="rapq")
        work = Reconstruction(self.program, prepared, items, plan, learned, learning, steps=FREE)
        work.reconstruct()
        trial, (holder,) = work.trial, prepared.placeholders
        whole, x = trial.span(trial.output, []), trial.named[holder.name]

        def run(value: Tensor) -> Tensor:
            with torch.no_grad():
                (made,) = trial.run(whole, {x: value.to(trial.device)}, "hard")
            return made.cpu()

        return run


def load_zoo(folder: str) -> Any:
    """Return the module ``zoo.py`` of a folder."""
    spec = importlib.util.spec_from_file_location("zoo", Path(folder) / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Results:
    """Rows by name, in a file that is written after each."""

    def __init__(self, path: str | None) -> None:
        self.path = None if path is None else Path(path)
        self.rows: dict[str, Any] = {}
        if self.path is not None and self.path.exists():
            self.rows = json.loads(self.path.read_text())["results"]

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a row that is known, or measure it."""
        if name in self.rows:
            return self.rows[name]
        start = time.monotonic()
        self.rows[name] = {**measure(), "seconds": round(time.monotonic() - start, 1)}
        told = {k: v for k, v in self.rows[name].items() if k != "wrong"}
        print(f"{name}: {told}", file=sys.stderr, flush=True)
        if self.path is not None:
            draft = self.path.with_suffix(".part")
            text = json.dumps({"machine": describe(), "results": self.rows}, indent=1)
            draft.write_text(text + "\n")
            os.replace(draft, self.path)
        return self.rows[name]


def line(
    case: Case,
    results: Results,
    weights: int,
    activations: int,
    methods: Sequence[str],
    learning: Learning,
) -> list[str]:
    """Return a line of the table: the network as it is, and by every method."""
    plain = results.row(f"{case.name} float {case.tested}", lambda: case.measure(case.model))
    cells = [f"{case.name} W{weights}A{activations}", f"{plain['figure']:.2f}"]
    for method in methods:
        learned = ""
        if method.startswith(("rapq", "free")):
            learned = f" {learning.budget} by {learning.batch}"
        name = f"{case.name} W{weights}A{activations} {method}"
        row = results.row(
            f"{name} {len(case.calibration)} {case.tested}{learned}",
            lambda m=method: case.measure(case.quantized(m, weights, activations, learning)),
        )
        cells.append(f"{row['figure']:.2f}{paired(plain, row, case.tested)}")
    return cells


def paired(plain: dict[str, Any], row: dict[str, Any], tested: int) -> str:
    """Return by how much a row differs from the network as it is, image by image, in points.

    Images that both get right or wrong say nothing of the difference, so its standard error is that
    of the others alone, several times less than the error of either figure.
    """
    if "wrong" not in plain or "wrong" not in row:  # another figure, or kept by an older version
        return ""
    before, after = set(plain["wrong"]), set(row["wrong"])
    difference, error = len(before) - len(after), math.sqrt(len(before ^ after))
    return f" ({100 * difference / tested:+.2f} ± {100 * error / tested:.2f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--zoo", required=True, metavar="DIR")
    parser.add_argument("--models", nargs="+", default=["resnet20_cifar10"])
    parser.add_argument("--bits", nargs="+", default=list(BITS), metavar="W,A")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS + LEVELS)
    parser.add_argument("--samples", type=int, default=512, help="for calibration")
    parser.add_argument("--tested", type=int, default=5000, help="samples of the figure")
    parser.add_argument("--budget", default=None, help="iterations in all, or a time: 600s")
    parser.add_argument("--batch", type=int, default=32, help="samples of an iteration")
    parser.add_argument("--results", metavar="FILE", help="JSON, kept and gone on with")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    budget = int(arguments.budget) if (arguments.budget or "s").isdigit() else arguments.budget
    learning = Learning(budget=budget, batch=arguments.batch)
    zoo, results = load_zoo(arguments.zoo), Results(arguments.results)
    lines = []
    for name in arguments.models:
        case = Case(zoo, name, arguments.samples, arguments.tested)
        lines += [
            line(case, results, *map(int, bits.split(",")), arguments.methods, learning)
            for bits in arguments.bits
        ]
    print(table(["network", "float", *arguments.methods], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
