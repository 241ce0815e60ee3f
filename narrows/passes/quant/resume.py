"""The checkpoint of a reconstruction: what is done, in a file that is whole or as it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from narrows.errors import UsageError
from narrows.files.reading import Count, fit
from narrows.files.writing import replacing
from narrows.ir.program import Program
from narrows.passes.plans.plan import fingerprint
from narrows.passes.quant.trial import Kernel, Trial

FORMAT = "narrows-rapq-1"


def key(program: Program, inputs: Iterable[Sequence[Any]], options: str) -> str:
    """Return a hash of all that a result hangs on: the network, its weights, the data, options."""
    digest = hashlib.sha256(fingerprint(program).encode())
    digest.update(options.encode())
    for value in (*program.weights.values(), *(v for item in inputs for v in item)):
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(plain.numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def save(path: str | os.PathLike[str], trial: Trial, key: str, done: int) -> None:
    """Write what is known of a network after some steps."""
    state = {
        "format": FORMAT,
        "key": key,
        "done": done,
        "kernels": {k.name: _kept(k) for k in trial.kernels.values()},
        "sites": {s.node.name: s.step for s in trial.sites.values()},
    }
    try:
        with replacing(path, UsageError) as file:
            torch.save(state, file)
    except RuntimeError as error:  # what torch makes of an error of the file
        raise UsageError(f"cannot write the checkpoint {path}", why=str(error)) from error


def _beyond(codes: Tensor, kernel: Kernel) -> bool:
    return bool((codes.to(torch.int64).abs() > kernel.high).any())


def _kept(kernel: Kernel) -> dict[str, Tensor | None]:
    codes, shift = kernel.codes, kernel.shift
    return {
        "steps": kernel.steps.cpu(),
        "codes": None if codes is None else codes.to("cpu", torch.int8),
        "shift": None if shift is None else shift.cpu(),
    }


def load(path: str | os.PathLike[str], trial: Trial, key: str) -> int:
    """Bring a network to where it was when a checkpoint was written; return what was done.

    Raises:
        UsageError: The file is no checkpoint, or one of another run.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        form, held = state["format"], state["key"]
    except Exception as error:
        raise UsageError(
            f"{path} is not a checkpoint of a reconstruction",
            why=f"{type(error).__name__}: {error}".partition("\n")[0],
        ) from error
    if form != FORMAT or not isinstance(held, str) or held != key:
        raise UsageError(
            f"the checkpoint {path} is of another run",
            why="the model, its weights, the data or the settings differ",
            hint="name another file, or delete it to begin anew",
        )
    try:
        kernels, sites, done = _checked(state, trial)
    except ValueError as error:
        raise UsageError(f"the checkpoint {path} is damaged", why=str(error)) from error
    for kernel in trial.kernels.values():
        kept = kernels[kernel.name]
        kernel.steps = kept["steps"].to(kernel.steps)
        kernel.codes = None if kept["codes"] is None else kept["codes"].to(kernel.steps)
        kernel.shift = None if kept["shift"] is None else kept["shift"].to(kernel.steps)
    for site in trial.sites.values():
        site.step = sites[site.node.name]
    return done


class CheckpointFile(msgspec.Struct):
    """What a checkpoint holds, besides its format and key."""

    done: Count
    kernels: dict[str, dict[str, Any]]
    sites: dict[str, Annotated[float, msgspec.Meta(gt=0, le=1e300)]]


def _checked(state: dict[str, Any], trial: Trial) -> tuple[dict[str, Any], dict[str, float], int]:
    """Return kernels, sites and what was done; `ValueError` if they are not this network's."""
    made = fit({k: state.get(k) for k in ("done", "kernels", "sites")}, CheckpointFile)
    if made.kernels.keys() != {k.name for k in trial.kernels.values()}:
        raise ValueError("it has the weights of another network")
    if made.sites.keys() != {s.node.name for s in trial.sites.values()}:
        raise ValueError("it has the activations of another network")
    for kernel in trial.kernels.values():
        kept = made.kernels[kernel.name]
        shapes = {"steps": kernel.steps.shape, "codes": kernel.weight.shape, "shift": None}
        if not kept.keys() >= shapes.keys():
            raise ValueError(f"it lacks something of {kernel.name}")
        for part, shape in shapes.items():
            value = kept[part]
            if value is None and part != "steps":
                continue
            if not isinstance(value, Tensor) or (shape is not None and value.shape != shape):
                raise ValueError(f"{part} of {kernel.name} do not fit it")
            if not bool(value.isfinite().all()) or (part == "codes" and _beyond(value, kernel)):
                raise ValueError(f"{part} of {kernel.name} are out of range")
    return made.kernels, made.sites, made.done


__all__ = ["key", "load", "save"]
