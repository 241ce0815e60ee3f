"""Writes ``runner.c``, which feeds a C model from a pipe.

It goes with an artifact, for people. A session compiles one of its own, so that what it runs is the
model and nothing else of the folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

MODEL, HEADER, RUNNER = "model.c", "model.h", "runner.c"


class Sized(Protocol):
    """A tensor that goes in or comes out."""

    @property
    def ctype(self) -> str:
        """The type of an element in C."""
        ...

    @property
    def size(self) -> int:
        """How many elements it has."""
        ...


class Operand(NamedTuple):
    """What a manifest says of a tensor."""

    ctype: str
    size: int


def declared(ports: Sequence[Sized], letter: str) -> list[str]:
    """Return the declarations of memory for inputs or outputs, and their names."""
    return [f"static {p.ctype} {letter}{i}[{p.size}];" for i, p in enumerate(ports)]


def runner(inputs: Sequence[Sized], outputs: Sequence[Sized], prefix: str) -> str:
    """Return a program that runs the model on what it reads, until there is nothing more."""
    reads = " && ".join(f"fread(in{i}, sizeof in{i}, 1, stdin) == 1" for i in range(len(inputs)))
    names = [*(f"in{i}" for i in range(len(inputs))), *(f"out{i}" for i in range(len(outputs)))]
    lines = [
        "/* Reads inputs from stdin, writes outputs to stdout, over and over. */",
        f'#include "{HEADER}"', "", "#include <stdio.h>", "",
        *declared(inputs, "in"), *declared(outputs, "out"), "",
        "int main(void)", "{",
        f"    while ({reads}) {{", f"        if ({prefix}_run({', '.join(names)}) != 0)",
        "            return 1;",
    ]  # fmt: skip
    for i in range(len(outputs)):
        lines += [f"        if (fwrite(out{i}, sizeof out{i}, 1, stdout) != 1)"]
        lines += ["            return 2;"]
    return "\n".join([*lines, "    }", "    return 0;", "}"]) + "\n"
