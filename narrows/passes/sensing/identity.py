"""`identity`: what tells a person's function or object from another, in a later run as well.

An address tells nothing: a later run has other ones, and one of this run is used again when an
object is gone. So an object is what pickle would make of it, and a function is its code with all
that it was made with. What cannot be taken apart so has no identity.
"""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from narrows.errors import PlanUsageError

PLAIN = (
    type(None), bool, int, float, complex, str, bytes, type(...), torch.SymInt, torch.dtype,
    torch.device, torch.layout, torch.memory_format, torch._ops.OpOverload,
)  # fmt: skip

# Code of these is known by its name: their versions are part of every key.
KNOWN = {*sys.stdlib_module_names, "builtins", "torch", "narrows"}

# Of two equal constants Python may make one object or two, and another time the other way.
SHARED = (tuple, frozenset, types.CodeType)

IDLE = {"_abc_impl"}  # what a class has of the interpreter's, not of its author's


def identity(what: str, value: Any) -> str:
    """Return a hash of a value: two of the same hash do the same.

    Of a function that is its name, its code, its defaults and what it closes over; of a bound
    method or a `functools.partial` what it is made of; of an object its class, with the code of its
    methods, and its state as pickle has it. What code calls or reads by a global name is not looked
    at.

    Args:
        what: What an error calls it.
        value: The value.

    Raises:
        PlanUsageError: A part of it cannot be told from others.
    """
    made = hashlib.sha256()
    try:
        for part in _Parts().of(value):
            made.update(b"%d:" % len(part))  # so that no two ways to cut parts are alike
            made.update(part)
    except _UnknowableError as error:
        raise PlanUsageError(
            f"results with this {what} cannot be kept for a later run",
            why=f"{error}, so it is not known whether it would be the same then",
            hint="leave out cache; or give a function of a module, or an object that pickle takes",
        ) from error
    return made.hexdigest()


class _UnknowableError(Exception):
    """A part has no identity."""


@dataclass(eq=False)
class _Parts:
    """Takes one value apart.

    Attributes:
        seen: What was taken apart, by its address, held so that no address is used again.
    """

    seen: dict[int, tuple[int, Any]] = field(default_factory=dict)

    def of(self, value: Any) -> Iterator[bytes]:
        """Yield what makes up a value."""
        kind = type(value)
        yield f"{kind.__module__}.{kind.__qualname__}".encode()
        if isinstance(value, types.ModuleType):
            yield value.__name__.encode()
            return
        if kind in PLAIN:
            yield repr(value).encode("utf-8", "surrogatepass")
            return
        if kind in SHARED:
            yield from self.parts(value)
            return
        if id(value) in self.seen:  # as in a function that calls itself
            yield f"again {self.seen[id(value)][0]}".encode()
            return
        self.seen[id(value)] = (len(self.seen), value)
        yield from self.parts(value)

    def parts(self, value: Any) -> Iterator[bytes]:
        """Yield what makes up a value that has parts."""
        if isinstance(value, Tensor):
            yield f"{value.dtype}{list(value.shape)}".encode()
            yield _bytes_of(value)
        elif type(value) is np.ndarray and not value.dtype.hasobject:
            yield f"{value.dtype}{list(value.shape)}".encode()
            yield value.tobytes()
        elif type(value) in (tuple, list):
            yield from self.each(value)
        elif type(value) in (set, frozenset):
            yield from sorted(_alone(v) for v in value)
        elif type(value) is dict:
            yield from self.each(part for entry in value.items() for part in entry)
        elif isinstance(value, types.FunctionType):
            yield from self.function(value)
        elif isinstance(value, types.CodeType):
            yield value.co_code
            yield from self.each([
                sys.version_info[:2], value.co_names, value.co_varnames, value.co_freevars,
                value.co_cellvars, value.co_argcount, value.co_posonlyargcount,
                value.co_kwonlyargcount, value.co_flags, value.co_consts,
                value.co_exceptiontable,
            ])  # fmt: skip
        elif isinstance(value, type):
            yield from self.kind(value)
        elif isinstance(value, types.MethodType):
            yield from self.each([value.__func__, value.__self__])
        elif isinstance(value, classmethod | staticmethod):
            yield from self.of(value.__func__)
        elif isinstance(value, property):
            yield from self.each([value.fget, value.fset, value.fdel])
        else:
            yield from self.state(value)

    def each(self, values: Any) -> Iterator[bytes]:
        """Yield what makes up some values, and how many there are."""
        values = [*values]
        yield str(len(values)).encode()
        for value in values:
            yield from self.of(value)

    def function(self, value: types.FunctionType) -> Iterator[bytes]:
        """Yield what makes up a function of Python."""
        cells = [_content(cell) for cell in value.__closure__ or ()]
        yield f"{value.__module__}.{value.__qualname__}".encode()
        yield from self.each([
            value.__code__, value.__defaults__, value.__kwdefaults__, cells, vars(value)
        ])  # fmt: skip

    def kind(self, value: type) -> Iterator[bytes]:
        """Yield what makes up a class."""
        yield f"{value.__module__}.{value.__qualname__}".encode()
        if value.__module__.partition(".")[0] in KNOWN:
            return
        yield from self.each(value.__bases__)
        for name, part in vars(value).items():
            code = isinstance(part, types.FunctionType | classmethod | staticmethod | property)
            idle = name in IDLE or isinstance(
                part, types.MemberDescriptorType | types.GetSetDescriptorType
            )
            if code or not (idle or name.startswith("__")):
                yield name.encode()
                yield from self.of(part)

    def state(self, value: Any) -> Iterator[bytes]:
        """Yield what pickle would make an object from."""
        try:
            made = value.__reduce_ex__(4)
        except Exception as error:  # a person's own class may do anything there
            raise _UnknowableError(f"{type(value).__qualname__}: {error}") from error
        if isinstance(made, str):  # something that stands under its name in a module
            yield f"{getattr(value, '__module__', None)}.{made}".encode()
            yield from self.of(getattr(value, "__wrapped__", None))
            return
        yield from self.each(made[:3])
        yield from self.each(made[3] or () if len(made) > 3 else ())
        yield from self.each(made[4] or () if len(made) > 4 else ())


def _alone(value: Any) -> bytes:
    """Return a hash of an element of a set, which has no order."""
    made = hashlib.sha256()
    for part in _Parts().of(value):
        made.update(b"%d:" % len(part))
        made.update(part)
    return made.digest()


def _content(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # it is empty yet
        return ()


def _bytes_of(value: Tensor) -> bytes:
    try:
        flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().flatten()
        return flat.view(torch.uint8).numpy().tobytes()
    except (RuntimeError, NotImplementedError, TypeError) as error:  # such as a sparse one
        raise _UnknowableError(f"a tensor of {value.layout}: {error}") from error


__all__ = ["identity"]
