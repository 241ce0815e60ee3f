"""``narrows targets``: what a program can be lowered to, and what of it is here."""

from __future__ import annotations

import argparse
import dataclasses

from narrows.backends import Variant, target_names, target_type
from narrows.cli.commands import print_json


def targets(arguments: argparse.Namespace) -> int:
    """Print the table of targets."""
    variants = [v for name in target_names() for v in target_type(name).variants()]
    if arguments.json:
        print_json([dataclasses.asdict(v) for v in variants])
        return 0
    head = ("target", "usable here", "for", "needs", "checked")
    rows = [(v.name, _answer(v), v.supports, v.needs, v.checked) for v in variants]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        print("  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())
    for variant in variants:
        if variant.missing:
            print(f"{variant.name}: {variant.missing}")
    return 0


def _answer(variant: Variant) -> str:
    if variant.usable:
        return "in part" if variant.missing else "yes"
    return "to lower, not to run" if variant.lowers else "no"
