"""Compile time beside apple-upscale and Torch-Pruning, on the same models in the same run.

    python -m benchmarks.compile_time [--models resnet18 densenet121] [--rounds 3] [--json r.json]
    python -m benchmarks.compile_time --amount 0.5 --tools narrows narrows-onnx apple-upscale

Each tool has a process of its own per model and the rounds alternate between the tools, so that a
busy machine slows all of them. One thread. A round times, on a fresh copy of the model:

* narrows: the channel analysis, the plan and the rewrite of a captured program (three numbers): the
  masks' exact form, with a copy wherever a layer reads a part;
* narrows-ordered: the same, and channels reordered so that layers read intervals, as apple-upscale
  does it;
* narrows-onnx: the plan and all passes for ONNX Runtime, which weigh forms by its cost table,
  choose reads, widths and order and fold the norms;
* narrows-apply: the same as users get it, which compares the result with the masked program;
* apple-upscale: ``compute()`` and ``prune()``;
* Torch-Pruning: building the pruner and ``step()``.

Capturing the model (`torch.export`, or the trace of the other two) is not counted for any tool; the
table shows it behind a plus. narrows and apple-upscale get the same random input masks on the
ungrouped convolutions, the case that apple-upscale supports; Torch-Pruning chooses its own channels
at the same amount. float32. The first round warms up and is not counted. A tool that fails or runs
out of time is recorded as such; a result that differs from the masked model is called wrong.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.machine import table, write

TOOLS = (
    "narrows", "narrows-ordered", "narrows-onnx", "narrows-apply", "apple-upscale", "torch-pruning",
)  # fmt: skip
WRONG = 1e-3  # float32 rounding of deep networks stays below, a channel in the wrong place does not
Stages = dict[str, tuple[float, float]]


class Clock:
    """Times named stages: CPU seconds of this thread and wall seconds."""

    def __init__(self) -> None:
        self.stages: Stages = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        """Run ``work`` as the stage ``name`` and return its result."""
        cpu, wall = time.thread_time(), time.perf_counter()
        result = work()
        self.stages[name] = (time.thread_time() - cpu, time.perf_counter() - wall)
        return result


# ------------------------------------------------------------------ the tools, each in its process


class NarrowsTool:
    """The program is captured once; a round analyses, plans and rewrites it."""

    def __init__(self, name: str, amount: float) -> None:
        import torch

        import narrows
        from tests.networks.zoo import MODELS

        self.inputs = lambda seed: self.model.inputs(2, seed, torch.float32)
        self.model = MODELS[name]
        module = self.model.build(torch.float32)
        self.keep = input_masks(module, self.inputs(0), amount)
        self.clock = Clock()
        self.program = self.clock("capture", lambda: narrows.capture(module, self.inputs(0)))

    def round(self, clock: Clock) -> float:
        """Time one round and return the relative error of the result."""
        from narrows.ir.compare import relative_error

        program = self.program.copy()
        clock.stages.update(self.clock.stages)
        plan, result = self.rewritten(program, clock)
        x = self.inputs(1)
        return relative_error(result(*x), plan.masked(program)(*x))

    def rewritten(self, program: Any, clock: Clock) -> tuple[Any, Any]:
        """Return the plan and the result, with what is timed of it in stages."""
        import narrows
        from narrows.ir.channels import analyse
        from narrows.passes.prune_channels import PruneChannels

        clock("analysis", lambda: analyse(program))
        plan = clock("plan", lambda: narrows.plan(program, keep_inputs=self.keep, zeros=False))
        return plan, clock("rewrite", lambda: PruneChannels(plan).run(program).program)


class OrderedTool(NarrowsTool):
    """The smallest form, its channels in the best order."""

    check = False

    def options(self) -> dict[str, Any]:
        """Return what `narrows.apply` is asked for."""
        from narrows.passes.pipeline import Pipeline
        from narrows.passes.prune_channels import PruneChannels

        return {"pipeline": Pipeline([PruneChannels(order=True)])}

    def rewritten(self, program: Any, clock: Clock) -> tuple[Any, Any]:
        """Return the plan and the result of all passes."""
        import narrows

        options = {**self.options(), "check": self.check}
        plan = clock("plan", lambda: narrows.plan(program, keep_inputs=self.keep, zeros=False))
        return plan, clock("passes", lambda: narrows.apply(program, plan, **options))


class TargetTool(OrderedTool):
    """Every pass, by the costs of ONNX Runtime."""

    def options(self) -> dict[str, Any]:
        """Return what `narrows.apply` is asked for."""
        return {"target": "onnx"}


class ApplyTool(TargetTool):
    """`narrows.apply` as it is: all passes, and the comparison with the masked program."""

    check = True


class UpscaleTool:
    """apple-upscale changes the model in place, so a round gets a copy."""

    def __init__(self, name: str, amount: float) -> None:
        import torch

        from tests.networks.reference import masked_module
        from tests.networks.zoo import MODELS

        model = MODELS[name]
        self.module = model.build(torch.float32)
        self.inputs = model.inputs(1, 1, torch.float32)
        self.keep = input_masks(self.module, self.inputs, amount)
        self.masked = masked_module(self.module, self.keep, {}, self.inputs)
        for module in self.module.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # its tracer does not see in-place changes

    def round(self, clock: Clock) -> float:
        """Time one round and return the relative error of the result."""
        import torch
        from upscale import PruningManager  # pyright: ignore[reportMissingImports]

        from narrows.ir.compare import relative_error

        module = copy.deepcopy(self.module)
        widths = {n: p.shape[1] for n, p in module.named_parameters() if n in self.keep}
        pruned = [
            (n, c)
            for n, keep in self.keep.items()
            for c in sorted(set(range(widths[n])) - set(keep))
        ]
        manager = PruningManager(module)
        clock("capture", lambda: manager.trace(list(self.inputs)))
        clock("compute", lambda: manager.compute(list(self.inputs), pruned_inputs=pruned))
        clock("prune", manager.prune)
        with torch.no_grad():
            return relative_error(torch.Tensor(module(*self.inputs)), self.masked(*self.inputs))


class TorchPruningTool:
    """Torch-Pruning changes the model in place, so a round gets a copy."""

    def __init__(self, name: str, amount: float) -> None:
        import torch

        from tests.networks.zoo import MODELS

        model = MODELS[name]
        self.module, self.amount = model.build(torch.float32), amount
        self.inputs = model.inputs(1, 1, torch.float32)

    def round(self, clock: Clock) -> float:
        """Time one round; zero if the pruned model still runs."""
        import torch
        import torch_pruning  # pyright: ignore[reportMissingImports]

        module = copy.deepcopy(self.module)
        classifier = [m for m in module.modules() if getattr(m, "out_features", 0) == 1000]
        graph = torch_pruning.DependencyGraph
        trace = graph._trace
        graph._trace = lambda *a, **k: clock("capture", lambda: trace(*a, **k))
        pruner = clock(
            "build",
            lambda: torch_pruning.pruner.BasePruner(
                module,
                self.inputs[0],
                importance=torch_pruning.importance.MagnitudeImportance(p=1),
                pruning_ratio=self.amount,
                ignored_layers=classifier,
            ),
        )
        graph._trace = trace
        clock("step", pruner.step)
        capture, build = clock.stages["capture"], clock.stages["build"]
        clock.stages["build"] = (build[0] - capture[0], build[1] - capture[1])
        with torch.no_grad():
            return 0.0 if module(*self.inputs).isfinite().all() else float("inf")


def input_masks(module: Any, inputs: Any, amount: float) -> dict[str, tuple[int, ...]]:
    """Return random kept inputs of every ungrouped convolution that is called on no image."""
    import random

    import torch
    from torch import nn

    called: set[nn.Module] = set()
    hooks = [m.register_forward_hook(lambda m, _, __: called.add(m)) for m in module.modules()]
    with torch.no_grad():
        module(*inputs)
    for hook in hooks:
        hook.remove()
    draw = random.Random(0)
    keep = {}
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Conv2d) or layer not in called:
            continue
        if layer.groups == 1 and layer.in_channels > 3:
            count = max(1, layer.in_channels - round(amount * layer.in_channels))
            keep[f"{name}.weight"] = tuple(sorted(draw.sample(range(layer.in_channels), count)))
    return keep


def serve(tool: str, name: str, amount: float, pipe: Connection) -> None:
    """Answer every message on ``pipe`` with a round's stages and error, or with what went wrong."""
    import logging

    import torch

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    kinds = {
        "narrows": NarrowsTool,
        "narrows-ordered": OrderedTool,
        "narrows-onnx": TargetTool,
        "narrows-apply": ApplyTool,
        "apple-upscale": UpscaleTool,
        "torch-pruning": TorchPruningTool,
    }
    try:
        instance = kinds[tool](name, amount)
        pipe.send("ready")
        while pipe.recv() == "go":
            clock = Clock()
            error = instance.round(clock)
            pipe.send({"stages": clock.stages, "error": error})
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = " ".join(str(error).split())[:120]
        pipe.send({"failure": f"{type(error).__name__}: {message} ({frame.name})"})


