"""The files beside the model: a Makefile, a self-test with vectors, a runner, a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from narrows.backends.c.lower import Arena, Drawn
from narrows.backends.c.runner import HEADER, MODEL, RUNNER, declared
from narrows.backends.c.sketch import CTYPES, Constant
from narrows.files.quoting import plain

TEST, VECTORS, MAKEFILE, REPORT = "test.c", "vectors.h", "Makefile", "report.txt"

FILES = (MODEL, HEADER, RUNNER, TEST, VECTORS, MAKEFILE, REPORT)

# Codes of inputs and outputs that the vectors may take, so that a big model has few.
VECTOR_CODES = 1 << 16
MOST_VECTORS = 8

MAKE = """\
# make test: the self-test.  make sanitize: it under the sanitizers.  make size: what it takes.
# For another machine: make model.o CC=arm-none-eabi-gcc CFLAGS='-O2 -mcpu=cortex-m4 -mthumb'

CC ?= cc
CFLAGS ?= -O3 -march=native
STRICT = -std=c99 -pedantic -Wall -Wextra -Werror
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=all

test:
\t$(CC) $(STRICT) $(CFLAGS) -o selftest model.c test.c
\t./selftest; status=$$?; rm -f selftest; exit $$status

sanitize:
\t$(CC) $(STRICT) -O1 -g $(SANITIZE) -o selftest model.c test.c
\t./selftest; status=$$?; rm -f selftest; exit $$status

size:
\t$(CC) $(STRICT) $(CFLAGS) -c -o model.o model.c
\tsize model.o; rm -f model.o

model.o: model.c model.h
\t$(CC) $(STRICT) $(CFLAGS) -c -o $@ model.c

.PHONY: test sanitize size
"""


def vector_count(drawn: Drawn) -> int:
    """Return how many vectors the self-test holds where nobody says so."""
    size = sum(p.size for p in (*drawn.inputs, *drawn.outputs))
    return max(1, min(MOST_VECTORS, VECTOR_CODES // max(size, 1)))


def vectors(drawn: Drawn, given: Sequence[Sequence[np.ndarray]]) -> str:
    """Return ``vectors.h``: per vector the codes of all inputs, then those of all outputs."""
    ports = [(f"in{i}", p) for i, p in enumerate(drawn.inputs)]
    ports += [(f"out{i}", p) for i, p in enumerate(drawn.outputs)]
    lines = [
        "/* Inputs, and what the interpreter of narrows gives for them. */",
        f"#define VECTORS {len(given)}", "",
    ]  # fmt: skip
    for i, (name, port) in enumerate(ports):
        lines.append(f"static const {port.ctype} vector_{name}[VECTORS][{port.size}] = {{")
        for vector in given:
            lines += ["    {", *_rows(vector[i].reshape(-1).tolist()), "    },"]
        lines += ["};", ""]
    return "\n".join(lines)


def _rows(values: list[int]) -> Iterator[str]:
    row = "       "
    for value in values:
        text = f" {value},"
        if len(row) + len(text) > 100:
            yield row
            row = "       "
        row += text
    yield row


def test(drawn: Drawn, prefix: str) -> str:
    """Return the self-test."""
    ins = [f"vector_in{i}[i]" for i in range(len(drawn.inputs))]
    outs = [f"out{i}" for i in range(len(drawn.outputs))]
    checks = " ||\n            ".join(
        f"memcmp(out{i}, vector_out{i}[i], sizeof out{i}) != 0" for i in range(len(outs))
    )
    return "\n".join([
        "/* Compares the model with the interpreter of narrows: every bit has to agree. */",
        f'#include "{HEADER}"', f'#include "{VECTORS}"', "",
        "#include <stdio.h>", "#include <string.h>", "", *declared(drawn.outputs, "out"), "",
        "int main(void)", "{", "    int i, wrong = 0;", "",
        "    for (i = 0; i < VECTORS; i++) {",
        f"        if ({prefix}_run({', '.join([*ins, *outs])}) != 0 ||",
        f"            {checks}) {{",
        '            printf("vector %d differs\\n", i);', "            wrong++;", "        }",
        "    }",
        '    printf("%d of %d vectors agree, arena %d bytes\\n", VECTORS - wrong, VECTORS,',
        f"           {prefix.upper()}_ARENA_BYTES);",
        "    return wrong != 0;", "}", "",
    ])  # fmt: skip


# ------------------------------------------------------------------ the report


def rom(constant: Constant, wide: bool) -> int:
    """Return the bytes of an array."""
    size = 8 if constant.ctype == "number" and wide else np.dtype(CTYPES[constant.ctype]).itemsize
    if constant.ctype == "number" and not wide:
        size = 4
    return (len(constant.values) + constant.pad) * size


def rom_total(drawn: Drawn) -> int:
    """Return the bytes of all constants."""
    wide = bool(drawn.sketch.wide)
    return sum(rom(c, wide) for c in drawn.sketch.constants.values())


def macs_total(drawn: Drawn) -> int:
    """Return how many products are added up."""
    return sum(step.macs for step in drawn.sketch.steps)


def memory_text(arena: Arena) -> str:
    """Return what the arena takes, as a sentence."""
    placed = arena.placement
    over = placed.size / placed.bound - 1 if placed.bound else 0.0
    shared = f", {arena.shared} results in place" if arena.shared else ""
    return (
        f"arena {placed.size:,} bytes; {placed.bound:,} are live at once, the lower bound "
        f"(+{over:.1%}){shared}"
    )


def report(drawn: Drawn, arena: Arena) -> str:
    """Return what the model takes: constants, memory and products, layer by layer."""
    sketch = drawn.sketch
    lines = [
        plain(sketch.program.name),
        f"  constants {rom_total(drawn):,} bytes",
        f"  {memory_text(arena)}",
        f"  {macs_total(drawn):,} multiply-adds",
        f"  {sketch.shift_layers} of {sketch.layers} layers can shift and add, not multiply",
        f"  sums in {'64' if sketch.wide else '32'} bits"
        + (f", because of {sketch.wide}" if sketch.wide else ""),
        "", "live at the peak:",
    ]  # fmt: skip
    lines += [f"  {b.size:>10,}  {plain(b.name)}" for b in arena.placement.peak]
    lines += ["", f"{'step':32} {'result':>10} {'scratch':>10} {'at':>10} {'multiply-adds':>15}"]
    for step in sketch.steps:
        scratch = 0 if step.scratch is None else step.scratch.size
        place = arena.offsets.get(step.writes)
        at = step.writes.kind if place is None else str(place)
        lines.append(
            f"{step.node.name[:32]:32} {step.writes.size:>10,} {scratch:>10,} {at:>10} "
            f"{step.macs:>15,}"
        )
    return "\n".join(lines) + "\n"
