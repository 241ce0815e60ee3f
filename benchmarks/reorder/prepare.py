"""Writes a form down for the runtimes, checks it against the masked model, and keeps it.

A prepared form is a folder with ``model.onnx``, ``eager.pt`` and ``facts.json``. Forms that do not
depend on what narrows' passes do are taken from the cache folder when they are there.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import narrows
from benchmarks.reorder.bound import bound
from benchmarks.reorder.case import CAPTURED, Case, Keep
from benchmarks.reorder.copies import introduced
from benchmarks.reorder.forms import CHANGING, FORMS, Source, plain, rewritten, unpruned
from narrows.ir.compare import relative_error
from narrows.ir.program import Program
from narrows.passes.pipeline import macs

RECIPE = 2  # raise it when forms that are kept would come out otherwise
RUNTIMES: tuple[str, ...] = ("onnx", "eager")
MODEL, EAGER, FACTS = "model.onnx", "eager.pt", "facts.json"
ROUNDS = 3  # of plan and rewrite, after one to warm up

Facts = dict[str, Any]


@dataclass(frozen=True)
class Shelf:
    """Where prepared forms are.

    Attributes:
        kept: The folder for what stays from run to run.
        passing: The folder for what is made anew in every run.
        redo: Forms that are made anew although they are kept.
    """

    kept: Path
    passing: Path
    redo: tuple[str, ...] = ()

    def folder(self, case: Case, form: str) -> Path:
        """Return the folder of a form."""
        return (self.passing if form in CHANGING else self.kept) / case.key / form

    def facts(self, case: Case, form: str) -> Facts | None:
        """Return what is known of a form that is kept, or ``None`` if it has to be made."""
        path = self.folder(case, form) / FACTS
        if form in CHANGING or form in self.redo or not path.exists():
            return None
        facts = json.loads(path.read_text())
        return facts if facts["recipe"] == recipe() else None

    def put(self, case: Case, form: str, facts: Facts, made: Path | None = None) -> Facts:
        """Put a form on the shelf and return its facts; ``made`` holds its files."""
        target = self.folder(case, form)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            fresh = Path(scratch) / form
            if made is None:
                fresh.mkdir()
            else:
                shutil.move(made, fresh)
            facts = {"recipe": recipe(), **facts}
            (fresh / FACTS).write_text(json.dumps(facts, indent=1))
            if target.exists():
                os.replace(target, Path(scratch) / "old")
            os.replace(fresh, target)
        return facts


def recipe() -> str:
    """Return what the kept forms depend on, beside the case."""
    return f"{RECIPE}, torch {torch.__version__}"


# ------------------------------------------------------------------ the reference


class Reference:
    """The masked model, made with hooks on the modules and without narrows.

    Attributes:
        inputs: The images on which forms are compared with it.
    """

    def __init__(self, case: Case, module: nn.Module, keep: Keep) -> None:
        from tests.networks.reference import masked_module

        self.inputs = case.inputs(CAPTURED, seed=2)
        self.module = masked_module(module, keep, {}, self.inputs)
        self._expected: dict[torch.dtype, Any] = {}

    def error(self, results: Sequence[Any], dtype: torch.dtype = torch.float32) -> float:
        """Return the relative error of flat results on `inputs` in ``dtype``."""
        if dtype not in self._expected:
            with torch.no_grad():
                found = self.module.to(dtype)(*(x.to(dtype) for x in self.inputs))
            self._expected[dtype] = tree_leaves(found)
        return relative_error(list(results), self._expected[dtype])


# ------------------------------------------------------------------ writing down


def write(
    programs: Mapping[str, Program], original: Program, reference: Reference | None, folder: Path
) -> Facts:
    """Write a form's program per runtime to a folder; return size, copies and errors."""
    facts: Facts = {"exporter": "narrows"}
    for runtime, program in programs.items():
        count, size, kinds = introduced(program, original)
        facts[runtime] = {
            "macs": sum(macs(program).values()), "parameters": program.parameter_count,
            "copies": count, "bytes": size, "kinds": kinds,
        }  # fmt: skip
        if runtime == "onnx":
            artifact = narrows.lower(program, "onnx", check=False)
            shutil.copyfile(artifact.folder / MODEL, folder / MODEL)
            facts[runtime]["optimized"] = optimized(folder / MODEL)
        else:
            write_eager(program, folder / EAGER)
        if reference is not None:
            run = OPENERS[runtime](folder)
            facts[runtime]["error"] = reference.error(run(*reference.inputs))
    return facts


def write_eager(program: Program, path: Path) -> None:
    """Write a program as Python source that calls ATen operators, with its weights beside it."""
    graph = program.copy().graph
    names: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            node.target = names.setdefault(str(node.target), f"weight_{len(names)}")
    source = graph.python_code("self").src
    weights = {short: program.weights[name].detach() for name, short in names.items()}
    torch.save({"source": source, "weights": weights}, path)


