"""Standalone C against the interpreter, bit for bit, and against ONNX Runtime, in time.

    python -m benchmarks.standalone_c                         # digits, resnet20, mobilenet_v2
    python -m benchmarks.standalone_c resnet20 --data FOLDER  # FOLDER/zoo.py has its weights
    python -m benchmarks.standalone_c --machines              # also aarch64 and Cortex-M, emulated

The networks are pruned (every consumer reads half of its channels) and quantized to 8 bits. Counted
are the outputs of 100 inputs that differ from the interpreter's: 0, or it exits with 1. Times are
of the C code at -O3 -march=native and of ONNX Runtime's int8 on the same integer program, batch 1,
one thread, in turns in one process, by the thread's CPU time; the ratio is the median over the
rounds (above 1: C is slower). The digits network is trained here; resnet20 needs FOLDER/zoo.py and
is left out without; mobilenet_v2 is torchvision's, for 96x96, with random weights.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import narrows
from benchmarks.machine import table, write
from narrows.backends.c.compiler import FAST, find_compiler
from narrows.backends.c.files import MODEL, TEST
from narrows.backends.c.session import codes_of

INPUTS = 100
WARM = 3


@dataclass(frozen=True)
class Case:
    """A trained network and images.

    Attributes:
        model: The network.
        calibration: Images to calibrate with.
        images: Images to compare on.
    """

    model: nn.Module
    calibration: Tensor
    images: Tensor


def digits(data: Path) -> Case:
    from narrows.demo.digits import SEED, DigitsNet, load_splits, train

    training, _, test = load_splits()
    torch.manual_seed(SEED)
    model = DigitsNet(48)
    train(model, training, 4, 6e-3, "training", model.sparse())
    return Case(model, training.images[:512], test.images[:INPUTS])


def resnet20(data: Path) -> Case:
    zoo = _zoo(data)
    prepare = zoo.preprocess
    calibration, _ = zoo.load_cifar10_calib(256)
    images, _ = zoo.load_cifar10_test(INPUTS)
    name = "resnet20_cifar10"
    return Case(zoo.load_resnet20_cifar10(), prepare(name, calibration), prepare(name, images))


def mobilenet_v2(data: Path) -> Case:
    from benchmarks.quantized import build

    model, _ = build("mobilenet_v2", 96)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(INPUTS + 8, 3, 96, 96, generator=generator)
    return Case(model, images[:8], images[8:])


CASES: dict[str, Callable[[Path], Case]] = {
    "digits": digits, "resnet20": resnet20, "mobilenet_v2": mobilenet_v2,
}  # fmt: skip


def _zoo(folder: Path) -> Any:
    path = folder / "zoo.py"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    spec = importlib.util.spec_from_file_location("zoo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------ making


def made(case: Case, name: str, ratio: float) -> tuple[narrows.Program, narrows.Artifact, float]:
    """Return the integer program, its C artifact, and the seconds that lowering took."""
    program = narrows.capture(case.model, (case.images[:2],), name=name)
    plan = narrows.plan(program, ratio=ratio, constrained=False) if ratio else None
    program = narrows.apply(program, plan)
    integers = narrows.quantize(program, case.calibration.split(64), check=False).program
    start = time.perf_counter()
    artifact = narrows.lower(integers, "c", check=False)
    return integers, artifact, time.perf_counter() - start


class Library:
    """The C model as a shared library in this process."""

    def __init__(self, artifact: narrows.Artifact, folder: Path) -> None:
        path = folder / f"{artifact.name}.so"
        source = artifact.folder / MODEL
        start = _children()
        line = [*find_compiler(), "-std=c99", *FAST, "-shared", "-fPIC", "-o", path, source]
        subprocess.run(line, check=True)
        self.seconds = _children() - start
        self.call = ctypes.CDLL(str(path)).narrows_run
        ports = artifact.manifest["c"]
        (self.port,) = ports["inputs"]
        self.out = [np.zeros(s.shape, np.uint8) for s in artifact.outputs]

    def codes(self, image: Tensor) -> np.ndarray:
        made = codes_of(image.numpy(), self.port["codes"], self.port["rounding"])
        return np.ascontiguousarray(made.transpose(self.port["order"]))

    def runner(self, image: Tensor) -> Callable[[], Any]:
        codes = self.codes(image)
        pointers = [codes.ctypes.data_as(ctypes.c_void_p)]
        pointers += [o.ctypes.data_as(ctypes.c_void_p) for o in self.out]
        held = (codes, self.out)
        return lambda: self.call(*pointers, *held[:0])  # held: what the pointers point at


def _children() -> float:
    """Return the CPU seconds of the processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def differing(program: narrows.Program, artifact: narrows.Artifact, images: Tensor) -> int:
    """Return how many outputs of the artifact differ from the interpreter's."""
    name = artifact.inputs[0].name
    calls = [{name: image[None].numpy()} for image in images]
    count = 0
    for image, results in zip(images, artifact.session.run_many(calls), strict=True):  # type: ignore
        count += int((torch.from_numpy(results[0]) != program(image[None])).sum())
    return count


