"""Data that a person gives, batch by batch: what fits is handed on, anything else is an error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from narrows.errors import UsageError
from narrows.ir.program import Program

Split = Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Told:
    """What errors say of data: why it is asked for, and what to give."""

    why: str
    hint: str


CALIBRATION = Told(
    "the ranges of activations are measured on it",
    "calibration=[images] or any iterable of inputs; an iterator is used up once",
)


CHOOSING = Told(
    "what the layers see, and what the outputs lose, is measured on it",
    "data=[images] or any iterable of inputs, without labels; an iterator is used up once",
)


def batches(
    program: Program, data: Iterable[Any] | None, doing: str, told: Told = CALIBRATION
) -> Iterator[list[Any]]:
    """Yield the flat inputs of every batch, and say on a terminal how many there were.

    Args:
        program: What they are for.
        data: Each item is one batch: a tuple of positional inputs, a dict of inputs by name, or one
            tensor.
        doing: What is done with them, ``calibrating``.
        told: What errors say of the data.

    Raises:
        UsageError: There is none, or an item is no batch.
        ProgramError: An item does not fit the program.
    """
    return (flat for flat, _ in with_items(program, data, doing, as_inputs, told))


def with_items(
    program: Program, data: Iterable[Any] | None, doing: str, split: Split, told: Told
) -> Iterator[tuple[list[Any], Any]]:
    """Yield the flat inputs of every batch, and the batch as it was given; else as `batches`.

    Args:
        program: What they are for.
        data: The batches.
        doing: What is done with them.
        split: Returns a batch's positional inputs and those by name.
        told: What errors say of the data.
    """
    _refuse(data, told)
    count, show = 0, sys.stderr.isatty()
    for item in data if data is not None else ():
        args, kwargs = split(item)
        flat = program.flat_inputs(args, kwargs)
        _check(program, flat, count, told)
        yield flat, item
        count += 1
        if show:
            print(f"\r{doing}: {count} batches", end="", file=sys.stderr, flush=True)
    if show and count:
        print(file=sys.stderr)
    if not count:
        raise UsageError(
            "there is no calibration data" if doing == "calibrating" else "there is no data",
            why=told.why,
            hint=told.hint,
        )


def kept(data: Iterable[Any] | None, told: Told = CALIBRATION) -> list[Any]:
    """Return data that is read more than once; `UsageError` for what is one batch."""
    _refuse(data, told)
    return [] if data is None else list(data)


def _check(program: Program, flat: list[Any], count: int, told: Told) -> None:
    for node, value, example in zip(program.placeholders, flat, program.examples, strict=True):
        if not isinstance(value, Tensor) or not isinstance(example, Tensor):
            continue
        if not value.numel():
            raise UsageError(
                f"batch {count} of the data has nothing in it",
                where=f"input {node.name}",
                why=told.why,
            )
        if value.dtype != example.dtype:
            raise UsageError(
                f"batch {count} of the data is {value.dtype}, the program takes {example.dtype}",
                where=f"input {node.name}",
                hint=f"convert it: x.to({example.dtype})",
            )


def _refuse(data: Any, told: Told) -> None:
    """Raise `UsageError` for what is one batch, or none at all."""
    if isinstance(data, Tensor | Mapping) or hasattr(data, "__array__"):
        raise UsageError(
            f"the data is one {type(data).__name__}, not batches", hint="put it into a list: [data]"
        )
    if data is not None and (isinstance(data, str | bytes) or not isinstance(data, Iterable)):
        raise UsageError(
            f"the data is a {type(data).__name__}", why="it has to be an iterable", hint=told.hint
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


def without_extras(program: Program) -> Split:
    """Return what takes a batch's inputs, and leaves out what only a loss is to see."""
    positional, named = program.in_spec.unflatten(range(program.in_spec.num_leaves))
    known = {*named, *(n.name for n in program.placeholders)}

    def split(item: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = as_inputs(item)
        return args[: len(positional)], {k: v for k, v in kwargs.items() if k in known}

    return split


__all__ = [
    "CHOOSING", "Split", "Told", "as_inputs", "batches", "kept", "with_items", "without_extras",
]  # fmt: skip
