"""`narrows demo`: a real network from training to a smaller artifact, with every number measured.

A small residual network with a concat branch learns scikit-learn's handwritten digits. The demo
then captures it, plans, prunes, exports, fine-tunes what is left, and turns that into integers.
Read `run` first.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrows import api
from narrows.backends.artifact import Artifact
from narrows.backends.c.compiler import HINT, MISSING, find_compiler
from narrows.errors import ArtifactError, UsageError
from narrows.ir.program import Program, op_name, relative_error
from narrows.passes.instruments import Dumper
from narrows.passes.pipeline import Instrument, format_count, format_table, macs
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.quant.quantization import Quantized

SEED = 0
# The group lasso's strength, per learning rate and square root of a column's size.
PENALTY = 0.18
# What is done before more training: all but folding the norms, which train on.
TRAINABLE = "prune-channels, legalize-reads, align-channels, reorder-channels"


@dataclass(frozen=True)
class Settings:
    """How much work the demo does.

    Attributes:
        width: Channels of the network's first half; the second has twice as many.
        epochs: Epochs of training.
        more_epochs: Epochs of fine-tuning.
        ratios: The ratios to choose from, rising.
        allowed_fall: How much accuracy on the validation images the chosen ratio may cost, 0..1.
        rounds: How often each artifact is timed.
    """

    width: int
    epochs: int
    more_epochs: int
    ratios: tuple[float, ...]
    allowed_fall: float
    rounds: int


FULL = Settings(48, 20, 5, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), 0.02, 40)
QUICK = Settings(16, 4, 1, (0.25,), 1.0, 3)


class Residual(nn.Module):
    """Two convolutions and a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of ``x``."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


class DigitsNet(nn.Module):
    """Residual blocks around a concat of two branches: ``[b,1,8,8]`` to ``[b,10]``."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.block1 = Residual(width)
        self.branch1 = nn.Conv2d(width, width, 1)
        self.branch3 = nn.Conv2d(width, width, 3, padding=1)
        self.join = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.join_norm = nn.BatchNorm2d(2 * width)
        self.block2 = Residual(2 * width)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        x = self.block1(F.relu(self.stem_norm(self.stem(x))))
        x = torch.cat([F.relu(self.branch1(x)), F.relu(self.branch3(x))], dim=1)
        x = self.block2(F.relu(self.join_norm(self.join(x))))
        return self.head(self.dropout(x.mean((2, 3))))

    def sparse(self) -> list[nn.Conv2d]:
        """Return the convolutions that learn which channels they need."""
        blocks = (*self.block1.modules(), self.join, *self.block2.modules())
        return [m for m in blocks if isinstance(m, nn.Conv2d)]


@dataclass(frozen=True)
class Split:
    """Images ``[n,1,8,8]`` in 0..1 and their digits ``[n]``."""

    images: Tensor
    digits: Tensor

    def accuracy(self, run: Callable[[Tensor], Any]) -> float:
        """Return the share of images that ``run`` gets right, 0..1."""
        with torch.no_grad():
            logits = torch.as_tensor(run(self.images))
        return (logits.argmax(1) == self.digits).double().mean().item()


def load_splits() -> tuple[Split, Split, Split]:
    """Return 1,197 images to train on, 200 to choose the ratio with and 400 to test on."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError(
            "the demo needs scikit-learn for its data", hint="pip install 'narrows[demo]'"
        ) from None
    data: Any = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    digits = torch.tensor(data.target)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(SEED))
    train, validation, test = order.split([len(order) - 600, 200, 400])
    return tuple(Split(images[i], digits[i]) for i in (train, validation, test))  # type: ignore


