"""``narrows compress``: a model, data and a budget become an artifact; nothing is trained."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from narrows.api.compressing import Compressing, compressed
from narrows.cli import grids
from narrows.cli.commands import (
    facts_of,
    print_json,
    refuse_missing_folder,
    refuse_output,
    times_of,
)  # fmt: skip
from narrows.cli.emitted import parse_target
from narrows.cli.flags import given
from narrows.cli.model import capture_model, named
from narrows.errors import UsageError
from narrows.options import to_json


def compress(arguments: argparse.Namespace) -> int:
    """Compress a model and save the artifact."""
    output = Path(arguments.output)
    refuse_output(output)
    for path in (arguments.save_plan, arguments.save_solved):
        if path is not None:
            refuse_missing_folder(Path(path))
    asked = Compressing(**given(arguments, Compressing))
    target = parse_target(arguments.target, arguments)
    evaluate = arguments.evaluate
    if evaluate is not None:
        evaluate = named(evaluate, "function", "nets.py:accuracy")
    program = capture_model(arguments)
    data = [*grids.batches(Path(arguments.data), program)]
    how: dict[str, Any] = {"contest": False if arguments.no_contest else None}
    made = compressed(program, data, asked, target, evaluate, **how, progress=teller())
    if made.plan is None and (arguments.save_plan or arguments.save_solved):
        raise UsageError("there is no channel plan to save", why="only the bits were asked for")
    made.artifact.save(output)
    if made.plan is not None and arguments.save_plan is not None:
        made.plan.save(arguments.save_plan)
    if made.solved is not None and arguments.save_solved is not None:
        made.solved.save(arguments.save_solved)
    if arguments.json:
        found: dict[str, Any] = {"options": to_json(asked), "notes": made.told}
        print_json({**facts_of(made.artifact, output), **times_of(made.artifact), **found})
        return 0
    print(made.artifact.report)
    for line in made.told:
        print(line)
    print(f"\nsaved in {output}")
    return 0


def teller() -> Any:
    """Return what shows how far it is, where a person is looking."""
    shown = sys.stderr.isatty()

    def tell(what: str, done: int, total: int) -> None:
        if shown:
            print(f"\r\033[K{what} ({done} of {total})", end="", file=sys.stderr, flush=True)

    return tell
