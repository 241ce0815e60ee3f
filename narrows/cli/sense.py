"""``narrows sense``: a table of what the outputs lose to one change at a time."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from narrows.api import sensing
from narrows.cli import grids
from narrows.cli.commands import print_json, refuse_missing_folder, teller
from narrows.cli.flags import given
from narrows.cli.model import capture_model, named
from narrows.executors.catalog import find
from narrows.files.writing import STDOUT
from narrows.options import to_json
from narrows.passes.sensing.options import Sensing


def sense(arguments: argparse.Namespace) -> int:
    """Measure, print the table, and keep it."""
    output = None if arguments.output is None else Path(arguments.output)
    if output is not None:
        refuse_missing_folder(output)
    say = teller(arguments, output)
    options = given(arguments, Sensing)
    asked = Sensing(**options)  # what is wrong with them shows before any work is done
    executor = find(arguments.executor, arguments.jobs)
    evaluate = arguments.evaluate
    if evaluate is not None:
        evaluate = named(evaluate, "function", "nets.py:accuracy")
    program = capture_model(arguments)
    data = grids.batches(Path(arguments.data), program)
    how: dict[str, Any] = {"evaluate": evaluate, "executor": executor, "cache": arguments.cache}
    try:
        found = sensing.sense(program, data=data, **options, **how, progress=Clock())
    except KeyboardInterrupt:
        if arguments.cache is not None:
            told = f"what was measured is kept in {arguments.cache}; the same command goes on"
            print(f"\n{told}", file=sys.stderr)
        raise
    if output is not None:
        found.save(output)
    if arguments.json:
        print_json({**found.to_json(), "options": to_json(asked)})
        return 0
    say(str(found))
    if output is not None and str(output) != STDOUT:
        print(f"\nsaved in {output}")
    return 0


class Clock:
    """Shows how far it is and about how long it takes yet, where a person is looking."""

    def __init__(self) -> None:
        self.shown = sys.stderr.isatty()
        self.begun: tuple[float, int] | None = None  # when, and how much was done already

    def __call__(self, what: str, done: int, total: int) -> None:
        """Say that so much is done."""
        if not self.shown:
            return
        now = time.monotonic()
        self.begun = self.begun or (now, done)
        start, known = self.begun
        rest = left(now - start, done - known, total - done)
        end = "\n" if done == total else ""
        print(f"\r\033[K{what}: {done} of {total}{rest}", end=end, file=sys.stderr, flush=True)


def left(passed: float, done: int, todo: int) -> str:
    """Return about how long the rest takes, as the end of a sentence; nothing as long as nobody
    knows.

    Args:
        passed: The seconds that passed.
        done: How much was done in them.
        todo: How much is left.
    """
    if not done or not todo:
        return ""
    seconds = passed / done * todo
    if seconds < 100:
        return f", about {seconds:.0f} s left"
    minutes = seconds / 60
    if minutes < 100:
        return f", about {minutes:.0f} min left"
    return f", about {minutes / 60:.0f} h left"