# ------------------------------------------------------------------ the driver


class Worker:
    """A tool in a process of its own, with a budget of wall seconds."""

    def __init__(self, tool: str, name: str, amount: float, limit: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(tool, name, amount, other), daemon=True)
        self.process.start()
        other.close()
        self.limit, self.failure = limit, ""
        self.rounds: list[dict[str, Any]] = []
        self._receive()

    def _receive(self) -> dict[str, Any] | None:
        start = time.perf_counter()
        if not self.pipe.poll(max(self.limit, 0)):
            self.failure = "time-out"
        else:
            try:
                answer = self.pipe.recv()
            except EOFError:
                answer = {"failure": "the process ended"}
            self.limit -= time.perf_counter() - start
            if not isinstance(answer, dict):
                return None
            if "failure" not in answer:
                return answer
            self.failure = answer["failure"]
        self.stop()
        return None

    def go(self) -> None:
        """Run one round, unless the tool has failed already."""
        if self.failure:
            return
        self.pipe.send("go")
        answer = self._receive()
        if answer is not None:
            self.rounds.append(answer)

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()

    def summary(self) -> dict[str, Any]:
        """Return the medians per stage over the counted rounds, or the failure."""
        if self.failure and not self.rounds:
            return {"failure": self.failure}
        counted = self.rounds[1:] or self.rounds
        stages = {
            stage: [statistics.median(r["stages"][stage][i] for r in counted) for i in (0, 1)]
            for stage in counted[0]["stages"]
        }
        totals = [
            [sum(t[i] for stage, t in r["stages"].items() if stage != "capture") for i in (0, 1)]
            for r in counted
        ]
        return {
            "stages": stages,
            "cpu": statistics.median(t[0] for t in totals),
            "wall": statistics.median(t[1] for t in totals),
            "error": max(r["error"] for r in self.rounds),
            "rounds": totals,
            "failure": self.failure,
        }


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the summaries of all tools on one model."""
    workers: dict[str, Worker] = {}
    try:
        for tool in options.tools:
            workers[tool] = Worker(tool, name, options.amount, options.limit)
        for _ in range(options.rounds + 1):
            for worker in workers.values():
                worker.go()
    finally:
        for worker in workers.values():
            worker.stop()
    return {"model": name, **{tool: worker.summary() for tool, worker in workers.items()}}


def cell(result: dict[str, Any], tool: str) -> str:
    """Return a tool's CPU seconds, or what went wrong."""
    entry = result.get(tool, {"failure": "not run"})
    if "cpu" not in entry:
        return entry["failure"].split(" (")[0][:40]
    wrong = "" if entry["error"] <= WRONG else f" wrong by {entry['error']:.0e}"
    capture = entry["stages"]["capture"][0]
    return f"{entry['cpu']:.3f} + {capture:.2f}{wrong}"


