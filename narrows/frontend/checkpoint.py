"""Checkpoints on disk: tensors by name, without running what a file may bring along."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrows.errors import UsageError

SUFFIXES = (".pt", ".pth", ".safetensors")
# Under which keys training scripts keep the weights beside the optimiser's state.
NESTED = ("state_dict", "model_state_dict", "model")


def load_checkpoint(
    path: str | os.PathLike[str], *, allow_pickle: bool = False
) -> dict[str, Tensor]:
    """Return the tensors of a ``.pt``, ``.pth`` or ``.safetensors`` file by name.

    Args:
        path: The file. One that holds more than a state dict may keep it under ``state_dict``,
            ``model_state_dict`` or ``model``.
        allow_pickle: Whether a file may hold arbitrary Python objects. Loading those can run any
            code.

    Raises:
        UsageError: The file is missing, damaged, of another kind, or needs ``allow_pickle``.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UsageError(f"cannot read {path.name}", why=f"a checkpoint is {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UsageError("there is no checkpoint", where=str(path))
    held = (
        _read_safetensors(path)
        if path.suffix == ".safetensors"
        else _read_torch(path, allow_pickle)
    )
    return _state(held, path)


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as cause:
        raise UsageError(f"the checkpoint is damaged: {cause}", where=str(path)) from cause


def _read_torch(path: Path, allow_pickle: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's version; what matters raises
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as cause:
        if allow_pickle:
            raise UsageError(f"the checkpoint is damaged: {cause}", where=str(path)) from cause
        raise UsageError(
            "the checkpoint holds more than tensors, or is damaged",
            where=str(path),
            why="loading other objects can run any code",
            hint="--allow-pickle, if you trust who made it",
        ) from cause
    except (RuntimeError, EOFError, OSError, AttributeError, ImportError) as cause:
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise UsageError(f"cannot read the checkpoint: {reason}", where=str(path)) from cause


def _state(held: Any, path: Path) -> dict[str, Tensor]:
    """Return the state dict in what a file held, without the prefix of a parallel wrapper."""
    if isinstance(held, torch.nn.Module):
        held = held.state_dict()
    if isinstance(held, Mapping):
        nested = (held[k] for k in NESTED if isinstance(held.get(k), Mapping))
        held = next(nested, held)
    if not isinstance(held, Mapping) or not all(isinstance(t, Tensor) for t in held.values()):
        raise UsageError("the checkpoint holds no state dict", where=str(path))
    names = list(held)
    if names and all(n.startswith("module.") for n in names):
        return {n.removeprefix("module."): t for n, t in held.items()}
    return dict(held)