def measured(
    program: narrows.Program, artifact: narrows.Artifact, image: Tensor, rounds: int, folder: Path
) -> dict[str, Any]:
    """Return median milliseconds of both, the median ratio, and the compiler's CPU seconds."""
    theirs = narrows.lower(program, check=False)
    session = theirs.open(threads=1)
    feed = {theirs.inputs[0].name: image[None].numpy()}
    library = Library(artifact, folder)
    runs = {"c": library.runner(image[None]), "ort": lambda: session.run(feed)}
    times: dict[str, list[float]] = {key: [] for key in runs}
    for turn in range(WARM + rounds):
        order = list(runs.items())
        for key, run in order if turn % 2 else reversed(order):
            start = time.thread_time()
            for _ in range(5):
                run()
            if turn >= WARM:
                times[key].append((time.thread_time() - start) / 5)
    ratios = [a / b for a, b in zip(times["c"], times["ort"], strict=True)]
    return {
        "c ms": 1e3 * statistics.median(times["c"]),
        "ort ms": 1e3 * statistics.median(times["ort"]),
        "ratio": statistics.median(ratios),
        "cc s": library.seconds,
    }


# Machine -> compiler with its flags, and what runs the program.
START = Path(__file__).parents[1] / "tests" / "backends" / "cortex_m"
MACHINES = {
    "aarch64": (["aarch64-linux-gnu-gcc", "-O2", "-static"], ["qemu-aarch64"]),
    "cortex-m4": (
        ["arm-none-eabi-gcc", "-O2", "-mcpu=cortex-m4", "-mthumb", "--specs=rdimon.specs",
         f"-T{START / 'mps2.ld'}", str(START / "start.c")],
        ["qemu-system-arm", "-M", "mps2-an386", "-nographic", "-semihosting", "-kernel"],
    ),
}  # fmt: skip
FLASH = 3 << 20  # what the emulated microcontroller has for constants and vectors


def emulated(program: narrows.Program, machine: str, folder: Path) -> str:
    """Return how many of 100 vectors agree on another machine, or why none was tried."""
    compiler, runner = MACHINES[machine]
    missing = [tool for tool in (compiler[0], runner[0]) if shutil.which(tool) is None]
    if missing:
        return f"no {missing[0]}"
    artifact = narrows.lower(program, "c", check=False, vectors=INPUTS)
    facts = artifact.manifest["c"]
    codes = INPUTS * sum(int(np.prod(s.shape)) for s in (*artifact.inputs, *artifact.outputs))
    if machine.startswith("cortex") and facts["constants"] + codes > FLASH:
        return "too large"
    sources = [artifact.folder / MODEL, artifact.folder / TEST]
    path = folder / f"{artifact.name}.{machine}"
    subprocess.run([*compiler, "-std=c99", *sources, "-o", path], check=True)
    done = subprocess.run([*runner, path], capture_output=True, text=True, timeout=1200)
    found = re.search(r"(\d+ of \d+) vectors agree", done.stdout)
    return found[1] if found else f"failed: {done.stdout[-80:]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table; return 1 where an output differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("networks", nargs="*", default=list(CASES), metavar="NETWORK")
    parser.add_argument("--data", type=Path, default=os.environ.get("NARROWS_DATA", "shared/data"))
    parser.add_argument("--ratio", type=float, default=0.5, help="share of channels pruned (0.5)")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--machines", action="store_true", help="run on emulated machines, too")
    parser.add_argument("--json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = {}
    for name in arguments.networks:
        try:
            case = CASES[name](Path(arguments.data))
        except FileNotFoundError as error:
            print(f"{name}: left out, {error}", file=sys.stderr)
            continue
        program, artifact, seconds = made(case, name, arguments.ratio)
        facts = artifact.manifest["c"]
        results[name] = {
            "MACs": facts["macs"], "ROM": facts["constants"], "arena": facts["arena"],
            "bound": facts["bound"], "lower s": seconds,
            "differ": differing(program, artifact, case.images),
            **measured(program, artifact, case.images[0], arguments.rounds, artifact.folder),
        }  # fmt: skip
        if arguments.machines:
            results[name] |= {m: emulated(program, m, artifact.folder) for m in MACHINES}
        print(name, results[name], file=sys.stderr, flush=True)
    if not results:
        return 0
    header = ["network", *next(iter(results.values()))]
    cells = [[n, *map(shown, r.values())] for n, r in results.items()]
    print(table(header, cells))
    write(arguments.json, results)
    wrong = any(
        r["differ"] or any("agree" not in m and m[:1].isdigit() and m != f"{INPUTS} of {INPUTS}"
                           for m in r.values() if isinstance(m, str))
        for r in results.values()
    )  # fmt: skip
    return int(wrong)


def shown(value: Any) -> str:
    """Return a cell of the table."""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
