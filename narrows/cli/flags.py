"""Flags made of options: a dataclass's fields on the command line (`narrows.options`)."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection
from typing import Any

from narrows.errors import UsageError
from narrows.options import UNSET, Flag, first_sentence, flags_of, texts_of


def add_flags(
    group: Any, cls: Any, *, mark: str = "", prefix: str = "", known: Collection[str] = ()
) -> None:
    """Add the flags of a dataclass's options to a parser or a group of one.

    What is not given is ``None``: then the default of the field counts.

    Args:
        group: The parser or the group.
        cls: The dataclass.
        mark: What the help has to add to every flag.
        prefix: What sets the places where argparse keeps them apart from others'.
        known: Flags that are there already, and stay what they are.
    """
    texts = texts_of(cls)
    for field in dataclasses.fields(cls):
        flag = flags_of(cls).get(field.name)
        if flag is None or flag.name in known:
            continue
        help_ = _help(texts.get(field.name, ""), field.default, mark)
        if isinstance(field.default, bool):
            action = argparse.BooleanOptionalAction
            group.add_argument(f"--{flag.name}", action=action, dest=dest(flag, prefix), help=help_)
            continue
        how: dict[str, Any] = {"metavar": flag.metavar} if flag.metavar and not flag.choices else {}
        how |= {"nargs": "+"} if flag.rest else {}
        either = group if flag.off is UNSET else group.add_mutually_exclusive_group()
        either.add_argument(
            f"--{flag.name}",
            dest=dest(flag, prefix),
            choices=flag.choices or None,
            action="append" if flag.many else "store",
            help=help_ + ("; repeatable" if flag.many else ""),
            **how,
        )
        if flag.off is not UNSET:
            either.add_argument(
                f"--no-{flag.name}",
                action="store_const",
                const=flag.off,
                dest=dest(flag, prefix),
                help=f"the same as --{flag.name} {flag.off}",
            )


def _help(text: str, default: Any, mark: str) -> str:
    """Return the help of a flag; argparse wants a percent sign doubled."""
    told = default
    if isinstance(default, bool):
        told = "yes" if default else "no"
    elif default is None or default == () or default is dataclasses.MISSING:
        told = ""
    brackets = "; ".join(str(part) for part in (told, mark) if part != "")
    return (first_sentence(text) + (f" ({brackets})" if brackets else "")).replace("%", "%%")


def given(arguments: argparse.Namespace, cls: Any, prefix: str = "") -> dict[str, Any]:
    """Return the options of a dataclass that the command line gives, by the names of the fields."""
    found = {}
    for name, flag in flags_of(cls).items():
        value = getattr(arguments, dest(flag, prefix), None)
        if value is not None:
            text = isinstance(value, str | list)
            found[name] = flag.read(value, f"--{flag.name}") if text else value
    return found


def refuse_idle(arguments: argparse.Namespace, places: Collection[str], why: str) -> None:
    """Raise `UsageError` for an option that was given, and would have no effect.

    Args:
        arguments: The command line.
        places: Where argparse keeps the options.
        why: Why they have none.
    """
    for place in places:
        if getattr(arguments, place) != arguments.parser.get_default(place):
            raise UsageError(f"--{place.replace('_', '-')} would have no effect", why=why)


def dest(flag: Flag, prefix: str = "") -> str:
    """Return where argparse keeps what a flag was given."""
    return prefix + flag.name.replace("-", "_")
