"""`build`: a description becomes files: lowered, fused, scheduled, compiled and linked."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from narrows.backends.tvm import vector_math
from narrows.backends.tvm.devices import DEVICES, Device, Machine
from narrows.backends.tvm.kernels import ALIKE
from narrows.backends.tvm.link import LIBRARY, Linker, LinkError, find_linker
from narrows.backends.tvm.module import lower
from narrows.backends.tvm.schedules import DOTS, choices, dots, scheduled
from narrows.backends.tvm.search import Search, Work
from narrows.backends.tvm.stock import EXPORTED, imported
from narrows.backends.tvm.tune import Tuner, spell

Tell = Callable[[str], None]


ELEMENTWISE = 0  # TVM's number for kernels that work element by element


class BuildError(Exception):
    """The device cannot be compiled for as asked.

    Attributes:
        hint: What to try.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def build(
    job: Mapping[str, Any], weights: Mapping[str, np.ndarray], given: Path, tell: Tell
) -> dict[str, Any]:
    """Compile a job.

    Args:
        job: ``graph``, as in `narrows.backends.tvm.describe.Description`; ``options``: ``device``,
            ``mcpu``, ``importer``, ``tune`` (seconds), ``search`` and ``cache`` (a folder);
            ``folder``, where the files go.
        weights: The arrays by name.
        given: The job's own folder.
        tell: Called with lines of progress.

    Returns:
        JSON data: ``files``; ``kernels``, ``tuned`` and ``unscheduled``; of a search, ``search``;
        ``seconds`` per stage; the ``target`` as TVM spells it; the ``dot`` product of bytes that
        integers use; ``linked``.
    """
    options, folder = job["options"], Path(job["folder"])
    vector_math.install()
    dots.install()
    device = DEVICES[options["device"]]
    target, machine = target_of(device, str(options.get("mcpu", "")))
    seconds: dict[str, float] = {}
    clock = _Clock(seconds)
    if options["importer"] == "narrows":
        module = lower(job["graph"], weights, machine)
    else:
        module = imported(given / EXPORTED)
    clock("lower")
    module = fuse(module, target)
    clock("fuse")
    if machine.gpu:
        module, counts = _schedule_gpu(module, target), {}
    else:
        tuner = Tuner(target, machine, options, tell) if device.runs_here else None
        searching = options.get("search", "rules") != "rules" and tuner is not None
        search = Search(target, tuner.seconds, tuner.kept, tell) if searching else None
        module, counts = _schedule(module, machine, tuner, search)
    clock("schedule")
    executable = _compile(module, target)
    clock("compile")
    linker = Linker(find_linker(device.linkers))
    try:
        executable.export_library(str(folder / LIBRARY), fcompile=linker)
    except LinkError as error:
        raise BuildError(str(error), "check the linker, or compile for another device") from error
    files = [*linker.files, *_sources(executable, device, folder)]
    clock("link")
    return {
        "files": files,
        "linked": bool(linker.command),
        "target": str(target),
        "dot": machine.dot,
        "seconds": seconds,
        **counts,
    }


