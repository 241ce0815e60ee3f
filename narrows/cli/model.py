"""From the command line's words to a model in eval mode and its example inputs."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrows.errors import UsageError, suggest
from narrows.ir.snapshot import DTYPES

if TYPE_CHECKING:
    from torch import Tensor, nn

    from narrows.ir.program import Program

SPEC = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<dtype>\w+)\[(?P<shape>[\d,\s]*)\](?::(?P<high>\d+))?"
)
SOURCE = ("input", "weights", "allow_pickle", "fixed_batch", "state")  # options of a model
LONG = {short: long for long, short in DTYPES.items()}


# ------------------------------------------------------------------ the model


def load_model(arguments: argparse.Namespace) -> nn.Module:
    """Return the model that the arguments name, with its checkpoint, in eval mode."""
    model = make_model(arguments.model)
    if arguments.weights:
        load_weights(model, arguments.weights, allow_pickle=arguments.allow_pickle)
    elif arguments.allow_pickle:
        raise UsageError("--allow-pickle has no effect without --weights")
    return model.eval()


def named(spec: str, what: str, example: str) -> Any:
    """Return what ``MODULE:NAME`` names.

    Args:
        spec: The text; the module may be a ``.py`` file.
        what: What it is to be, for errors.
        example: One, for errors.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        kind = "FACTORY" if what == "model" else what.upper()
        raise UsageError(
            f"{spec!r} names no {what}", why=f"a {what} is MODULE:{kind}", hint=example
        )
    found: Any = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    for part in name.split("."):
        if not hasattr(found, part):
            known = [n for n in dir(found) if not n.startswith("_")]
            raise UsageError(f"{place} has no {name!r}", hint=suggest(part, known))
        found = getattr(found, part)
    return found


def make_model(spec: str) -> nn.Module:
    """Return what the factory of ``MODULE:FACTORY`` makes."""
    from torch import nn

    factory: Any = named(spec, "model", "torchvision.models:resnet18, or nets.py:small")
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise UsageError(f"{spec} is no function: it is a {type(factory).__name__}")
    try:
        inspect.signature(factory).bind()
    except TypeError as cause:
        why = "a factory is called without arguments"
        raise UsageError(f"{spec} cannot be called: {cause}", why=why) from cause
    except ValueError:  # written in C, without a signature
        pass
    try:
        model = factory()
    except Exception as cause:
        last = traceback.extract_tb(cause.__traceback__)[-1]
        raise UsageError(
            f"{spec}() failed: {type(cause).__name__}: {cause}",
            where=f"{last.filename}:{last.lineno}  {last.line}",
        ) from cause
    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec}() returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"there is no file {str(path)!r}")
    place = path.resolve()
    there = place.stat()
    module = _imported(path, (place, there.st_mtime_ns, there.st_size))
    sys.modules[path.stem] = module  # another file of that name may have come between
    return module


@functools.lru_cache
def _imported(path: Path, version: tuple[Path, int, int]) -> Any:
    """Return the module of a file: once for a model and a function that stand in the same one.

    Args:
        path: The file.
        version: Where it is, when it was changed, and its size: another one is imported anew.
    """
    del version
    name = path.stem
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise UsageError(f"cannot import {path}")
    module = importlib.util.module_from_spec(found)
    sys.path.insert(0, str(path.parent.resolve()))  # its neighbours can be imported, as by `python`
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except Exception as cause:
        del sys.modules[name]
        raise UsageError(f"cannot import {path}: {type(cause).__name__}: {cause}") from cause
    return module


def _import_module(name: str) -> Any:
    if (cwd := os.getcwd()) not in sys.path:
        sys.path.insert(0, cwd)
    try:
        return importlib.import_module(name)
    except Exception as cause:
        hint = f"{name}.py:FACTORY, if it is a file" if Path(f"{name}.py").is_file() else ""
        raise UsageError(
            f"cannot import {name!r}: {type(cause).__name__}: {cause}", hint=hint
        ) from cause