def open_eager(folder: Path) -> Callable[..., Any]:
    """Return the function that runs a form in eager torch and returns the flat results."""
    import math
    import operator
    from types import SimpleNamespace

    stored = torch.load(folder / EAGER, weights_only=True)
    scope: dict[str, Any] = {
        "torch": torch, "math": math, "operator": operator, "_operator": operator,
        "inf": math.inf, "nan": math.nan, "device": torch.device,
    }  # fmt: skip
    exec(stored["source"], scope)
    holder = SimpleNamespace(**stored["weights"])

    def run(*inputs: Any) -> Any:
        with torch.inference_mode():
            return scope["forward"](holder, *inputs)

    return run


def open_onnx(folder: Path) -> Callable[..., list[torch.Tensor]]:
    """Return the function that runs a form in ONNX Runtime, one thread."""
    session = new_session(folder / MODEL)
    names = [i.name for i in session.get_inputs()]

    def run(*inputs: Any) -> list[torch.Tensor]:
        feed = dict(zip(names, (np.asarray(x) for x in inputs), strict=True))
        return [torch.from_numpy(result) for result in session.run(None, feed)]

    return run


OPENERS: dict[str, Callable[[Path], Callable[..., Any]]] = {
    "onnx": open_onnx,
    "eager": open_eager,
}


def new_session(path: Path, optimized_path: Path | None = None) -> Any:
    """Return a session with one thread that runs the operators in order."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def optimized(path: Path) -> dict[str, int]:
    """Return how many operators of each kind ONNX Runtime runs in the end."""
    import onnx

    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / MODEL
        new_session(path, target)
        graph = onnx.load(target).graph
    return dict(Counter(node.op_type for node in graph.node).most_common())


# ------------------------------------------------------------------ the forms made with narrows


def make(
    case: Case, names: Sequence[str], runtimes: Sequence[str], pipeline: str, shelf: Shelf
) -> dict[str, Facts]:
    """Prepare forms of `FORMS` and return their facts; one that fails has a ``failure``."""
    module = case.build()
    keep = case.keep(module)
    program = narrows.capture(module, case.inputs(CAPTURED, seed=0), name=case.model)
    source = Source(program, keep, pipeline, case.batch)
    original = unpruned(source, "onnx")
    reference = Reference(case, module, keep)
    found: dict[str, Facts] = {}
    for name in names:
        facts = shelf.facts(case, name)
        if facts is None:
            facts = attempt(_make_one, case, name, runtimes, source, original, reference, shelf)
        found[name] = facts
    return found


def _make_one(
    case: Case,
    name: str,
    runtimes: Sequence[str],
    source: Source,
    original: Program,
    reference: Reference,
    shelf: Shelf,
) -> Facts:
    # What is kept is written for all runtimes, so that no run needs another one.
    wanted = runtimes if name in CHANGING else RUNTIMES
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        folder.mkdir()
        programs = {runtime: FORMS[name](source, runtime) for runtime in wanted}
        facts = write(programs, original, reference if name != "unpruned" else None, folder)
        if name in CHANGING:
            facts |= timed(name, source, wanted[0])
            facts["float64"] = in_double(name, source, reference, wanted[0])
        if name == "narrows":  # the cost table is not what is measured here, so it may fail
            best = plain(source, wanted[0])
            facts["bound"] = {r: attempt(bound, programs[r], best, original, r) for r in wanted}
        return shelf.put(case, name, facts, folder)


def timed(name: str, source: Source, runtime: str) -> Facts:
    """Return the CPU seconds of planning and rewriting: all passes, no capture, no check."""
    seconds = []
    for _ in range(ROUNDS + 1):
        fresh = replace(source, program=source.program.copy())
        start = time.thread_time()
        FORMS[name](fresh, runtime)
        seconds.append(time.thread_time() - start)
    facts: Facts = {"seconds": statistics.median(seconds[1:]), "cold_seconds": seconds[0]}
    if name == "narrows":
        facts["passes"] = {r.name: r.seconds for r in rewritten(source, runtime).reports}
    return facts


def in_double(name: str, source: Source, reference: Reference, runtime: str) -> float:
    """Return the relative error of a form that is made and run in float64."""
    double = replace(source, program=source.program.to(torch.float64))
    program = FORMS[name](double, runtime)
    result = program.run_flat([x.double() for x in reference.inputs])
    return reference.error(result, torch.float64)


def attempt(function: Callable[..., Any], *args: Any) -> Any:
    """Return what the function returns, or ``{"failure": line}``."""
    try:
        return function(*args)
    except Exception as error:
        return {"failure": in_a_line(error)}


def in_a_line(error: BaseException) -> str:
    """Return what went wrong, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
