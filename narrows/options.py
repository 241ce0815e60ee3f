"""Options that are said once: the fields of a frozen dataclass.

A field's name is its keyword in Python and its key in JSON. Its paragraph under ``Attributes`` in
the docstring of the class is its text: whole in the documentation of a function (`takes`), the
first sentence in the help of the command line. ``__post_init__`` checks it. `option` says how the
command line asks for it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from narrows.errors import UsageError, unknown_option

FLAG = "flag"  # the key, in a field's metadata, of its `Flag`
UNSET = object()
ENTRY = re.compile(r" {4}(\w+(?:, \w+)*): (.*)")

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Flag:
    """How the command line asks for an option.

    Attributes:
        name: What follows the two hyphens; that of the field with hyphens unless given.
        metavar: What stands for the value in the help.
        choices: The only values there are, if it has such.
        many: Whether the flag may stand several times.
        rest: Whether several values may follow it.
        read: Returns the value for what was given, a text or, with ``many`` or ``rest``, a list of
            texts; and for the flag's spelling, which an error names.
        off: What ``--no-NAME`` gives, if there is such a flag.
    """

    name: str = ""
    metavar: str = ""
    choices: tuple[str, ...] = ()
    many: bool = False
    rest: bool = False
    read: Callable[[Any, str], Any] = lambda given, flag: given
    off: Any = UNSET


def option(default: Any, *, meta: Mapping[str, Any] | None = None, **how: Any) -> Any:
    """Return a field of options.

    Args:
        default: Its default.
        meta: More metadata of the field.
        **how: Those of its `Flag`.
    """
    return dataclasses.field(default=default, metadata={**(meta or {}), FLAG: Flag(**how)})


def flags_of(cls: Any) -> dict[str, Flag]:
    """Return field -> flag of the options that the command line has, their names filled in."""
    return {
        f.name: dataclasses.replace(flag, name=flag.name or f.name.replace("_", "-"))
        for f in dataclasses.fields(cls)
        if (flag := f.metadata.get(FLAG)) is not None
    }


# ------------------------------------------------------------------ their texts


def texts_of(cls: type) -> dict[str, str]:
    """Return field -> its paragraph under ``Attributes`` in the class's docstring, in one line.

    Those of the classes that it derives from come first, as their fields do.
    """
    texts: dict[str, str] = {}
    names: list[str] = []
    sections = [
        inspect.cleandoc(vars(base).get("__doc__") or "").partition("\nAttributes:\n")[2]
        for base in reversed(cls.__mro__)
    ]
    for line in "\n".join(sections).splitlines():
        entry = ENTRY.fullmatch(line)
        if entry is not None:
            names = entry[1].split(", ")
            texts.update(dict.fromkeys(names, entry[2]))
        elif line.strip():
            texts.update({name: f"{texts[name]} {line.strip()}" for name in names})
    return texts


def first_sentence(text: str) -> str:
    """Return the first sentence of a text as the help of a flag: without marks, in lower case."""
    text = re.split(r"(?<=\w|[\])`\"])\.(?: |$)", text)[0].replace("`", "")
    return text[:1].lower() + text[1:] if text[1:2].islower() or text[1:2] == " " else text


def takes(cls: type) -> Callable[[F], F]:
    """Return a decorator for a function whose keywords are options, among others.

    Their texts go into its docstring, in place of the entry that begins with the first one's name
    and ``", ...:"``. A keyword that it has not is a `UsageError` with a suggestion.
    """
    texts = texts_of(cls)
    entry = re.compile(rf"^( *){next(iter(texts), '')}, \.\.\.:.*\n(?:\1 +.*\n)*", re.MULTILINE)

    def told(found: re.Match[str]) -> str:
        indent = found[1]
        paragraphs = (f"{name}: {text}" for name, text in texts.items())
        hanging = {"initial_indent": indent, "subsequent_indent": f"{indent}    "}
        return "".join(f"{textwrap.fill(p, 100, **hanging)}\n" for p in paragraphs)

    def decorate(function: F) -> F:
        first, *known = inspect.signature(function).parameters

        @functools.wraps(function)
        def refusing(*args: Any, **named: Any) -> Any:
            for name in named:
                if name not in (first, *known):
                    raise unknown_option(function.__name__, name, known)
            return function(*args, **named)

        refusing.__doc__ = entry.sub(told, function.__doc__ or "")
        return refusing  # type: ignore[return-value]

    return decorate


# ------------------------------------------------------------------ their values


def gather(cls: Callable[..., T], given: Mapping[str, Any]) -> T:
    """Return options of what a function was given, its ``locals()``."""
    return cls(**{f.name: given[f.name] for f in dataclasses.fields(cls)})  # type: ignore[arg-type]


def from_json(
    cls: Callable[..., T], given: Mapping[str, Any], owner: str, others: Sequence[str] = ()
) -> T:
    """Return options of JSON data, or of keywords; `UsageError` for what ``owner`` has not.

    Args:
        cls: The dataclass.
        given: The options by name.
        owner: What is said to have no such option.
        others: What it has besides, and is left alone.
    """
    fields = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in given:
        if name not in (*others, *fields):
            raise unknown_option(owner, name, [*others, *fields])
    return cls(**{name: given[name] for name in fields if name in given})


def to_json(options: Any) -> dict[str, Any]:
    """Return options as JSON data; ``<Type>`` for what lives in memory only."""
    return {f.name: _plain(getattr(options, f.name)) for f in dataclasses.fields(options)}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return f"<{type(value).__name__}>"


def check_truths(options: Any, error: type[UsageError] = UsageError) -> None:
    """Raise unless options whose default is a truth value are one: ``"no"`` would count as yes."""
    for f in dataclasses.fields(options):
        value = getattr(options, f.name)
        if isinstance(f.default, bool) and not isinstance(value, bool):
            raise error(f"{f.name} is True or False, got {value!r}")


# ------------------------------------------------------------------ reading what a flag says


def number(text: str, flag: str) -> float:
    """Return a number."""
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{flag} {text}: {text!r} is no number") from None


def whole(text: str, flag: str) -> int:
    """Return a whole number."""
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{flag} {text}: {text!r} is no whole number") from None


def whole_or_text(text: str, flag: str) -> int | str:
    """Return a whole number where there is one, else the text as it is."""
    return int(text) if text.isdecimal() else text


def several(texts: list[str], flag: str) -> tuple[str, ...]:
    """Return what was given, one for every time."""
    return tuple(texts)


def per_glob(texts: list[str], flag: str, read: Callable[[str], Any], example: str) -> Any:
    """Return one value for all, or per glob one; ``GLOB=VALUE`` is for one, ``VALUE`` for the rest.

    Args:
        texts: What was given, in its order; the first glob that matches counts.
        flag: How the flag is spelled.
        read: Returns the value of a text; `ValueError` if it is none.
        example: A value, for errors.
    """
    values: dict[str, Any] = {}
    for text in texts:
        glob, equals, value = text.rpartition("=")
        glob = glob if equals else "*"
        if glob in values:
            raise UsageError(f"{flag} {text}: there is one for {glob!r} already")
        try:
            values[glob] = read(value)
        except ValueError:
            hint = f"{flag} {example}, or {flag} 'layer4.*={example}'"
            raise UsageError(f"{flag} {text}: {value!r} is no number", hint=hint) from None
    if list(values) == ["*"]:
        return values["*"]
    rest = {"*": values.pop("*")} if "*" in values else {}
    return {**values, **rest}


def globs(given: Any) -> tuple[Any, ...]:
    """Return the globs of an option that takes one or several."""
    one = isinstance(given, str) or not hasattr(given, "__iter__")
    return (given,) if one else tuple(given)