def load_weights(model: nn.Module, path: str, *, allow_pickle: bool = False) -> None:
    """Load a checkpoint into a model; every name and shape must fit."""
    from narrows.frontend.checkpoint import load_checkpoint

    state = load_checkpoint(path, allow_pickle=allow_pickle)
    own = model.state_dict()
    missing = [n for n in own if n not in state]
    unknown = [n for n in state if n not in own]
    if missing or unknown:
        parts = [f"it lacks {_few(missing)}"] if missing else []
        parts += [f"the model has no {_few(unknown)}"] if unknown else []
        hint = suggest(missing[0], unknown) if missing else ""
        raise UsageError(
            "the checkpoint is not this model's", where=path, why="; ".join(parts), hint=hint
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise UsageError(
                f"weight {name!r} is {list(state[name].shape)} in the checkpoint, "
                f"{list(tensor.shape)} in the model",
                where=path,
            )
    model.load_state_dict(state)


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


# ------------------------------------------------------------------ the inputs


@dataclass(frozen=True)
class InputSpec:
    """One example input.

    Attributes:
        name: The argument's name, or nothing for a positional one.
        dtype: The dtype as torch spells it, ``float32``.
        shape: The shape.
        high: Integers are below this.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    high: int = 2

    def sample(self) -> Tensor:
        """Return random numbers: normal ones, or integers from 0 to ``high - 1``."""
        import torch

        dtype = getattr(torch, self.dtype)
        try:
            if dtype.is_floating_point or dtype.is_complex:
                return torch.randn(self.shape, dtype=dtype)
            return torch.randint(self.high, self.shape).to(dtype)
        except (RuntimeError, MemoryError) as cause:
            size = f"{self.dtype}{list(self.shape)}"
            raise UsageError(f"an input {size} does not fit into memory") from cause


def parse_input(text: str) -> InputSpec:
    """Return what ``name=f32[2,3,8,8]`` describes; `UsageError` with the reason if malformed."""
    found = SPEC.fullmatch(text.strip())
    if found is None:
        raise UsageError(
            f"input {text!r} is malformed",
            hint="f32[2,3,224,224], i64[2,16]:1000 or mask=bool[2,16]",
        )
    dtype = found["dtype"]
    if dtype not in LONG and dtype not in DTYPES:
        known = ", ".join(LONG)
        raise UsageError(
            f"input {text!r} has the unknown dtype {dtype!r}",
            why=f"known are {known}",
            hint=suggest(dtype, [*LONG, *DTYPES]),
        )
    sizes = [s.strip() for s in found["shape"].split(",")] if found["shape"].strip() else []
    if not all(s.isdigit() and int(s) > 0 for s in sizes):
        raise UsageError(f"input {text!r} has a size that is no positive number")
    long = LONG.get(dtype, dtype)
    high = found["high"]
    if high is not None and (long == "bool" or not long.startswith(("int", "uint"))):
        raise UsageError(f"input {text!r}: only integers have a bound")
    return InputSpec(found["name"] or "", long, tuple(map(int, sizes)), int(high or 2))


def make_inputs(texts: list[str]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return the positional and the named inputs, the same for the same text."""
    import torch

    if not texts:
        raise UsageError("the model's inputs are missing", hint="-i f32[2,3,224,224]")
    specs = [parse_input(t) for t in texts]
    names = [s.name for s in specs if s.name]
    if len(set(names)) < len(names):
        raise UsageError(f"input {max(names, key=names.count)!r} is given twice")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        values = [(s.name, s.sample()) for s in specs]
    return tuple(v for n, v in values if not n), {n: v for n, v in values if n}


def capture_model(arguments: argparse.Namespace) -> Program:
    """Return the program of the model that the arguments name."""
    from narrows import api

    inputs, named = make_inputs(arguments.input)
    return api.capture(
        load_model(arguments),
        inputs,
        kwargs=named or None,
        dynamic_batch=not arguments.fixed_batch,
        name=model_name(arguments.model),
        state=make_states(arguments.state),
    )


def make_states(texts: list[str]) -> dict[str, tuple[int | str, ...]] | None:
    """Return the outputs that are handed back, by the inputs' names; ``None`` for none."""
    states: dict[str, tuple[int | str, ...]] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        steps = path.split(".")
        if not (name and equals and all(steps)) or name in states:
            why = "it is given twice" if name in states else "an input, =, and an output"
            raise UsageError(f"--state {text!r} is no state", why=why, hint="--state cache=1")
        states[name] = tuple(int(s) if s.isdigit() else s for s in steps)
    return states or None


def model_name(spec: str) -> str:
    """Return the program's name: that of the factory."""
    return spec.rpartition(":")[2]
