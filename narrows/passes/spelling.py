"""The text of a pipeline: ``prune-channels{plan=p.json}, fold-batch-norm``.

    pipeline = [pass {"," pass}]
    pass     = name ["{" [option {"," option}] "}"]
    option   = field "=" value
    value    = "true" | "false" | "none" | number | word | json-string | "(" [value {"," value}] ")"

A field's underscores may be written as hyphens. A string that would read as something else, or that
holds a character with a meaning, is quoted. Options at their default are not written, so every pass
has one spelling, and reading it back gives an equal pass.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import types
import typing
from collections.abc import Callable
from typing import Any

from narrows.errors import UsageError, unknown_option

# Returns the class of a pass by its name.
Lookup = Callable[[str], Any]

WORD = re.compile(r"[A-Za-z0-9_.:/@%+*?~!-]+")
QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?|[+-]?inf|nan")
INTEGER = re.compile(r"[+-]?\d+")
CONSTANTS = {"true": True, "false": False, "none": None}


# ------------------------------------------------------------------ writing


def spell(pass_: Any) -> str:
    """Return the one spelling of a pass."""
    options = [f"{key}={spell_value(value)}" for key, value in changed_options(pass_)]
    return pass_.name + (f"{{{', '.join(options)}}}" if options else "")


def changed_options(pass_: Any) -> list[tuple[str, Any]]:
    """Return the options of a pass that are not at their default, in the order of the fields."""
    changed = []
    for field in dataclasses.fields(pass_):
        value = getattr(pass_, field.name)
        if value is not default_of(field) and not same(value, default_of(field)):
            changed.append((field.name.replace("_", "-"), value))
    return changed


def same(a: Any, b: Any) -> bool:
    """Return whether two options are equal and of one type, so that ``1`` is not ``True``."""
    return type(a) is type(b) and bool(a == b)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return a field's default, or ``MISSING``."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def spell_value(value: Any) -> str:
    """Return how an option's value is written; ``<Type>`` for one that lives in memory only."""
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, os.PathLike):
        return spell_value(os.fspath(value))
    if isinstance(value, str):
        bare = WORD.fullmatch(value) and isinstance(read_word(value), str)
        return value if bare else json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple | list):
        return f"({', '.join(spell_value(v) for v in value)})"
    return f"<{type(value).__name__}>"


# ------------------------------------------------------------------ reading


def parse(text: str, lookup: Lookup) -> tuple[Any, ...]:
    """Return the passes that ``text`` spells; `UsageError` points at the place where it fails.

    Args:
        text: The spelling of a pipeline.
        lookup: Returns the class of a pass by its name (`narrows.passes.catalog.lookup`).
    """
    return _Reader(text).pipeline(lookup)


def parse_options(text: str) -> tuple[str, dict[str, Any]]:
    """Return name and options of one thing spelled like a pass: ``onnx{opset=21}``."""
    reader = _Reader(text)
    name, options = reader.name_and_options()
    if reader.peek():
        raise reader.error("expected the end")
    return name, options


def read_word(word: str) -> Any:
    """Return the value of an unquoted word: a constant, a number, or the word itself."""
    if word in CONSTANTS:
        return CONSTANTS[word]
    if INTEGER.fullmatch(word):
        return int(word)
    return float(word) if NUMBER.fullmatch(word) else word


