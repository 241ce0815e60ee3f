"""The checkpoint of a reconstruction: what is done, in a file that is whole or as it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrows.errors import UsageError
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
    target = Path(path)
    draft = target.with_name(f"{target.name}.part")
    try:
        torch.save(state, draft)
        os.replace(draft, target)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"cannot write the checkpoint {path}", why=str(error)) from error


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
            f"{path} is not a checkpoint of a reconstruction", why=str(error).splitlines()[0]
        ) from error
    if form != FORMAT or held != key:
        raise UsageError(
            f"the checkpoint {path} is of another run",
            why="the model, its weights, the data or the settings differ",
            hint="name another file, or delete it to begin anew",
        )
    for kernel in trial.kernels.values():
        kept = state["kernels"][kernel.name]
        kernel.steps = kept["steps"].to(kernel.steps)
        kernel.codes = None if kept["codes"] is None else kept["codes"].to(kernel.steps)
        kernel.shift = None if kept["shift"] is None else kept["shift"].to(kernel.steps)
    for site in trial.sites.values():
        site.step = state["sites"][site.node.name]
    return state["done"]


__all__ = ["key", "load", "save"]
