"""What the command line says of a target: its spelling, and flags for some of its options."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from narrows.backends import Target, make_target, target_names, target_type
from narrows.cli.flags import add_flags, dest, given
from narrows.errors import LowerError, unknown_option
from narrows.options import flags_of

PREFIX = "target_"  # of the places where argparse keeps the flags of targets


def types() -> Iterator[type[Target]]:
    """Yield the classes of the targets.

    One that is installed and broken is left out: its flags would be of no use, and to name it is an
    error that says what is wrong, as is ``narrows targets``.
    """
    try:
        names = target_names()
    except LowerError:
        return
    for name in names:
        try:
            yield target_type(name)
        except LowerError:
            continue


def add_target_flags(command: argparse.ArgumentParser) -> None:
    """Add the flags that targets have for their options; the command's own go first."""
    group = command.add_argument_group("options of one target")
    for kind in types():
        known = {flag.removeprefix("--") for flag in command._option_string_actions}
        add_flags(group, kind, mark=kind.name, prefix=PREFIX, known=known)


def parse_target(text: str, arguments: argparse.Namespace | None = None) -> Target:
    """Return the target that ``onnx{opset=21}`` spells, which is written like a pass.

    Args:
        text: The target.
        arguments: The command line, if it has flags of targets.
    """
    from narrows.passes.spelling import parse_options

    name, options = parse_options(text)
    if arguments is not None:
        options |= _flagged(arguments, target_type(name.partition(":")[0]))
    return make_target(name, **options)


def _flagged(arguments: argparse.Namespace, kind: type[Target]) -> dict[str, Any]:
    """Return the options of a target that flags give; `UsageError` for a flag of another one."""
    options = given(arguments, kind, PREFIX)
    own = {dest(flag) for flag in flags_of(kind).values()}
    for other in types():
        for name, flag in flags_of(other).items():
            if dest(flag) not in own and getattr(arguments, dest(flag, PREFIX), None) is not None:
                raise unknown_option(kind.name, name, kind.__dataclass_fields__)
    return options


def measured() -> list[str]:
    """Return the names of the targets whose costs can be measured."""
    return [kind.name for kind in types() if kind.measuring or kind.measuring_integers]
