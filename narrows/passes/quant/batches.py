"""Data that a person gives, batch by batch: what fits is handed on, anything else is an error."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from narrows.errors import UsageError
from narrows.ir.program import Program

HINT = "calibration=[images] or any iterable of inputs; an iterator is used up once"


def batches(program: Program, data: Iterable[Any] | None, doing: str) -> Iterator[list[Any]]:
    """Yield the flat inputs of every batch, and say on a terminal how many there were.

    Args:
        program: What they are for.
        data: Each item is one batch: a tuple of positional inputs, a dict of inputs by name, or one
            tensor.
        doing: What is done with them, ``calibrating``.

    Raises:
        UsageError: There is none, or an item is no batch.
        ProgramError: An item does not fit the program.
    """
    _refuse(data)
    count, show = 0, sys.stderr.isatty()
    for item in data if data is not None else ():
        flat = program.flat_inputs(*as_inputs(item))
        _check(program, flat, count)
        yield flat
        count += 1
        if show:
            print(f"\r{doing}: {count} batches", end="", file=sys.stderr, flush=True)
    if show and count:
        print(file=sys.stderr)
    if not count:
        raise UsageError(
            "there is no calibration data" if doing == "calibrating" else "there is no data",
            why="the ranges of activations are measured on it",
            hint=HINT,
        )


def kept(data: Iterable[Any] | None) -> list[Any]:
    """Return data that is read more than once; `UsageError` for what is one batch."""
    _refuse(data)
    return [] if data is None else list(data)


def _check(program: Program, flat: list[Any], count: int) -> None:
    for node, value, example in zip(program.placeholders, flat, program.examples, strict=True):
        if not isinstance(value, Tensor) or not isinstance(example, Tensor):
            continue
        if not value.numel():
            raise UsageError(
                f"batch {count} of the data has nothing in it",
                where=f"input {node.name}",
                why="ranges are measured on it",
            )
        if value.dtype != example.dtype:
            raise UsageError(
                f"batch {count} of the data is {value.dtype}, the program takes {example.dtype}",
                where=f"input {node.name}",
                hint=f"convert it: x.to({example.dtype})",
            )


def _refuse(data: Any) -> None:
    """Raise `UsageError` for what is one batch, or none at all."""
    if isinstance(data, Tensor | Mapping) or hasattr(data, "__array__"):
        raise UsageError(
            f"the data is one {type(data).__name__}, not batches", hint="put it into a list: [data]"
        )
    if data is not None and (isinstance(data, str | bytes) or not isinstance(data, Iterable)):
        raise UsageError(
            f"the data is a {type(data).__name__}", why="it has to be an iterable", hint=HINT
        )


def as_inputs(item: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional inputs and inputs by name from an item of the data."""
    if isinstance(item, Mapping):
        return (), dict(item)
    if isinstance(item, tuple | list):
        return tuple(item), {}
    if isinstance(item, Tensor):
        return (item,), {}
    raise UsageError(
        f"the data holds a {type(item).__name__}",
        why="each item is one batch: a tuple of inputs, a dict by name, or a tensor",
        hint="torch.from_numpy(array)" if hasattr(item, "__array__") else "",
    )


__all__ = ["as_inputs", "batches", "kept"]
