"""The forms that apple-upscale and Torch-Pruning make of a model.

Both change the model in place. A pruned module is captured and written by narrows like every other
form; only where that fails, by ``torch.onnx.export`` and onnxsim.

apple-upscale's two exports differ in how a module selects channels: by ``narrow`` and by an index
(``is_not_ane``), or by the concatenation of a slice per run of channels, several thousand in all
for a dense network, which exporters take many minutes for. So the model is exported once, with the
index as one gather, and the other export is made from it by spelling every gather as slices.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import narrows
from benchmarks.reorder.case import CAPTURED, Case
from benchmarks.reorder.forms import Source, tidied, unpruned
from benchmarks.reorder.gathers import gathered, slice_gathers, sliced
from benchmarks.reorder.prepare import (
    MODEL,
    RUNTIMES,
    Facts,
    Reference,
    Shelf,
    attempt,
    in_a_line,
    open_onnx,
    optimized,
    write,
)
from narrows.errors import NarrowsError
from narrows.ir.program import Program

UPSCALE = ("upscale-default", "upscale-narrow")
TORCH_PRUNING = ("torch-pruning", "torch-pruning-16")
STEPS = 10  # of the search for a ratio
CLOSE = 0.01  # how near the wanted MACs are near enough


def make_upscale(case: Case, names: Sequence[str], shelf: Shelf) -> dict[str, Facts]:
    """Prepare apple-upscale's exports of the masks."""
    module = without_inplace(case.build())
    keep = case.keep(module)
    reference = Reference(case, module, keep)
    original = captured(case, module)
    pruned = copy.deepcopy(module)
    try:
        times = upscale(pruned, case.inputs(1), keep)
        with torch.no_grad():
            pruned(*case.inputs(1))  # it may have made a module that does not run
    except Exception as error:
        facts = {"failure": in_a_line(error)}
        return {name: shelf.put(case, name, facts) for name in names}
    return {
        name: attempt(finish, case, name, pruned, original, reference, shelf, times)
        for name in names
    }


def upscale(module: nn.Module, inputs: Any, keep: Any) -> Facts:
    """Prune a module in place with apple-upscale; return its CPU seconds without the trace."""
    from upscale import PruningManager  # pyright: ignore[reportMissingImports]

    widths = {n: p.shape[1] for n, p in module.named_parameters() if n in keep}
    pruned = [(n, c) for n, kept in keep.items() for c in sorted({*range(widths[n])} - {*kept})]
    manager = PruningManager(module)
    manager.trace(list(inputs))
    start = time.thread_time()
    manager.compute(list(inputs), pruned_inputs=pruned)
    manager.prune(is_not_ane=True)
    return {"seconds": time.thread_time() - start}


def make_torch_pruning(
    case: Case, names: Sequence[str], wanted: int, shelf: Shelf
) -> dict[str, Facts]:
    """Prepare Torch-Pruning's result at the ratio that comes nearest to the wanted MACs."""
    module = without_inplace(case.build())
    original = captured(case, module)
    found = {}
    for name in names:
        step = 16 if name.endswith("-16") else None
        try:
            pruned, ratio = at_macs(module, case.inputs(1), wanted, step)
        except Exception as error:
            found[name] = shelf.put(case, name, {"failure": in_a_line(error), "wanted": wanted})
            continue
        facts = {"ratio": ratio, "wanted": wanted}
        found[name] = attempt(finish, case, name, pruned, original, None, shelf, facts)
    return found


def at_macs(
    module: nn.Module, inputs: Any, wanted: int, step: int | None
) -> tuple[nn.Module, float]:
    """Return the module pruned by Torch-Pruning to about the wanted MACs, and the ratio."""
    low, high = 0.0, 1.0
    best: tuple[float, nn.Module, float] | None = None
    for _ in range(STEPS):
        ratio = (low + high) / 2
        pruned = copy.deepcopy(module)
        torch_pruning(pruned, inputs, ratio, step)
        reached = count_macs(pruned, inputs)
        off = abs(reached / wanted - 1)
        if best is None or off < best[0]:
            best = (off, pruned, ratio)
        if off < CLOSE:
            break
        low, high = (ratio, high) if reached > wanted else (low, ratio)
    assert best is not None
    return best[1], best[2]


