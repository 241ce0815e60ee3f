"""Writes ``model.c``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib import resources

import numpy as np

from narrows.backends.c.header import signature, title
from narrows.backends.c.lower import Arena, Drawn
from narrows.backends.c.sketch import Constant, Sketch, Step, grid_text
from narrows.backends.c.types import typed
from narrows.files.quoting import c_comment
from narrows.ir.meta import Meta, op_name

# Kernel -> what it needs besides, in the order in which it is written.
NEEDS: dict[str, tuple[str, ...]] = {
    "conv": (
        "rounding", "scaled", "settle", "moved", "sums", "window", "conv", "gather", "convolve",
        "conv_plain",
    ),
    "conv_transpose": (
        "rounding", "scaled", "settle", "moved", "sums", "window", "conv", "turned", "convolve",
        "conv_turned",
    ),
    "dense": ("rounding", "scaled", "settle", "moved", "sums", "dense"),
    "depthwise": ("rounding", "scaled", "settle", "moved", "window", "depthwise"),
    "max_pool": ("window", "max_pool"),
    "average_pool": ("settled", "divided", "average", "window", "average_pool"),
    "mean": ("settled", "divided", "average", "mean"),
    "resample": ("rounding", "scaled", "settled", "divided", "average", "resample"),
    "quotient": ("settled", "divided", "average", "quotient"),
    "vector_norm": ("settled", "divided", "average", "root", "vector_norm"),
    "extremum": ("extremum",),
    "softmax": ("settled", "divided", "softmax"),
    "normalise": ("settled", "binary", "whole", "spread", "normalise"),
    "matmul": ("rounding", "scaled", "settled", "matmul"),
    "add": ("rounding", "scaled", "settled", "add"),
    "mul": ("rounding", "scaled", "settled", "mul"),
    "rescale": ("rounding", "scaled", "settled", "rescale"),
    "prelu": ("rounding", "scaled", "settled", "prelu"),
    "compare": ("compare",),
    "compare_number": ("compare_number",),
    "logic": ("logic",),
    "choose": ("choose",),
    "larger": ("larger",),
    "lookup": ("lookup",),
    "embedding": ("embedding",),
    "copy": ("copy",),
}  # fmt: skip

ORDER = (
    "rounding", "scaled", "settled", "settle", "moved", "divided", "average", "window", "sums",
    "dense",
    "conv", "gather", "turned", "convolve", "conv_plain", "conv_turned", "depthwise", "max_pool",
    "average_pool", "mean", "root", "vector_norm", "resample", "extremum", "softmax",
    "binary", "whole", "spread", "normalise", "matmul", "add", "mul", "quotient",
    "rescale", "prelu", "lookup", "compare", "compare_number", "logic", "choose", "larger",
    "embedding", "copy",
)  # fmt: skip

# What is the same for codes of all types.
UNTYPED = {"window", "binary", "whole", "spread"}

# What only a build by shifts and additions is made of.
SHIFT_ADD = re.compile(r"#ifdef NARROWS_SHIFT_ADD\n.*?(?:#else\n(.*?))?#endif\n", re.S)

MEMORY = """\
static union {{
    uint8_t bytes[{size}];
{words}    int32_t aligned;
}} memory;
"""


def kernel(name: str) -> str:
    """Return the C source of a kernel."""
    path = resources.files("narrows.backends.c") / "kernels" / f"{name}.c"
    return path.read_text(encoding="utf-8")


def model_c(drawn: Drawn, arena: Arena, prefix: str) -> str:
    """Return the text of ``model.c``."""
    sketch = drawn.sketch
    lines = [title(drawn), kernel("preamble")]
    number, why = ("int64_t", f": {sketch.wide} needs them") if sketch.wide else ("int32_t", "")
    lines.append(f"/* The type of sums{c_comment(why)}. */\ntypedef {number} number;\n")
    shifts = bool(sketch.shift_layers)
    lines.append(kernel("terms" if shifts else "no_terms"))
    needed = {part for name in sketch.kernels for part in NEEDS[name]}
    final = "scaled" if sketch.signed_shifts else "shifted"
    rounding = "half_up" if sketch.half_up else "half_even"
    files = {"rounding": rounding, **{p: f"{p}_{rounding}" for p in ("divided", "whole")}}
    needed |= {part for name, _ in sketch.typed for part in NEEDS[name]} & UNTYPED

    def text(part: str) -> str:
        made = kernel(files.get(part, part)).replace("FINAL", final)
        return made if shifts else SHIFT_ADD.sub(r"\1", made)

    for part in ORDER:
        if part in needed and (part != "scaled" or _used("scaled", needed, final)):
            lines.append(text(part))
    lines += _typed(sketch, text)
    lines += ["/* Constants. */\n", *map(_array, sketch.constants.values())]
    lines += ["/* Layers. */\n", *map(_wrapped, sketch.records), ""]
    if arena.offsets:
        size = arena.placement.size
        words = "" if not sketch.typed else f"    int16_t words[{-(-size // 2)}];\n"
        lines.append(MEMORY.format(size=size, words=words))
    lines += _function(drawn, arena, prefix)
    return "\n".join(lines) + "\n"


def _typed(sketch: Sketch, text: Callable[[str], str]) -> list[str]:
    """Return the kernels for codes of 16 bits, each with what it needs besides."""
    made: dict[str, None] = {}
    for name, types in sketch.typed:
        parts = [p for p in ORDER if p in NEEDS[name] and p not in UNTYPED]
        texts = {p: text(p) for p in parts}
        calls = any("scaled(" in t for p, t in texts.items() if p != "scaled")
        kept = [t for p, t in texts.items() if p != "scaled" or calls]
        made |= dict.fromkeys(typed(name, kept, types))
    return list(made)


def _used(name: str, needed: set[str], final: str) -> bool:
    return final == name or bool(needed & {"matmul", "add", "mul", "rescale", "resample", "prelu"})


def _array(constant: Constant) -> str:
    lines = [f"/* {c_comment(constant.remark)} */"] if constant.remark else []
    codes = _values(constant, constant.values)
    if constant.powers is None:
        return "\n".join([*lines, *codes, ""])
    powers = _values(constant, constant.powers.reshape(-1))
    return "\n".join([*lines, "#ifdef NARROWS_SHIFT_ADD", *powers, "#else", *codes, "#endif\n"])


def _values(constant: Constant, values: np.ndarray) -> Iterator[str]:
    size = f"{len(values)} + {constant.pad}" if constant.pad else str(len(values))
    yield f"static const {constant.ctype} {constant.name}[{size}] = {{"
    row = "   "
    for value in values.tolist():
        text = f" {_literal(value)},"
        if len(row) + len(text) > 100:
            yield row
            row = "   "
        row += text
    yield row
    yield "};"


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


def _function(drawn: Drawn, arena: Arena, prefix: str) -> Iterator[str]:
    at = arena.pointer("arena", "words")
    yield signature(drawn, prefix) + "\n{"
    units = {buffer.unit for buffer in arena.offsets}
    if 1 in units:
        yield "    uint8_t *const arena = memory.bytes;" + ("" if 2 in units else "\n")
    if 2 in units:
        yield "    int16_t *const words = memory.words;\n"
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
    yield f"\n    /* {c_comment(text)} */"
