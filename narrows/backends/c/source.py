"""Writes ``model.c`` and ``model.h``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources

import narrows
from narrows.backends.c.lower import Arena, Drawn, Port
from narrows.backends.c.sketch import Constant, Step, grid_text
from narrows.ir.integer.grid import Grid
from narrows.ir.program import Meta, op_name

# Kernel -> what it needs besides, in the order in which it is written.
NEEDS: dict[str, tuple[str, ...]] = {
    "conv": ("rounding", "scaled", "settle", "sums", "window", "conv", "convolve", "conv_plain"),
    "conv_transpose": (
        "rounding", "scaled", "settle", "sums", "window", "conv", "turned", "convolve",
        "conv_turned",
    ),
    "dense": ("rounding", "scaled", "settle", "sums", "dense"),
    "depthwise": ("rounding", "scaled", "settle", "window", "depthwise"),
    "max_pool": ("window", "max_pool"),
    "average_pool": ("settled", "divided", "average", "window", "average_pool"),
    "mean": ("settled", "divided", "average", "mean"),
    "extremum": ("extremum",),
    "softmax": ("settled", "divided", "softmax"),
    "matmul": ("rounding", "scaled", "settled", "matmul"),
    "add": ("rounding", "scaled", "settled", "add"),
    "mul": ("rounding", "scaled", "settled", "mul"),
    "rescale": ("rounding", "scaled", "settled", "rescale"),
    "lookup": ("lookup",),
    "embedding": ("embedding",),
    "copy": ("copy",),
}  # fmt: skip

ORDER = (
    "rounding", "scaled", "settled", "settle", "divided", "average", "window", "sums", "dense", "conv",
    "turned", "convolve", "conv_plain", "conv_turned", "depthwise", "max_pool", "average_pool",
    "mean", "extremum", "softmax", "matmul", "add", "mul", "rescale", "lookup", "embedding", "copy",
)  # fmt: skip

PREAMBLE = """\
#include "model.h"

#include <stddef.h>
#include <string.h>

/* How many codes a vector of the processor holds; 1 where it has none. */
#ifndef NARROWS_LANES
#if defined(__AVX2__)
#define NARROWS_LANES 32
#elif defined(__SSE2__) || defined(__ARM_NEON)
#define NARROWS_LANES 16
#else
#define NARROWS_LANES 1
#endif
#endif
#if NARROWS_LANES < 1 || NARROWS_LANES > 32 || (NARROWS_LANES & (NARROWS_LANES - 1))
#error "NARROWS_LANES is a power of two up to 32"
#endif

/* How many sums are held on the stack at a time, for up to four rows. */
#define NARROWS_CHUNK 64

/* Results may lie over operands, element by element; vectors are safe all the same. */
#if defined(__clang__)
#define NARROWS_SAME_PLACE _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define NARROWS_SAME_PLACE _Pragma("GCC ivdep")
#else
#define NARROWS_SAME_PLACE
#endif