def ratios(results: list[dict[str, Any]], tool: str, ours: str) -> list[float]:
    """Return a tool's CPU time over ours, of every model that both finished."""
    return [
        r[tool]["cpu"] / max(r[ours]["cpu"], 1e-9)
        for r in results
        if "cpu" in r.get(tool, {}) and "cpu" in r.get(ours, {})
    ]


def report(results: list[dict[str, Any]]) -> str:
    """Return the markdown table of CPU seconds, and what the peers take of our time."""
    tools = [tool for tool in TOOLS if any(tool in result for result in results)]
    stages = ("analysis", "plan", "rewrite")
    rows = []
    for result in results:
        found = result.get("narrows", {}).get("stages", {})
        parts = [f"{found[s][0]:.3f}" if s in found else "-" for s in stages]
        rows.append([result["model"], *parts, *(cell(result, tool) for tool in tools)])
    lines = [table(["model", *(f"{s} s" for s in stages), *(f"{t} s" for t in tools)], rows), ""]
    for tool in (t for t in tools if not t.startswith("narrows")):
        for ours in (t for t in tools if t.startswith("narrows")):
            found = ratios(results, tool, ours)
            if found:
                lines.append(
                    f"{tool} over {ours}: geometric mean {statistics.geometric_mean(found):.1f}x "
                    f"of {len(found)} of {len(results)} models, smallest {min(found):.1f}x"
                )
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark; the exit code is 1 when narrows itself fails on a model."""
    from tests.networks.zoo import MODELS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), metavar="MODEL")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--amount", type=float, default=0.3)
    parser.add_argument(
        "--rounds", type=int, default=3, help="counted rounds, after one to warm up"
    )
    parser.add_argument("--limit", type=float, default=120, help="seconds per tool and model")
    parser.add_argument("--json", help="also write the results here")
    options = parser.parse_args()
    results = []
    try:
        for name in options.models or list(MODELS):
            results.append(compare(name, options))
            seconds = ", ".join(f"{t} {cell(results[-1], t)}" for t in options.tools)
            print(f"{name}: {seconds}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    print(report(results))
    write(options.json, results)
    return int(any("cpu" not in r.get("narrows", {"cpu": 0}) for r in results))


if __name__ == "__main__":
    sys.exit(main())