class _Reader:
    """Reads one pipeline from left to right."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def pipeline(self, lookup: Lookup) -> tuple[Any, ...]:
        passes: list[Any] = []
        while self.peek():
            if passes:
                self.expect(",", "between passes")
            passes.append(self.pass_(lookup))
        return tuple(passes)

    def pass_(self, lookup: Lookup) -> Any:
        self.peek()
        start = self.at
        name, options = self.name_and_options()
        return self.build(lookup, name, options, start)

    def name_and_options(self) -> tuple[str, dict[str, Any]]:
        name = self.match(re.compile(r"[A-Za-z0-9_.:-]+"), "a name")
        options: dict[str, Any] = {}
        if self.peek() == "{":
            self.at += 1
            while self.peek() != "}":
                if options:
                    self.expect(",", "between options")
                key = self.match(re.compile(r"[A-Za-z0-9_-]+"), "an option").replace("-", "_")
                if key in options:
                    raise self.error(f"option {key!r} stands twice")
                self.expect("=", f"after option {key!r}")
                options[key] = self.value()
            self.at += 1
        return name, options

    def build(self, lookup: Lookup, name: str, options: dict[str, Any], start: int) -> Any:
        try:
            return make(lookup(name), options)
        except UsageError as error:
            if error.where:
                raise
            place = self.pointer(start)
            raise UsageError(error.what, where=place, why=error.why, hint=error.hint) from None

    def value(self) -> Any:
        if self.peek() == "(":
            self.at += 1
            values: list[Any] = []
            while self.peek() != ")":
                if values:
                    self.expect(",", "between values")
                values.append(self.value())
            self.at += 1
            return tuple(values)
        if self.peek() == '"':
            try:
                return json.loads(self.match(QUOTED, "a closing quote"))
            except json.JSONDecodeError as cause:
                raise self.error(f"a string is malformed: {cause.msg}") from None
        if self.peek() == "<":
            raise self.error(
                "this value lives in memory only and cannot be read back",
                hint="save it and name the file: prune-channels{plan=p.json}",
            )
        return read_word(self.match(WORD, "a value"))

    def peek(self) -> str:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def expect(self, sign: str, place: str) -> None:
        if self.peek() != sign:
            raise self.error(f"expected {sign!r} {place}")
        self.at += 1

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        self.peek()
        found = pattern.match(self.text, self.at)
        if found is None:
            raise self.error(f"expected {what}")
        self.at = found.end()
        return found.group()

    def error(self, what: str, *, hint: str = "") -> UsageError:
        found = self.text[self.at : self.at + 1]
        what += f", got {found!r}" if found else ", got the end"
        return UsageError(
            f"malformed pipeline: {what}", where=self.pointer(self.at), hint=hint or EXAMPLE
        )

    def pointer(self, at: int) -> str:
        return f"column {at + 1} of {self.text!r}"


EXAMPLE = "prune-channels{plan=p.json}, fold-batch-norm"


def make(cls: Any, options: dict[str, Any]) -> Any:
    """Return a pass with the given options; `UsageError` for an unknown or ill-typed one."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in options:
        if key not in fields:
            known = (f.replace("_", "-") for f in fields)
            raise unknown_option(cls.name, key.replace("_", "-"), known)
    missing = [
        f for f in fields if f not in options and default_of(fields[f]) is dataclasses.MISSING
    ]
    if missing:
        raise UsageError(f"{cls.name} needs the option {missing[0].replace('_', '-')!r}")
    kinds = kinds_of(cls)
    return cls(**{k: _fit(cls.name, k, v, kinds.get(k)) for k, v in options.items()})


def kinds_of(cls: type) -> dict[str, Any]:
    """Return the annotated types of a class's fields, nothing where they cannot be resolved."""
    try:
        return typing.get_type_hints(cls)
    except NameError:  # a name imported for type checkers alone: the class checks for itself
        return {}


def _fit(name: str, key: str, value: Any, kind: Any) -> Any:
    """Return the value as ``kind`` wants it; whole numbers become floats, nothing else changes."""
    if kind is None or _accepts(kind, value):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and _accepts(kind, float(value)):
        return float(value)
    wanted = getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind)
    raise UsageError(
        f"option {key.replace('_', '-')!r} of {name} takes {wanted}, got {spell_value(value)}"
    )


def _accepts(kind: Any, value: Any) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_accepts(a, value) for a in args)
    if origin is typing.Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = args[:1] * len(value) if args[-1:] == (...,) else args
        return len(kinds) == len(value) and all(map(_accepts, kinds, value))
    if kind is type(None):
        return value is None
    if kind in (bool, int, float, str, tuple):
        return type(value) is kind
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)