def train(
    model: nn.Module,
    split: Split,
    epochs: int,
    rate: float,
    label: str,
    sparse: Sequence[nn.Conv2d] = (),
) -> float:
    """Train in place and leave the model in eval mode; returns the seconds it took.

    Args:
        model: The model.
        split: What it learns.
        epochs: How often it sees all of it.
        rate: The highest learning rate.
        label: What `progress` calls it.
        sparse: Convolutions whose input channels are pulled to zero.
    """
    start = time.perf_counter()
    batches = torch.utils.data.DataLoader(
        range(len(split.digits)),  # type: ignore[arg-type]
        batch_size=64,
        shuffle=True,
        generator=torch.Generator().manual_seed(SEED),
    )
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=epochs * len(batches)
    )
    model.train()
    for epoch in range(epochs):
        progress(f"{label}: epoch {epoch + 1} of {epochs}")
        for rows in batches:
            loss = F.cross_entropy(model(split.images[rows]), split.digits[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            shrink_columns(sparse, PENALTY * float(schedule.get_last_lr()[0]))
            schedule.step()
    progress("")
    model.eval()
    return time.perf_counter() - start


@torch.no_grad()
def shrink_columns(convolutions: Sequence[nn.Conv2d], step: float) -> None:
    """Take a proximal step of the group lasso: input channels shrink, the weakest become zero."""
    for convolution in convolutions:
        weight = convolution.weight
        reach = step * math.sqrt(weight[:, 0].numel())
        norms = weight.square().sum((0, 2, 3), keepdim=True).sqrt()
        weight.mul_((1 - reach / norms.clamp_min(1e-12)).clamp_min(0))


def progress(text: str) -> None:
    """Show one changing line on a terminal, nothing elsewhere."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: steady times, and two threads that share a busy core only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------ compiling


def choose_plan(
    program: Program, validation: Split, settings: Settings
) -> tuple[ChannelPlan, float]:
    """Return the plan of the largest ratio that costs no more than is allowed, and the ratio.

    Every consumer chooses its input channels for itself, by L1 norm; the zeros come on top.
    """
    full = validation.accuracy(program)
    best, chosen = api.plan(program, zeros=True), 0.0
    for ratio in settings.ratios:
        plan = api.plan(program, zeros=True, criterion="l1", ratio=ratio, constrained=False)
        if validation.accuracy(plan.masked(program)) < full - settings.allowed_fall:
            break
        best, chosen = plan, ratio
    return best, chosen


@dataclass(frozen=True)
class Candidate:
    """One of the artifacts that the demo compares.

    Attributes:
        name: ``unpruned``, ``pruned``, ``tuned`` or ``quantized``.
        program: What was lowered.
        artifact: What came out.
        accuracy: The artifact's accuracy on the test images, run in ONNX Runtime, 0..1.
    """

    name: str
    program: Program
    artifact: Artifact
    accuracy: float


def lower(
    name: str, program: Program, test: Split, folder: Path, plan: ChannelPlan | None = None
) -> Candidate:
    """Return the program as an artifact saved in ``folder / name``, with its accuracy."""
    progress(f"lowering the {name} program")
    api.lower(program, "onnx", plan=plan).save(folder / name)
    progress("")
    artifact = api.load(folder / name)  # what is measured is what was written
    return Candidate(name, program, artifact, test.accuracy(artifact.run))


def quantize(program: Program, training: Split, watches: Sequence[Instrument]) -> Quantized:
    """Return the program in 8-bit integers and shifts, calibrated on the training images."""
    progress("calibrating")
    quantized = api.quantize(program, training.images.split(64), instruments=watches)
    progress("")
    return quantized


def count_differing(candidate: Candidate, images: Tensor) -> int:
    """Return how many outputs differ between an artifact and the program it was lowered from.

    Both compare with ``==``: the artifact runs with the runtime's optimizations, and without.
    """
    expected = candidate.program(images)
    runs = [candidate.artifact.run_flat([images], optimize=optimize) for optimize in (True, False)]
    return sum(int((torch.as_tensor(got) != expected).sum()) for (got,) in runs)


def lower_to_c(quantized: Candidate, images: Tensor, folder: Path) -> dict[str, Any]:
    """Return what the program takes in C, and how many outputs differ from the interpreter's.

    The C files are saved in ``folder / "c"``. Without a compiler they are only written; the result
    has the reason as ``skipped``.
    """
    progress("writing C")
    api.lower(quantized.program, "c", check=False).save(folder / "c")
    artifact = api.load(folder / "c")
    facts = {k: artifact.manifest["c"][k] for k in ("arena", "bound", "constants")}
    if not find_compiler():
        return facts | {"skipped": f"{MISSING}; {HINT}"}
    progress("compiling C")
    name = artifact.inputs[0].name
    session: Any = artifact.session
    results = session.run_many([{name: image[None].numpy()} for image in images])
    progress("")
    got = torch.cat([torch.from_numpy(result[0]) for result in results])
    return facts | {"differing": int((got != quantized.program(images)).sum())}


def measure_latency(
    candidates: Sequence[Candidate], images: Tensor, rounds: int
) -> dict[str, dict[str, float]]:
    """Return per candidate the median ``seconds`` of a run and the ``speedup`` over the first one.

    One thread. The candidates take turns, so that a machine that changes its speed does so for all
    of them; the speedup is the median of the ratios of neighbouring runs.
    """
    array = images.numpy()
    runs = {
        c.name: functools.partial(
            c.artifact.open(threads=1).run, {c.artifact.inputs[0].name: array}
        )
        for c in candidates
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 3):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(8):
                run()
            if turn >= 3:  # the first turns warm caches and clocks
                times[name].append((time.perf_counter() - start) / 8)
    base = times[candidates[0].name]
    return {
        name: {
            "seconds": statistics.median(own),
            "speedup": statistics.median(b / o for b, o in zip(base, own, strict=True)),
        }
        for name, own in times.items()
    }


# ------------------------------------------------------------------ the story


def run(folder: str | os.PathLike[str], *, quick: bool = False) -> dict[str, Any]:
    """Run the demo, write its artifacts and dump below ``folder``, and return what it measured.

    Args:
        folder: Gets ``unpruned``, ``pruned``, ``tuned``, ``quantized`` and ``c`` (artifacts),
            ``dump`` (from the trained network to the pruned one), ``dump-quantized`` (from the
            tuned one to integers), ``plan.json`` and ``quant.json``. Those of an earlier demo are
            replaced.
        quick: Train a little and measure roughly, to see that everything works.
    """
    with one_thread():
        return tell(make_folder(folder), QUICK if quick else FULL)


def tell(folder: Path, settings: Settings) -> dict[str, Any]:
    """Return what `run` does; the folder exists."""
    start = time.perf_counter()
    training, validation, test = load_splits()
    torch.manual_seed(SEED)
    model = DigitsNet(settings.width)
    seconds = train(model, training, settings.epochs, 6e-3, "training", model.sparse())
    accuracy = {"trained": test.accuracy(model)}

    program = api.capture(model, (training.images[:8],), name="digits")
    plan, ratio = choose_plan(program, validation, settings)
    plan.save(folder / "plan.json")
    masked = plan.masked(program)
    accuracy["masked"] = test.accuracy(masked)
    result = api.rewrite(
        program, plan, target="onnx", double=True, instruments=[Dumper(folder / "dump")]
    )
    error = relative_error(result.program(test.images), masked(test.images))

    trainable = api.apply(program, plan, target="onnx", pipeline=TRAINABLE).to_module()
    seconds_more = train(trainable, training, settings.more_epochs, 1e-3, "fine-tuning")
    again = api.capture(trainable, (training.images[:8],), name="digits-tuned")

    watches = [Dumper(folder / "dump-quantized")]
    tuned = api.apply(again, target="onnx", instruments=watches)
    quantized = quantize(tuned, training, watches)
    quantized.plan.save(folder / "quant.json")

    unpruned = api.apply(program, pipeline="fold-batch-norm, eliminate-dead")
    candidates = [
        lower("unpruned", unpruned, test, folder),
        lower("pruned", result.program, test, folder, plan),
        lower("tuned", tuned, test, folder),
        lower("quantized", quantized.program, test, folder),
    ]
    return {
        "images": {"train": 1197, "validation": 200, "test": 400},
        "ratio": ratio,
        "allowed_fall": settings.allowed_fall,
        "channels_removed": {"zeros": api.plan(program).removed, "plan": plan.removed},
        "accuracy": accuracy | {c.name: c.accuracy for c in candidates},
        "passes": [r.to_json() for r in (result.initial, *result.reports)],
        "table": result.table(),
        "error": error,
        "quantize_passes": [r.to_json() for r in quantized.passes],
        "quantize_table": format_table(quantized.passes),
        "floats": dict(quantized.plan.floats),
        "differing": count_differing(candidates[-1], test.images),
        "c": lower_to_c(candidates[-1], test.images, folder),
        "parameters": {c.name: c.program.parameter_count for c in candidates},
        "macs": {c.name: sum(macs(c.program).values()) for c in candidates},
        "bytes": {c.name: c.artifact.size for c in candidates},
        "copies": sum(op_name(n) == "index_select.default" for n in result.program.nodes),
        "convolutions": convolution_widths(result.program),
        "latency": {
            f"batch {n}": measure_latency(candidates, test.images[:n], settings.rounds)
            for n in (1, 64)
        },
        "seconds": {
            "training": seconds,
            "fine-tuning": seconds_more,
            "all": time.perf_counter() - start,
        },
    }


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the folder, made if need be; `ArtifactError` before any work if that is impossible."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise ArtifactError(f"cannot make {path}", why=str(cause.strerror)) from cause
    if not os.access(path, os.W_OK):
        raise ArtifactError(f"cannot write to {path}")
    return path


def describe(report: dict[str, Any]) -> str:
    """Return the report as text for a person."""
    names = list(report["parameters"])
    count, accuracy, seconds = report["images"], report["accuracy"], report["seconds"]
    removed = report["channels_removed"]
    rows: list[list[str]] = [["", *names]]
    rows.append(["parameters", *(format_count(report["parameters"][n]) for n in names)])
    rows.append(["MACs", *(format_count(report["macs"][n]) for n in names)])
    rows.append(["artifact", *(f"{report['bytes'][n] / 1024:.0f} KiB" for n in names)])
    rows.append(["test accuracy", *(f"{accuracy[n]:.2%}" for n in names)])
    for batch, timed in report["latency"].items():
        rows.append([batch, *(f"{timed[n]['seconds'] * 1e6:.0f} us" for n in names)])
        rows.append(["  speed", *(f"{timed[n]['speedup']:.2f} x" for n in names)])
    lines = [
        f"{count['train']:,} digits to train on ({seconds['training']:.0f} s), "
        f"{count['validation']} to choose the ratio with, {count['test']} to test on",
        f"test accuracy {accuracy['trained']:.2%} trained, {accuracy['masked']:.2%} masked",
        f"plan: {removed['zeros']} channels that training left at zero, {removed['plan']} with the "
        f"weakest {report['ratio']:.0%} of what each layer reads;",
        f"the ratio is the largest tried that costs {report['allowed_fall']:.0%} of validation "
        "accuracy or less",
        "",
        report["table"].rstrip(),
        "error: largest difference from what each pass owes, relative to the largest output",
        f"pruned against masked, on the test images: {report['error']:.1e}",
        "",
        report["quantize_table"].rstrip(),
        f"quantized: {differing(report)}",
        f"C: {describe_c(report['c'])}",
        "",
        *align(rows),
        f"tuned: the pruned program trained {seconds['fine-tuning']:.0f} s more, captured again",
        "quantized: the tuned program in 8-bit integers and shifts, calibrated on training images",
        "speed: in ONNX Runtime, one thread, in turns with the unpruned artifact; median of ratios",
        *verdict(report),
    ]
    return "\n".join(lines)


def differing(report: dict[str, Any]) -> str:
    """Return how the integer artifact compares with its program, as a sentence."""
    floats = len(report["floats"])
    return (
        f"{report['differing']} outputs differ between ONNX Runtime and the interpreter; "
        f"operators that stay float: {floats or 'none'}"
    )


def describe_c(facts: dict[str, Any]) -> str:
    """Return what the C code takes and gives, as a sentence."""
    size = f"{facts['constants'] / 1024:.0f} KiB of constants, an arena of {facts['arena']:,} bytes"
    if "skipped" in facts:
        return f"{size}; written, not run: {facts['skipped']}"
    return f"{size}; {facts['differing']} outputs differ between it and the interpreter"


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines: the first column to the left, the others to the right."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def convolution_widths(program: Program) -> list[tuple[int, int]]:
    """Return the input and output channels of every convolution."""
    found = [n for n in program.nodes if op_name(n) == "conv2d.default"]
    shapes = (program.tensor(n.all_input_nodes[1]).shape for n in found)
    return [(shape[1], shape[0]) for shape in shapes]


def verdict(report: dict[str, Any]) -> list[str]:
    """Return what to know where the pruned artifact is hardly faster; nothing where it is."""
    slow = [b for b, timed in report["latency"].items() if timed["pruned"]["speedup"] < 1.1]
    if not slow:
        return []
    widths = [pair for pair in report["convolutions"] if pair[0] > 1]  # the image has one channel
    odd = sum(any(width % 8 for width in pair) for pair in widths)
    return [
        f"little or no gain at {' and '.join(slow)}: {odd} of {len(widths)} convolutions have "
        "widths that are no multiple of 8,",
        "for which ONNX Runtime leaves its blocked kernels, and channels are selected by copies "
        f"{report['copies']} times",
    ]


def main(arguments: argparse.Namespace) -> int:
    """Run the demo as the command line asks: ``output``, ``quick`` and ``json``."""
    report = run(arguments.output, quick=arguments.quick)
    folder = Path(arguments.output)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        print(describe(report))
        print(f"\nartifacts, plans, dumps and report.json: {folder}")
    return 0