def torch_pruning(module: nn.Module, inputs: Any, ratio: float, step: int | None) -> None:
    """Prune a module in place by Torch-Pruning's L1 criterion, the classifiers left alone."""
    import torch_pruning as tp  # pyright: ignore[reportMissingImports]

    tp.pruner.BasePruner(
        module,
        inputs[0],
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=ratio,
        ignored_layers=[m for m in module.modules() if getattr(m, "out_features", 0) == 1000],
        round_to=step,  # pyright: ignore[reportArgumentType]
    ).step()


def count_macs(module: nn.Module, inputs: Any) -> int:
    """Return the multiply-accumulates of a module's convolutions and linear layers, one image."""
    total = 0

    def add(layer: Any, _: Any, result: torch.Tensor) -> None:
        nonlocal total
        total += result.numel() * layer.weight[0].numel()

    kinds = (nn.Conv2d, nn.Linear)
    hooks = [m.register_forward_hook(add) for m in module.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        module(*inputs)
    for hook in hooks:
        hook.remove()
    return total


def without_inplace(module: nn.Module) -> nn.Module:
    """Return the module, its activations no longer in place: tracers do not see such changes."""
    for part in module.modules():
        if hasattr(part, "inplace"):
            part.inplace = False  # pyright: ignore[reportArgumentType]
    return module


# ------------------------------------------------------------------ writing down


def captured(case: Case, module: nn.Module) -> Program:
    """Return a module's program as the unpruned form is made."""
    program = narrows.capture(module, case.inputs(CAPTURED, seed=0), name=case.model)
    return unpruned(Source(program, {}), "onnx")


def finish(
    case: Case,
    name: str,
    module: nn.Module,
    original: Program,
    reference: Reference | None,
    shelf: Shelf,
    known: Facts,
) -> Facts:
    """Write a pruned module down and return its facts together with what is known of it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        folder.mkdir()
        try:
            program = narrows.capture(module, case.inputs(CAPTURED, seed=0), name=case.model)
        except NarrowsError as error:
            facts = export(module, case.inputs(CAPTURED, seed=0), reference, folder)
            facts["capture"] = in_a_line(error)
        else:
            facts = write_peer(name, gathered(program), original, reference, folder)
        return shelf.put(case, name, {**facts, **known}, folder)


def write_peer(
    name: str, program: Program, original: Program, reference: Reference | None, folder: Path
) -> Facts:
    """Write the program of a peer's module; for apple-upscale's default, with slices."""
    program = tidied(program)
    if name != "upscale-default":
        return write(dict.fromkeys(RUNTIMES, program), original, reference, folder)
    facts = write({"onnx": program, "eager": tidied(sliced(program))}, original, reference, folder)
    slice_gathers(folder / MODEL)
    moved = ("copies", "bytes", "kinds")
    facts["onnx"] |= {key: facts["eager"][key] for key in moved}
    facts["onnx"]["optimized"] = optimized(folder / MODEL)
    if reference is not None:
        facts["onnx"]["error"] = reference.error(open_onnx(folder)(*reference.inputs))
    return facts


def export(module: nn.Module, inputs: Any, reference: Reference | None, folder: Path) -> Facts:
    """Write a module with torch's own exporter; its copies are not counted."""
    import onnx
    import onnxsim

    batch: Callable[..., Any] = torch.export.Dim
    program = torch.onnx.export(
        module, inputs, dynamo=True, opset_version=20, verbose=False,
        dynamic_shapes=({0: batch("batch")},),
    )  # fmt: skip
    assert program is not None
    simpler, _ = onnxsim.simplify(program.model_proto)
    onnx.save(simpler, folder / MODEL)
    facts: Facts = {"macs": count_macs(module, inputs) // CAPTURED}
    if reference is not None:
        facts["error"] = reference.error(open_onnx(folder)(*reference.inputs))
    return {"exporter": "torch.onnx", "onnx": facts}
