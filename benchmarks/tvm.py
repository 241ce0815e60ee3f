"""TVM artifacts against ONNX Runtime's, in turns, one thread, by the CPU time of the thread.

    python -m benchmarks.tvm                      # all networks, candidates timed for 120 s each
    python -m benchmarks.tvm --tune 0 resnet18    # one of them, with the fixed choice
    python -m benchmarks.tvm --int8               # quantized, against the same program in ONNX
    python -m benchmarks.tvm --scaling resnet18   # one thread against two, by the clock
    python -m benchmarks.tvm --compile            # how long compiling takes, nothing timed

Per network: milliseconds of each at batch 1, and the median over the rounds of the ratio of both
times (above 1: TVM is slower), with its quartiles. Weights are random: they do not matter for time.
With --int8 the error is the share of outputs that differ, and the norms have statistics of random
images. With --compile: seconds from the program to the checked artifact, by the clock and of all
processes' CPU time, and what of it the stages inside TVM take by the clock.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import narrows
from benchmarks.quantized import settle_norms
from narrows.backends import golden
from narrows.passes.spelling import read_word

NETWORKS: dict[str, Callable[[], nn.Module]] = {}


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from tests.networks.zoo import import_models

        return getattr(import_models(), name)(weights=None)

    return build


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from tests.networks.zoo import import_models

        import_models()  # timm imports torchvision, which may not load as it is
        import timm

        return timm.create_model(name, pretrained=False)

    return build


NETWORKS = {
    "resnet18": _torchvision("resnet18"),
    "mobilenet_v2": _torchvision("mobilenet_v2"),
    "densenet121": _torchvision("densenet121"),
    "efficientnet_lite0": _timm("efficientnet_lite0"),
    "shufflenet_v2_x1_0": _torchvision("shufflenet_v2_x1_0"),
    "vit_tiny": _timm("vit_tiny_patch16_224"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--tune", type=read_word, default=120, help="seconds per network (120)")
    parser.add_argument("--search", default="rules", help="or metaschedule, beside the rules")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ratio", type=float, default=0.0, help="prune this share of channels")
    parser.add_argument("--int8", action="store_true", help="quantize the network first")
    parser.add_argument("--scaling", action="store_true", help="one thread against two")
    parser.add_argument("--compile", action="store_true", help="the time of compiling")
    arguments = parser.parse_args()
    most = 2 if arguments.scaling else arguments.threads
    os.environ.setdefault("TVM_NUM_THREADS", str(most))
    torch.set_num_threads(1)
    if arguments.scaling:
        print(f"{'network':20} {'1 thread':>8} {'2':>8}  speed-up (quartiles)")
    elif arguments.compile:
        print(f"{'network':20} {'clock s':>8} {'CPU s':>8}  stages, s")
    else:
        print(f"{'network':20} {'tvm ms':>8} {'ort ms':>8}  ratio (quartiles)   error    compile s")
    for name in arguments.networks:
        program = prepared(name, arguments)
        if arguments.compile:
            print(f"{name:20} {compiled(program)}", flush=True)
        elif arguments.scaling:
            artifact = narrows.lower(program, "tvm", tune=arguments.tune, samples=1)
            print(f"{name:20} {scaling(artifact, arguments.rounds)}", flush=True)
        else:
            print(compared(name, program, arguments), flush=True)


def prepared(name: str, arguments: argparse.Namespace) -> narrows.Program:
    """Return the program of a network, pruned and quantized as asked for."""
    torch.manual_seed(0)
    model, images = NETWORKS[name](), torch.randn(2, 3, 224, 224)
    if arguments.int8:
        settle_norms(model, 224)
    program = narrows.capture(model.eval(), (images,))
    plan = narrows.plan(program, ratio=arguments.ratio) if arguments.ratio else None
    program = narrows.apply(program, plan)
    if arguments.int8:
        program = narrows.quantize(program, [images], check=False).program
    return program


def scaling(artifact: narrows.Artifact, rounds: int) -> str:
    """Return times by the clock on one thread and on two, and the medians of their ratios."""
    sessions = [artifact.open(threads) for threads in (1, 2)]
    arrays = golden.draw(artifact.inputs, 1)
    times: list[list[float]] = [[], []]
    for number in range(rounds + 2):
        for session, found in zip(sessions, times, strict=True):
            session.run(arrays)  # wakes the threads of this one
            start = time.perf_counter()
            session.run(arrays)
            if number >= 2:
                found.append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    one, two = (1e3 * statistics.median(t) for t in times)
    return f"{one:8.3f} {two:8.3f}  {middle:.2f} ({low:.2f}-{high:.2f})"


def compiled(program: narrows.Program) -> str:
    """Return how long a program takes to become an artifact."""
    clock, used = time.perf_counter(), _used()
    artifact = narrows.lower(program, "tvm", tune=0, samples=1)
    clock, used = time.perf_counter() - clock, _used() - used
    stages = artifact.manifest["build"]["seconds"]
    return f"{clock:8.1f} {used:8.1f}  {', '.join(f'{k} {v:.1f}' for k, v in stages.items())}"


def _used() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def compared(name: str, program: narrows.Program, arguments: argparse.Namespace) -> str:
    """Return the line of a network, beside ONNX Runtime."""
    from narrows.backends.timing import measure

    start = time.perf_counter()
    options = {"tune": arguments.tune, "search": arguments.search}
    mine = narrows.lower(program, "tvm", samples=1, **options)
    seconds = time.perf_counter() - start
    theirs = narrows.lower(program, "onnx", samples=1)
    ours, other = measure([mine, theirs], 1, arguments.rounds, arguments.threads)
    ratios = [a / b for a, b in zip(ours.cpu, other.cpu, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    error = mine.fidelity["checked"][0]["error"]
    times = [1e3 * statistics.median(t.cpu) for t in (ours, other)]
    return (
        f"{name:20} {times[0]:8.3f} {times[1]:8.3f}  {middle:.3f} ({low:.3f}-{high:.3f})"
        f"  {error:.1e}  {seconds:8.1f}"
    )


if __name__ == "__main__":
    main()