class _Clock:
    """Writes down how long the stages take."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.start = seconds, time.perf_counter()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self.start, 3)
        self.start = now


def target_of(device: Device, mcpu: str) -> tuple[tvm.target.Target, Machine]:
    """Return TVM's target for a device, and what kernels are made for.

    Args:
        device: The device.
        mcpu: A processor as LLVM names it; empty for the device's own.
    """
    if device.kind != "llvm":
        options = dict(device.options)
        if mcpu:
            options["arch" if device.kind == "cuda" else "mcpu"] = mcpu
        host = tvm.target.Target({"kind": "llvm"})
        return tvm.target.Target({"kind": device.kind, **options}, host=host), device.machine
    options = {"kind": "llvm", **device.options}
    if device.runs_here:
        codegen = tvm.target.codegen
        mcpu = mcpu or codegen.llvm_get_system_cpu()
        options["mtriple"] = codegen.llvm_get_system_triple()
    if mcpu:
        options["mcpu"] = mcpu
    target = _target(options)
    if not device.runs_here:
        return target, dataclasses.replace(device.machine, dot=_dot(target))
    if _has(target, "avx512f"):
        # Some processors are tuned for vectors of half the size unless told otherwise.
        target = _target({**options, "mattr": ["-prefer-256-bit"]})
        return target, Machine(512, 32, dot=_dot(target))
    if _has(target, "avx2"):
        return target, Machine(256, 16, dot=_dot(target))
    return target, Machine(128, 32 if _has(target, "neon") else 16, dot=_dot(target))


def _dot(target: tvm.target.Target) -> str:
    """Return the dot product of bytes that a processor has, or an empty string."""
    return next((name for name, dot in DOTS.items() if _has(target, dot.feature)), "")


def _target(options: dict[str, Any]) -> tvm.target.Target:
    known = options.get("mcpu")
    plain = tvm.target.Target({k: v for k, v in options.items() if k != "mcpu"})
    if known and not tvm.target.codegen.llvm_is_valid_cpu(known, _triple(plain)):
        raise BuildError(
            f"LLVM knows no processor {known!r}", "llc -mcpu=help lists those that there are"
        )
    return tvm.target.Target(options)


def _triple(target: tvm.target.Target) -> str:
    return str(target.attrs.get("mtriple", "")) or tvm.target.codegen.llvm_get_system_triple()


def _has(target: tvm.target.Target, feature: str) -> bool:
    return bool(tvm.target.codegen.target_has_features(feature, target))


def fuse(module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """Return the module with every operator a kernel, and kernels that follow each other fused."""
    passes = [
        relax.backend.DispatchSortScan(),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        _mark_elementwise,
        relax.transform.DeadCodeElimination(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.RewriteDataflowReshape(),
        relax.transform.DeadCodeElimination(),
    ]
    with target:
        return tvm.transform.Sequential(passes)(module)


@tvm.transform.module_pass(opt_level=0, name="mark_elementwise")
def _mark_elementwise(module: tvm.IRModule, _: Any) -> tvm.IRModule:
    """Return the module in which TVM knows what our own kernels say of themselves."""
    for var, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc) and function.attrs.get(ALIKE):
            module.update_func(var, function.with_attr("op_pattern", ELEMENTWISE))
    return module


def _schedule(
    module: tvm.IRModule, machine: Machine, tuner: Tuner | None, search: Search | None
) -> tuple[tvm.IRModule, dict[str, Any]]:
    """Return the module with every kernel scheduled, and how many were."""
    start = time.monotonic()
    kernels = {v: f for v, f in module.functions_items() if isinstance(f, tirx.PrimFunc)}
    chosen = {v: choices(f, machine) for v, f in kernels.items()}
    best = tuner.tune({v.name_hint: (f, chosen[v]) for v, f in kernels.items()}) if tuner else {}
    taken = {v: best.get(v.name_hint, found[0]) for v, found in chosen.items()}
    made = {v: scheduled(f, taken[v], machine) for v, f in kernels.items()}
    counts: dict[str, Any] = {"kernels": len(kernels), "tuned": len(best)}
    if search is not None and tuner is not None:
        calls = _calls(module)
        works = {}
        for v, f in kernels.items():
            done, seconds = made[v], tuner.times.get(v.name_hint)
            if done is not None and seconds is not None:
                works[v.name_hint] = Work(f, done, spell(taken[v]), seconds, calls[v.name_hint])
        search.run(works, start + search.seconds)
        counts["search"] = search.report()
        made = {v: search.found.get(v.name_hint, done) for v, done in made.items()}
    for var, done in made.items():
        if done is not None:
            module.update_func(var, done.with_attrs(kernels[var].attrs))
    counts["unscheduled"] = [v.name_hint for v, done in made.items() if done is None]
    return module, counts


def _calls(module: tvm.IRModule) -> Counter[str]:
    """Return how often each kernel is called."""
    found: Counter[str] = Counter()

    def visit(node: Any) -> None:
        if isinstance(node, relax.Call):
            found.update(a.name_hint for a in node.args if isinstance(a, tvm.ir.GlobalVar))

    for _, function in module.functions_items():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function.body, visit)
    return found


def _schedule_gpu(module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """Return the module scheduled by the rules that TVM brings along."""
    from tvm.s_tir import dlight

    rules = dlight.gpu
    with target:
        return dlight.ApplyDefaultSchedule(
            rules.Matmul(), rules.GEMV(), rules.Reduction(), rules.GeneralReduction(),
            rules.Fallback(),
        )(module)  # fmt: skip


def _compile(module: tvm.IRModule, target: tvm.target.Target) -> Any:
    passes = [
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    ]
    # Compiled, the calls of kernels are code as well; the alternative is an interpreter.
    return relax.build(
        module,
        target,
        relax_pipeline=tvm.transform.Sequential(passes),
        exec_mode="compiled" if target.kind.name == "llvm" else "bytecode",
    )


def _sources(executable: Any, device: Device, folder: Path) -> list[str]:
    """Write the device code beside the library, and return the files' names."""
    if not device.source:
        return []
    names = []
    stack = [executable.mod]
    while stack:
        module = stack.pop()
        stack.extend(module.imports)
        if module.kind == device.kind or device.kind in module.kind:
            name = f"model_{len(names)}.{device.source}"
            (folder / name).write_text(module.inspect_source(), encoding="utf-8")
            names.append(name)
    return names
