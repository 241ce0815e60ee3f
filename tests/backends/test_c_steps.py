"""What becomes of integer programs in C, step by step: what numbers cannot tell.

Needless copies, results that could lie over an operand, sums of 64 bits where 32 do: all of them
are exact, and cost time or memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import fx

import narrows
from narrows.backends.c import files, header
from narrows.backends.c.lower import _obstacle, draw, plan
from narrows.backends.c.sketch import Sketch
from narrows.backends.compare import draw_inputs
from narrows.backends.leaves import Leaves
from narrows.ir.program import Program
from tests.backends.several_forms import PROGRAMS, images, integers
from tests.backends.test_onnx_forms import integer_layers
from tests.builder import Builder, aten


def told(program: Program, batch: int) -> str:
    """Return the layers' fields, the steps with what they call, and what memory they take."""
    drawn = draw(program, draw_inputs(program, batch, None), Leaves.of(program).computed)
    sketch, arena = drawn.sketch, plan(drawn.sketch)
    names: dict[str, str] = {}

    def place(view: object) -> str:
        buffer = view.buffer  # type: ignore[attr-defined]
        at = f"+{view.offset}" if view.offset else ""  # type: ignore[attr-defined]
        return f"<{buffer.symbol or names.setdefault(str(id(buffer)), buffer.name)}{at}>"

    lines = [re.sub(r"^static const struct ", "", r) for r in sketch.records]
    for step in sketch.steps:
        words = [f"{step.node.name}: {step.writes.kind} of {step.writes.size}"]
        words += [f"over {', '.join(b.name for b in step.over)}"] if step.over else []
        words += [f"{step.macs} products"] if step.macs else []
        words += [f"{step.scratch.size} spare"] if step.scratch else []
        lines.append(", ".join(words))
        lines += [f"  {line}" for line in step.code(place)]
    for constant in sketch.constants.values():
        powers = "" if constant.powers is None else f", {len(constant.powers)} powers"
        lines.append(
            f"{constant.ctype} {constant.name}[{len(constant.values)}], {constant.pad} more{powers}"
        )
    lines += [f"port {p.name} {p.ctype} {list(p.stored)} {p.to_json()}"
              for p in (*drawn.inputs, *drawn.outputs)]  # fmt: skip
    placed = arena.placement
    lines += [
        f"kernels {' '.join(sorted(sketch.kernels))}",
        f"typed {' '.join(sorted(k + t.suffix for k, t in sketch.typed))}",
        f"wide {sketch.wide or 'never'}, left {sketch.signed_shifts}, "
        f"layers {sketch.shift_layers} of {sketch.layers}",
        f"arena {placed.size} of {placed.bound}, {arena.shared} shared, "
        f"peak {', '.join(b.name for b in placed.peak)}",
        f"constants {files.rom_total(drawn)}, products {files.macs_total(drawn)}, "
        f"vectors {files.vector_count(drawn)}",
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", [n for n in PROGRAMS if n not in ("functions", "choices")])
def test_steps_of_programs(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"c_steps/{name}", told(integers(name), 2))


@pytest.mark.parametrize(("bits", "rounding"), [(8, "half_even"), (12, "half_up")])
def test_steps_of_layers(bits: int, rounding: str, golden: Callable[[str, str], None]) -> None:
    golden(f"c_steps/layers_{bits}", told(integer_layers(bits, rounding), 1))


def vectors() -> Program:
    """Products of vectors and matrices, tensors in orders of their own, what is padded and cut."""
    b = images((2, 8, 4, 6), (2, 3, 4, 5))
    image, other = b.inputs
    generator = torch.Generator().manual_seed(3)

    def weight(name: str, *shape: int) -> fx.Node:
        return b.weight(name, torch.randn(shape, generator=generator))

    conv = b.call(aten.conv2d.default, image, weight("a", 8, 8, 1, 1), weight("b", 8))
    deep = b.call(
        aten.conv2d.default, conv, weight("c", 8, 1, 3, 3), None, [2, 1], [1, 1], [1, 1], 8
    )
    groups = b.call(aten.conv2d.default, conv, weight("d", 4, 4, 1, 1), None, [1], [0], [1], 2)
    first = b.call(aten.relu.default, b.call(aten.select.int, other, 1, 0))
    line = b.call(aten.mean.dim, first, [0])
    turned = b.call(aten.permute.default, conv, [0, 2, 3, 1])
    last = b.call(aten.permute.default, other, [0, 3, 2, 1])
    return b.program(
        deep, groups, turned,
        b.call(aten.linear.default, turned, weight("e", 3, 8)),
        b.call(aten.linear.default, last, weight("f", 2, 3)),
        b.call(aten.matmul.default, first, b.call(aten.select.int, line, 0, 1)),
        b.call(aten.matmul.default, b.call(aten.select.int, line, 1, 0), first),
        b.call(aten.add.Tensor, conv, b.call(aten.relu.default, conv)),
        b.call(aten.max_pool2d.default, b.call(aten.neg.default, conv), [2, 2]),
        b.call(aten.amax.default, other, [1, 3]), b.call(aten.sum.dim_IntList, other, [1, 3]),
        b.call(aten.mul.Tensor, b.call(aten.flip.default, other, [3]), 2.0**12),
    )  # fmt: skip


def test_steps_of_tensors_that_lie_otherwise(golden: Callable[[str, str], None]) -> None:
    program = vectors()
    made = narrows.quantize(program, [program.examples], method="minmax").program
    golden("c_steps/vectors", told(made, 2))
    drawn = draw(made, draw_inputs(made, 2, None), Leaves.of(made).computed)
    arena = plan(drawn.sketch)
    text = files.report(drawn, arena) + header.model_h(drawn, arena, "net_")
    golden("c_steps/report", text.replace(narrows.__version__, "VERSION"))


# ------------------------------------------------------------------ what cannot be written


def test_why_an_operator_cannot_be_written() -> None:
    """A move of floats is told of where they come in, and not again behind that."""
    b = Builder((2, 6), (2, 6))
    x, other = b.inputs
    picked = b.call(aten.index_select.default, x, 1, b.call(aten.argmax.default, other, 1))
    again = b.call(aten.flip.default, picked, [1])
    summed = b.call(aten.sin.default, again)
    sketch = Sketch(b.program(summed), False)
    nodes = (picked, again, summed)
    assert [_obstacle(sketch, n, set()) for n in nodes] == ["floating-point", "", "floating-point"]
    assert [_obstacle(sketch, n, {*nodes, *picked.all_input_nodes}) for n in nodes[:2]] == [
        None
    ] * 2