/* A shift of a negative number to the right has to keep its sign, as it does everywhere. */
typedef char shifts_keep_the_sign[(-1 >> 1) == -1 ? 1 : -1];
"""


def kernel(name: str) -> str:
    """Return the C source of a kernel."""
    path = resources.files("narrows.backends.c") / "kernels" / f"{name}.c"
    return path.read_text(encoding="utf-8")


def model_c(drawn: Drawn, arena: Arena, prefix: str) -> str:
    """Return the text of ``model.c``."""
    sketch = drawn.sketch
    size = max(arena.placement.size, 1)
    lines = [_title(drawn), PREAMBLE]
    number, why = ("int64_t", f": {sketch.wide} needs them") if sketch.wide else ("int32_t", "")
    lines.append(f"/* The type of sums{why}. */\ntypedef {number} number;\n")
    needed = {part for name in sketch.kernels for part in NEEDS[name]}
    final = "scaled" if sketch.signed_shifts else "shifted"
    rounding = "half_up" if sketch.half_up else "half_even"
    files = {"rounding": rounding, "divided": f"divided_{rounding}"}
    for part in ORDER:
        if part in needed and (part != "scaled" or _used("scaled", needed, final)):
            lines.append(kernel(files.get(part, part)).replace("FINAL", final))
    lines += ["/* Constants. */\n", *map(_array, sketch.constants.values())]
    lines += ["/* Layers. */\n", *map(_wrapped, sketch.records), ""]
    lines.append(f"static union {{\n    uint8_t bytes[{size}];\n    int32_t aligned;\n}} memory;\n")
    lines += _function(drawn, arena, prefix)
    return "\n".join(lines) + "\n"


def _used(name: str, needed: set[str], final: str) -> bool:
    return final == name or bool(needed & {"matmul", "add", "mul", "rescale"})


def _title(drawn: Drawn) -> str:
    return f"/* {drawn.sketch.program.name}, made by narrows {narrows.__version__}. */"


def _array(constant: Constant) -> str:
    total = len(constant.values) + constant.pad
    lines = [f"/* {constant.remark} */"] if constant.remark else []
    size = f"{len(constant.values)} + {constant.pad}" if constant.pad else str(total)
    lines.append(f"static const {constant.ctype} {constant.name}[{size}] = {{")
    row = "   "
    for value in constant.values.tolist():
        text = f" {_literal(value)},"
        if len(row) + len(text) > 100:
            lines.append(row)
            row = "   "
        row += text
    return "\n".join([*lines, row, "};\n"])


def _literal(value: int) -> str:
    return "(-2147483647 - 1)" if value == -(2**31) else str(value)


def _wrapped(text: str) -> str:
    """Return a record with at most 100 columns a line."""
    lines, row = [], ""
    for word in text.split(" "):
        if len(row) + len(word) > 98:
            lines.append(row)
            row = "   "
        row += f" {word}" if row else word
    return "\n".join([*lines, row])


def signature(drawn: Drawn, prefix: str) -> str:
    """Return the declaration of the function."""
    takes = [f"const {_ctype(p)} *{p.name}" for p in drawn.inputs]
    gives = [f"{_ctype(p)} *{p.name}" for p in drawn.outputs]
    return f"int {prefix}_run({', '.join([*takes, *gives])})"


def _ctype(port: Port) -> str:
    return "int64_t" if port.dtype == "int64" else "uint8_t"


def _function(drawn: Drawn, arena: Arena, prefix: str) -> Iterator[str]:
    at = arena.pointer("arena")
    yield signature(drawn, prefix) + "\n{"
    if arena.offsets:
        yield "    uint8_t *const arena = memory.bytes;\n"
    last = None
    for step in drawn.sketch.steps:
        if step.node is not last:
            yield from _comment(step, drawn)
        last = step.node
        yield from (f"    {line}" for line in step.code(at))
    yield "    return 0;\n}"


def _comment(step: Step, drawn: Drawn) -> Iterator[str]:
    node, meta, shapes = step.node, Meta(step.node), drawn.sketch.shapes
    def shown(n: object) -> str:
        return "x".join(map(str, shapes.get(n, ())))  # type: ignore[call-overload]

    operands = ", ".join(
        f"{n.name} {shown(n)}" for n in node.all_input_nodes
        if n not in drawn.sketch.fixed
    )  # fmt: skip
    where = f"  {meta.source}" if meta.source else ""
    what = op_name(node).removesuffix(".default")
    text = f"{node.name}: {what} of {operands} -> {shown(node)}{grid_text(node)}{where}"
    yield f"\n    /* {text.replace('*/', '* /')} */"


# ------------------------------------------------------------------ the header


def model_h(drawn: Drawn, arena: Arena, prefix: str) -> str:
    """Return the text of ``model.h``."""
    guard = f"{prefix.upper()}_MODEL_H"
    upper = prefix.upper()
    lines = [_title(drawn), f"#ifndef {guard}", f"#define {guard}", "", "#include <stdint.h>", ""]
    lines += ['#ifdef __cplusplus\nextern "C" {\n#endif', ""]
    lines.append(f"#define {upper}_ARENA_BYTES {arena.placement.size}")
    for port in (*drawn.inputs, *drawn.outputs):
        lines += ["", *_port(port, upper)]
    lines += ["", "/* Runs the model once: a pointer per input, then one per output, as above. Returns 0, or 1 where"]
    lines += ["   an index is out of range. It holds its intermediate results in a static arena: one call at a"]
    lines += [f"   time. Outputs must not overlap inputs. */\n{signature(drawn, prefix)};", ""]
    lines += _conversions(drawn, prefix)
    lines += ["#ifdef __cplusplus\n}\n#endif", "", "#endif"]
    return "\n".join(lines) + "\n"


def _port(port: Port, upper: str) -> Sequence[str]:
    shape = "x".join(map(str, port.stored))
    last = " (channels last)" if port.order != tuple(range(len(port.shape))) else ""
    title = f"{upper}_{port.name.upper()}"
    head = f"/* {port.name}: {_ctype(port)}, {shape}{last}"
    if port.grid is None:
        return [f"{head}, whole numbers. */", f"#define {title}_ELEMENTS {port.size}"]
    grid = port.grid
    return [
        f"{head}; a code stands for (code - {grid.zero}) * 2^{-grid.exponent}. */",
        f"#define {title}_BYTES {port.size}",
        f"#define {title}_ZERO {grid.zero}",
        f"#define {title}_EXPONENT {-grid.exponent}",
    ]


def _conversions(drawn: Drawn, prefix: str) -> Iterator[str]:
    """Yield inline functions between numbers and codes; the model itself has no use for them."""
    ports = [p for p in (*drawn.inputs, *drawn.outputs) if p.grid is not None]
    if not ports:
        return
    yield f"/* Between numbers and codes. The model has no use for these: with {prefix.upper()}_NO_FLOAT defined"
    yield "   nothing here is floating-point. */"
    yield f"#ifndef {prefix.upper()}_NO_FLOAT"
    for port in drawn.inputs:
        if port.grid is not None:
            yield _quantize(port, port.grid, prefix)
    for port in drawn.outputs:
        if port.grid is not None:
            yield (
                f"static inline float {prefix}_dequantize_{port.name}(uint8_t code)\n{{\n"
                f"    return (float)(code - {port.grid.zero}) * {_power(-port.grid.exponent)};\n}}\n"
            )
    yield "#endif\n"


def _quantize(port: Port, grid: Grid, prefix: str) -> str:
    ties = "half up" if port.rounding == "half_up" else "to even"
    up = "rest >= 0.5f" if ties == "half up" else "rest > 0.5f || (rest == 0.5f && (whole & 1))"
    down = "rest < -0.5f" if ties == "half up" else "rest < -0.5f || (rest == -0.5f && (whole & 1))"
    low, high = grid.low - grid.zero, grid.high - grid.zero
    return f"""\
static inline uint8_t {prefix}_quantize_{port.name}(float value)
{{
    const float scaled = value * {_power(grid.exponent)};
    float rest;
    int whole;

    if (!(scaled > {low}.0f))
        return {grid.low};
    if (!(scaled < {high}.0f))
        return {grid.high};
    whole = (int)scaled;
    rest = scaled - (float)whole;
    if ({up})
        whole++;
    if ({down})
        whole--;
    return (uint8_t)(whole + {grid.zero});
}}
"""


def _power(exponent: int) -> str:
    return f"0x1p{exponent}f"
