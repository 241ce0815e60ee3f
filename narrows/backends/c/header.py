"""Writes ``model.h``: what goes in and out, and the one function."""

from __future__ import annotations

from collections.abc import Iterator

from narrows.backends.c.lower import Arena, Drawn, Port
from narrows.files.quoting import c_comment
from narrows.ir.integer.grid import Grid
from narrows.version import VERSION

TEXT = """\
{title}
#ifndef {upper}_MODEL_H
#define {upper}_MODEL_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {{
#endif

#define {upper}_ARENA_BYTES {arena}

{ports}
/* Runs the model once: a pointer per input, then one per output, as above. Returns 0, or 1 where an
   index is out of range. Intermediate results lie in a static arena: one call at a time. Outputs
   must not overlap inputs. */
{signature};

/* Between numbers and codes, for callers that have numbers. The model has no use for these: with
   {upper}_NO_FLOAT defined nothing here is floating-point. */
#ifndef {upper}_NO_FLOAT
{conversions}
#endif

#ifdef __cplusplus
}}
#endif

#endif
"""


def model_h(drawn: Drawn, arena: Arena, prefix: str) -> str:
    """Return the text of ``model.h``."""
    upper = prefix.upper()
    ports = (*drawn.inputs, *drawn.outputs)
    return TEXT.format(
        title=title(drawn), upper=upper, arena=arena.placement.size,
        ports="\n".join("\n".join(_port(p, upper)) + "\n" for p in ports),
        signature=signature(drawn, prefix),
        conversions="\n".join(_conversions(drawn, prefix)),
    )  # fmt: skip


def title(drawn: Drawn) -> str:
    """Return the first line of both files."""
    return f"/* {c_comment(drawn.sketch.program.name)}, made by narrows {VERSION}. */"


def signature(drawn: Drawn, prefix: str) -> str:
    """Return the declaration of the function."""
    takes = [f"const {p.ctype} *{p.name}" for p in drawn.inputs]
    gives = [f"{p.ctype} *{p.name}" for p in drawn.outputs]
    return f"int {prefix}_run({', '.join([*takes, *gives])})"


def _port(port: Port, upper: str) -> Iterator[str]:
    shape = "x".join(map(str, port.stored))
    last = "" if port.order == tuple(range(len(port.shape))) else " (channels last)"
    name = f"{upper}_{port.name.upper()}"
    head = f"/* {port.name}: {port.ctype}, {shape}{last}"
    if port.grid is None:
        yield f"{head}, whole numbers. */"
        yield f"#define {name}_SIZE {port.size}"
        return
    power = f"2^{-port.grid.exponent}"
    if port.powers:
        power += f" * 2^-power, by the index on axis {port.order.index(port.axis)} as it lies here"
    yield f"{head}; a code stands for (code - {port.grid.zero}) * {power}. */"
    yield f"#define {name}_SIZE {port.size}"
    yield f"#define {name}_ZERO {port.grid.zero}"
    yield f"#define {name}_EXPONENT {_signed(-port.grid.exponent)}"
    if port.powers:
        listed = ", ".join(map(str, port.powers))
        yield f"static const int8_t {name}_POWERS[{len(port.powers)}] = {{{listed}}};"


def _signed(value: int) -> str:
    return f"({value})" if value < 0 else str(value)


def _conversions(drawn: Drawn, prefix: str) -> Iterator[str]:
    for port in drawn.inputs:
        if port.grid is not None:
            yield _quantize(port, port.grid, prefix)
    for port in drawn.outputs:
        if port.grid is None:
            continue
        number = f"(float)(code - {port.grid.zero}) * {_power(-port.grid.exponent)}"
        takes = f"{port.ctype} code" + (", int index" if port.powers else "")
        yield f"static inline float {prefix}_dequantize_{port.name}({takes})"
        yield "{"
        if port.powers:
            steps = ", ".join(_power(-p) for p in port.powers)
            yield f"    static const float steps[{len(port.powers)}] = {{{steps}}};"
            yield ""
            number += " * steps[index]"
        yield f"    return {number};"
        yield "}"


def _quantize(port: Port, grid: Grid, prefix: str) -> str:
    up, down = "rest >= 0.5f", "rest < -0.5f"
    if port.rounding == "half_even":
        up = "rest > 0.5f || (rest == 0.5f && (whole & 1))"
        down = "rest < -0.5f || (rest == -0.5f && (whole & 1))"
    return f"""\
static inline {port.ctype} {prefix}_quantize_{port.name}(float value)
{{
    const float scaled = value * {_power(grid.exponent)};
    float rest;
    int whole;

    if (!(scaled > {grid.low - grid.zero}.0f))
        return {grid.low};
    if (!(scaled < {grid.high - grid.zero}.0f))
        return {grid.high};
    whole = (int)scaled;
    rest = scaled - (float)whole;
    if ({up})
        whole++;
    if ({down})
        whole--;
    return ({port.ctype})(whole + {grid.zero});
}}
"""


def _power(exponent: int) -> str:
    """Return a power of two as a C literal, which holds it exactly."""
    return f"{2.0**exponent!r}f"
