"""What the command line says of quantization: how grids are chosen, and data from files."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from narrows.cli.flags import given
from narrows.errors import UsageError
from narrows.files.quoting import plain

if TYPE_CHECKING:
    from narrows.backends.artifact import Artifact
    from narrows.ir.program import Program
    from narrows.passes.quant.quantization import Quantized

BATCH = 32  # samples of a data file that run at once


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `narrows.quantize` that the command line gives, checked."""
    from narrows.passes.quant.options import Quantization

    settings = given(arguments, Quantization)
    Quantization(**settings)
    return settings


def batches(path: Path, program: Program) -> Iterator[tuple[Any, ...]]:
    """Return the inputs in a data file, ``BATCH`` samples at a time.

    Args:
        path: A ``.npy`` file for the one input, or a ``.npz`` file with an array per input, by the
            input's name or in order. Axis 0 counts the samples.
        program: What they are for.
    """
    import numpy as np
    import torch

    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = [loaded] if isinstance(loaded, np.ndarray) else _named(dict(loaded), program)
    except (OSError, ValueError, EOFError, BadZipFile, MemoryError) as error:
        raise UsageError(f"cannot read the data {path}", why=_unreadable(error)) from error
    holders = program.placeholders
    if len(arrays) != len(holders):
        raise UsageError(
            f"{path} holds {len(arrays)} arrays, the model takes {len(holders)} inputs"
        )
    for array, holder, example in zip(arrays, holders, program.examples, strict=True):
        _refuse_array(path, array, holder, example)
    counts = {len(a) for a in arrays}
    if len(counts) != 1:
        raise UsageError(f"the arrays of {path} have different numbers of samples")
    fixed = program.examples[0].shape[0] if not program.dynamic_batch else None
    step, (count,) = fixed or BATCH, counts
    if 0 < count < (fixed or 1):
        raise UsageError(
            f"{path} holds {count} samples, the model takes {fixed} at a time",
            hint="leave out --fixed-batch, or add samples",
        )

    def chunks() -> Iterator[tuple[Any, ...]]:
        for start in range(0, count - (fixed or 1) + 1, step):
            parts = (a[start : start + step] for a in arrays)
            yield tuple(torch.from_numpy(_native(p)) for p in parts)

    return chunks()


def _unreadable(error: Exception) -> str:
    """Return why a data file cannot be read; numpy takes what it does not know for Python objects,
    and says how to load those unsafely."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "pickle" in str(error):
        return "it is no .npy or .npz file, or it holds Python objects"
    return str(error)


def _native(array: Any) -> Any:
    """Return an array as this processor has numbers, whatever order of bytes a file has."""
    import numpy as np

    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def _refuse_array(path: Path, array: Any, holder: Any, example: Any) -> None:
    """Raise `UsageError` unless an array of a file is what an input of the model takes."""
    from narrows.ir.meta import Meta

    told = f"{path} holds {array.dtype}{list(array.shape)}"
    if array.dtype.kind not in "biuf" or not array.ndim:
        why = "it takes arrays of numbers, and axis 0 counts the samples"
        raise UsageError(told, where=f"input {holder.name}", why=why)
    wanted = str(example.dtype).removeprefix("torch.")
    if array.dtype.name != wanted:
        images = array.dtype.kind in "iu" and wanted.startswith(("float", "bfloat"))
        convert = f"data.astype({wanted!r})" if wanted != "bfloat16" else "-i f32[...]"
        raise UsageError(
            told,
            where=f"input {holder.name}",
            why=f"the model takes {wanted}, and numbers of another type may be of another range",
            hint=f"{convert}, scaled and shifted as in training" if images else convert,
        )
    fixed = [(a, s) for a, s in enumerate(example.shape) if a and a not in Meta(holder).dynamic]
    if array.ndim != example.dim() or any(array.shape[a] != size for a, size in fixed):
        shape = ",".join(["b", *map(str, example.shape[1:])])
        raise UsageError(told, where=f"input {holder.name}", why=f"the model takes [{shape}]")


def _named(arrays: dict[str, Any], program: Program) -> list[Any]:
    names = [n.name for n in program.placeholders]
    return [arrays[n] for n in names] if set(names) == set(arrays) else list(arrays.values())


def findings(program: Program, quantized: Quantized) -> dict[str, Any]:
    """Return what a person wants to know of a quantized program, as JSON values.

    ``floats`` has what stays floating-point, with reasons and source lines; ``lost`` what a common
    grid leaves little of; ``error`` is the relative error of the outputs against ``program``, on
    its examples.
    """
    from narrows.passes.instruments import compare
    from narrows.passes.quant.measure import islands

    floats = islands(quantized.prepared, quantized.plan)
    lost = [f"{n.where}: {n.message}" for n in quantized.plan.notes if n.reason == "lost"]
    return {"floats": floats, "lost": lost, "error": compare(quantized.program, program)}


def report(
    quantized: Quantized, data: Iterable[Any], folder: Path, artifact: Artifact
) -> dict[str, Any]:
    """Save what quantization costs on data; return where, and the worst of it, as JSON values.

    The report carries the identity of the artifact that it is about.
    """
    made = quantized.report(data)
    made.save(folder, artifact=artifact.identity)
    known = made.to_json()
    gains = {t["name"]: t["gain"] for t in known["tensors"]}
    costly = {t.name: gains[t.name] for t in made.culprits[:5] if t.gain is not None and t.gain > 0}
    return {"report": str(folder), "sqnr": known["sqnr"], "culprits": costly}


def describe(found: dict[str, Any]) -> str:
    """Return `findings` and `report` as text."""
    lines = [plain(f"float: {name}: {reason}") for name, reason in found["floats"].items()]
    lines += [plain(f"lost: {text}") for text in found["lost"]]
    lines.append(f"error against the float model on the example: {found['error']:.2g}")
    if "report" in found:
        ratio = "exact" if found["sqnr"] is None else f"{found['sqnr']:.1f} dB"
        costly = ", ".join(
            f"{plain(name)} ({'all of it' if gain is None else f'{gain:.2f} dB'})"
            for name, gain in found["culprits"].items()
        )
        lines.append(f"outputs on the data: {ratio}; costliest quantizers: {costly or 'none'}")
        lines.append(f"report in {found['report']}")
    return "\n".join(lines)
