"""What a table with blocks says of works and programs, on grids whose times are products.

A grid of times in proportion to its sizes is that everywhere, so that every time has a formula.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.backends.measured.grid import Grid
from narrows.backends.measured.layout import Layout
from narrows.backends.onnx import calibrate, profile
from narrows.backends.onnx.staircase import StairTable
from narrows.ir.account import OpCost
from narrows.ir.costs import Joined
from narrows.ir.work import Work

WINDOWED = ("positions", "inputs", "outputs")
DEEP = ("positions", "outputs")
ROWS = ("rows", "inputs", "outputs")
ALL = ("elements",)
# Microseconds per product of the sizes; primes, so that no two sums of few are alike.
RATES: dict[str, tuple[tuple[str, ...], float]] = {
    "blocked conv 3x3/1": (WINDOWED, 2), "plain conv 3x3/1": (WINDOWED, 3),
    "direct conv 3x3/1": (WINDOWED, 5), "blocked conv 1x1/1": (WINDOWED, 7),
    "plain grouped 3x3/1": (WINDOWED, 11), "blocked depthwise 3x3/1": (DEEP, 13),
    "plain depthwise 3x3/1": (DEEP, 17), "linear": (ROWS, 19), "matmul": (ROWS, 23),
    "reorder in": (ALL, 29), "reorder out": (ALL, 31), "copy": (ALL, 37), "gather": (ALL, 41),
    "slice": (ALL, 43), "pointwise": (ALL, 47), "blocked pointwise": (ALL, 53),
    "blocked pointwise add": (ALL, 59), "concat": (ALL, 61), "blocked concat": (ALL, 67),
    "reduce": (ALL, 71), "blocked reduce": (ALL, 73), "pool 2x2/2": (ALL, 79),
    "blocked pool 2x2/2": (ALL, 83), "scale": (ALL, 89), "blocked scale": (ALL, 97),
    "fused relu": (ALL, 101), "plain fused relu": (ALL, 103), "fused add": (ALL, 107),
    "plain fused add": (ALL, 109), "softmax": (ALL, 113),
}  # fmt: skip
LAYOUT = Layout(16, 4, 2, fused=("relu",), blocked=("relu", "add", "sigmoid"))
LEAST = 1e-9  # seconds of any call


def rising(names: tuple[str, ...], rate: float) -> Grid:
    ends = np.array([1.0, 2.0**20])
    us = np.full([2] * len(names), rate)
    for axis in range(len(names)):
        us = us * ends.reshape([-1 if a == axis else 1 for a in range(len(names))])
    return Grid(tuple((name, tuple(ends)) for name in names), us)


def table(layout: Layout = LAYOUT, **changes: Any) -> StairTable:
    grids = {name: rising(*of) for name, of in RATES.items()}
    return StairTable("made up", "1", "cpu", layout, LEAST, grids, **changes)


COSTS, PLAIN = table(), table(Layout(fused=("relu",)))


def conv(inputs: int, outputs: int, groups: int = 1, side: int = 4, **how: Any) -> Work:
    kind = "conv" if groups == 1 else "depthwise" if groups == inputs else "grouped"
    space: Any = (side, side + 1)
    return Work(
        kind, "conv2d", inputs=inputs, outputs=outputs, groups=groups, kernel=(3, 3),
        stride=(1, 1), space=space, source=space, **how,
    )  # fmt: skip


def wide(kind: str, width: int, op: str = "", **how: Any) -> Work:
    return Work(kind, op, inputs=width, outputs=width, **{"space": (4, 5), **how})


# ------------------------------------------------------------------ one work


@pytest.mark.parametrize(
    ("work", "form", "blocked"),
    [
        (conv(16, 32), "blocked", True),
        (conv(20, 17), "blocked", True),
        (conv(18, 32), "plain", False),
        (conv(15, 32), "direct", False),
        (conv(20, 20, 20), "blocked", True),
        (conv(18, 18, 18), "plain", False),
        (conv(16, 32, 16), "plain", False),
        (conv(32, 64, 2), "blocked", True),
        (conv(40, 64, 2), "plain", False),
        (conv(32, 40, 2), "plain", False),
        (wide("pool", 20), "blocked", True),
        (wide("pool", 18), "plain", False),
        (wide("reduce", 20), "plain", True),
        (wide("reduce", 18), "plain", False),
        (wide("concat", 32), "plain", True),
        (wide("concat", 20), "plain", False),
        (wide("scale", 18), "plain", True),
        (wide("pointwise", 18, "relu"), "plain", True),
        (wide("pointwise", 18, "sigmoid"), "plain", True),
        (wide("pointwise", 18, "gelu"), "plain", False),
        (dataclasses.replace(conv(16, 32), space=(20,)), "plain", False),
        (dataclasses.replace(wide("pool", 16), space=(2, 3, 4)), "plain", False),
    ],
)
def test_which_works_run_on_blocks(work: Work, form: str, blocked: bool) -> None:
    assert (COSTS.form(work), COSTS.runs_blocked(work)) == (form, blocked)
    assert COSTS.fits(work) == (form != "plain")
    assert (PLAIN.form(work), PLAIN.runs_blocked(work)) == ("plain", True)
    assert PLAIN.unblocked(work) == work
    flat = dataclasses.replace(work, space=(work.positions, 1, 1)) if blocked else work
    assert COSTS.unblocked(work) == flat


def us(work: Work, costs: StairTable = COSTS, **how: Any) -> float:
    return costs.seconds(work, **how) * 1e6


@pytest.mark.parametrize(
    ("work", "alone", "around"),
    [
        # Per work what it takes by itself, and what the changes of layout around it take.
        (conv(16, 32), 2 * 20 * 16 * 32, 0),
        (conv(20, 17), 2 * 20 * 32 * 32, 0),
        (conv(3, 20), 5 * 20 * 3 * 32, 31 * 20 * 3),
        (conv(18, 20), 3 * 20 * 18 * 20, 31 * 20 * 18 + 29 * 20 * 20),
        (conv(20, 20, 20), 13 * 20 * 32, 0),
        (conv(18, 18, 18), 17 * 20 * 18, 31 * 20 * 18 + 29 * 20 * 18),
        (conv(32, 64, 2), 2 * (2 * 20 * 16 * 32), 0),
        (conv(36, 36, 2), 2 * (11 * 20 * 18 * 18), 31 * 20 * 36 + 29 * 20 * 36),
        (conv(16, 32, batch=3), 3 * 2 * 20 * 16 * 32, 0),
        (wide("pointwise", 18, "relu"), 53 * 20 * 32, 0),
        (wide("pointwise", 18, "add", batch=2), 59 * 2 * 20 * 32, 0),
        (wide("pointwise", 18, "gelu"), 47 * 20 * 18, (31 + 29) * 20 * 18),
        (wide("concat", 32), 67 * 20 * 32, 0),
        (wide("concat", 20), 61 * 20 * 20, (31 + 29) * 20 * 20),
        (wide("gather", 20), 41 * 20 * 20, (31 + 29) * 20 * 20),
        (wide("reduce", 20, source=(8, 5)), 73 * 40 * 32, 0),
        (wide("reduce", 18, source=(8, 5)), 71 * 40 * 18, 31 * 40 * 18 + 29 * 20 * 18),
        (wide("pool", 20, kernel=(2, 2), stride=(2, 2), source=(8, 10)), 83 * 80 * 32, 0),
        (wide("scale", 20), 97 * 20 * 32, 0),
        (Work("linear", inputs=6, outputs=7, space=(5,)), 19 * 5 * 6 * 7, 0),
        (Work("matmul", batch=2, inputs=6, outputs=7, space=(5,)), 2 * 23 * 5 * 6 * 7, 0),
        (wide("softmax", 7, space=(5,)), 113 * 35, 0),
    ],
)
def test_what_works_take(work: Work, alone: float, around: float) -> None:
    some = {"rel": 1e-6}
    assert us(work, alone=True) == pytest.approx(alone, **some)
    assert us(work) == pytest.approx(alone + around, **some)
    assert us(work, PLAIN) == pytest.approx(us(work, PLAIN, alone=True), **some)


def test_a_last_set_of_blocks_takes_the_share_that_it_takes_alone() -> None:
    unit = 2 * 20 * 16 * 16
    for blocks in (1, 2, 4):
        assert us(conv(16, 16 * blocks)) == pytest.approx(unit * blocks, rel=1e-6)
    assert us(conv(16, 48)) == pytest.approx(3 * unit, rel=1e-3)
    # One block alone takes all that two take: a third one costs as much as a fourth.
    flat = COSTS.grids["blocked conv 3x3/1"]
    stairs = Grid((*flat.axes[:2], ("outputs", (16.0, 32.0, 64.0))), np.array(
        [[[a * b * c for c in (32.0, 32.0, 64.0)] for b in flat.axes[1][1]]
         for a in flat.axes[0][1]]))  # fmt: skip
    costs = dataclasses.replace(COSTS, grids={**COSTS.grids, "blocked conv 3x3/1": stairs})
    assert us(conv(16, 48), costs) == pytest.approx(us(conv(16, 64), costs), rel=1e-6)
    assert us(conv(16, 16), costs) == pytest.approx(us(conv(16, 32), costs), rel=1e-6)


def test_changes_of_layout() -> None:
    work = wide("pointwise", 6, batch=3, source=(7, 8))
    assert COSTS.reorder_seconds(work, out=True) * 1e6 == pytest.approx(31 * 3 * 56 * 6)
    assert COSTS.reorder_seconds(work, out=False) * 1e6 == pytest.approx(29 * 3 * 20 * 6)
    assert COSTS.reorder_seconds(wide("copy", 6), out=True) * 1e6 == pytest.approx(31 * 20 * 6)
    assert PLAIN.reorder_seconds(work, out=True) == PLAIN.reorder_seconds(work, out=False) == 0.0


def test_what_hands_channels_on_pays_for_no_layout_where_it_need_not() -> None:
    odd, gelu = wide("concat", 20), wide("pointwise", 18, "gelu")
    relu, off = wide("pointwise", 18, "relu"), conv(18, 20)
    passing = COSTS.passing_seconds
    assert passing(odd) == passing(odd, plain=True) == COSTS.seconds(odd, alone=True)
    assert passing(gelu) == COSTS.seconds(gelu)
    assert passing(gelu, plain=True) == COSTS.seconds(gelu, alone=True)
    assert passing(relu, plain=True) * 1e6 == pytest.approx(47 * 20 * 18)  # not on blocks
    assert passing(off) == passing(off, plain=True) == COSTS.seconds(off)


def test_an_operator_at_other_widths_keeps_its_layout() -> None:
    def again(form: str, work: Work) -> float:
        return COSTS.again(OpCost("n", work, form, 0.0), work) * 1e6

    whole, off, few, relu = conv(16, 32), conv(18, 20), conv(3, 20), wide("pointwise", 18, "relu")
    assert again("blocked", whole) == us(whole)
    assert again("blocked", off) == us(off) > us(off, alone=True)
    assert again("direct", few) == us(few, alone=True) < us(few)
    assert again("plain", off) == us(off, alone=True)
    assert again("plain", whole) == us(whole, alone=True)
    assert again("plain", relu) == pytest.approx(47 * 20 * 18)
    assert again("blocked", relu) == pytest.approx(53 * 20 * 32)


def test_what_a_convolution_takes_in_costs_what_it_was_measured_at() -> None:
    relu, gelu = wide("pointwise", 18, "relu", batch=2), wide("pointwise", 18, "gelu")
    assert COSTS.inside_seconds(relu, blocked=True) * 1e6 == pytest.approx(101 * 2 * 20 * 32)
    assert COSTS.inside_seconds(relu, blocked=False) * 1e6 == pytest.approx(103 * 2 * 20 * 18)
    assert COSTS.inside_seconds(gelu, blocked=True) == 0.0


def test_copies_leave_blocks_and_come_back() -> None:
    def copy(costs: StairTable = COSTS, **how: Any) -> float:
        return costs.copy_seconds("gather", 20, 12, (4, 5), 2, **how) * 1e6

    alone = 41 * 2 * 20 * 12
    assert copy(plain=True) == copy(PLAIN) == pytest.approx(alone)
    assert copy() == copy() == pytest.approx(alone + 31 * 2 * 20 * 20 + 29 * 2 * 20 * 12)


@pytest.mark.parametrize(
    ("parts", "back"),
    [
        ([(16, 16), (32, 32)], None),
        ([(16, 16), (32, 0)], None),  # one that goes whole is not cut
        ([(16, 16), (32, 16)], 16),  # one that is cut was gathered, out of blocks
        ([(16, 16), (20, 20)], 36),
        ([(32, 20), (20, 20)], 20),
    ],
)
def test_what_becomes_of_a_join(parts: list[tuple[int, int]], back: int | None) -> None:
    work, width = wide("concat", sum(have for have, _ in parts)), sum(take for _, take in parts)
    joined = COSTS.join(work, parts, width)
    if back is None:
        assert joined == Joined()
    else:
        assert joined.plain
        assert joined.seconds * 1e6 == pytest.approx(20 * (31 * back + 29 * width))
    assert PLAIN.join(work, parts, width) == Joined()
    flat = dataclasses.replace(work, space=(20,))
    assert COSTS.join(flat, parts, width) == Joined()


def test_exact_measurements_hold_for_one_stair_and_one_layout() -> None:
    work = conv(32, 32)
    costs = COSTS.with_works({work: 3 * COSTS.seconds(work)})
    for outputs in (17, 32):  # one stair is one place
        other = work.resized(outputs=outputs)
        assert costs.seconds(other) == pytest.approx(3 * COSTS.seconds(other))
    other = conv(18, 32)  # plain: far away, but of the same kind
    both = costs.with_works({other: COSTS.seconds(other, alone=True)})
    assert both.seconds(work) == pytest.approx(3 * COSTS.seconds(work))
    near = both.seconds(conv(48, 32)) / COSTS.seconds(conv(48, 32))
    assert 2.8 < near < 3
    near = both.seconds(conv(22, 32), alone=True) / COSTS.seconds(conv(22, 32), alone=True)
    assert 1 < near < 1.2


# ------------------------------------------------------------------ programs


class Function(nn.Module):
    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def c3(inputs: int, outputs: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups)


NETS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "fused": (
        lambda s, x: s.b(s.norm(s.a(x)).relu()).relu().relu(),
        {"a": c3(4, 16), "norm": nn.BatchNorm2d(16), "b": c3(16, 16)},
    ),
    "sums": (
        lambda s, x: s.d(F.relu(s.b(y := s.a(x).relu()) + y) + s.c(y)) + s.off(y),
        {"a": c3(4, 16), "b": c3(16, 16), "c": c3(16, 16), "d": c3(16, 18), "off": c3(16, 18)},
    ),
    "a sum in another layout": (
        lambda s, x: s.b(s.a(x)) + s.c(x[:, :1].expand(-1, 16, -1, -1)),
        {"a": c3(4, 18), "b": c3(18, 16), "c": c3(16, 16)},
    ),
    "sums that are none of two images": (
        lambda s, x: (s.a(x) + s.b(x).mean((2, 3), True), s.a(x).flatten(1) + s.b(x).flatten(1)),
        {"a": c3(4, 16), "b": c3(4, 16)},
    ),
    "a sum of one": (lambda s, x: (y := s.a(x)) + y, {"a": c3(4, 16)}),
    "a result of two readers": (
        lambda s, x: (s.a(x), (y := s.b(x)).relu(), y.sigmoid(), s.c(y).relu() + y),
        {"a": c3(4, 16), "b": c3(4, 16), "c": c3(16, 16)},
    ),
    "one activation": (
        lambda s, x: (s.a(x).relu().relu() + x[:, :1], s.a(x).sigmoid(), s.b(s.a(x).relu())),
        {"a": c3(4, 16), "b": nn.BatchNorm2d(16)},
    ),
    "norms": (
        lambda s, x: s.two(s.one(F.max_pool2d(s.a(x), 2)).relu()),
        {"a": c3(4, 16), "one": nn.BatchNorm2d(16), "two": nn.BatchNorm2d(16)},
    ),
    "joins": (
        lambda s, x: [torch.cat([s.a(x), y], d) for y in (s.b(x), s.c(x)) for d in (1, -3)],
        {"a": c3(4, 16), "b": c3(4, 32), "c": c3(4, 20)},
    ),
    "joins of others": (
        lambda s, x: (torch.cat([s.a(x), s.b(x)], 2), torch.cat([s.a(x), x], 1),
                      torch.cat([s.a(x).sigmoid(), s.b(x).sigmoid()], 1).sigmoid()),
        {"a": c3(4, 16), "b": c3(4, 16)},
    ),
    "means": (
        lambda s, x: [s.a(x).mean(d) for d in ((2, 3), (-1, -2), (3, 2), (1, 2), 3)]
        + [s.a(x).mean(d, True) for d in ((-1, -2), (3, 2), (1, 2), 3)]
        + [s.b(x).mean((2, 3), True)],
        {"a": c3(4, 16), "b": c3(4, 18)},
    ),
    "pools": (
        lambda s, x: (F.max_pool2d(s.a(x), 2), F.max_pool2d(s.b(x), 2), F.max_pool2d(x, 2)),
        {"a": c3(4, 16), "b": c3(4, 18)},
    ),
    "groups": (
        lambda s, x: s.d(s.c(s.b(s.a(x)).relu()).relu()),
        {"a": c3(4, 32), "b": c3(32, 32, 32), "c": c3(32, 32, 2), "d": c3(32, 16, 4)},
    ),
    "what costs nothing": (
        lambda s, x: s.d((y := s.a(x)).flatten(1).reshape(x.shape[0], 16, 4, 4) * 1) +
        y.split(8, 1)[1].mean() + F.dropout(x, 0.5, False).sum(),
        {"a": c3(4, 16), "d": c3(16, 16)},
    ),
    "a head": (
        lambda s, x: s.head(s.a(x).mean((2, 3)).relu()),
        {"a": c3(4, 16), "head": nn.Linear(16, 3)},
    ),
    "products": (
        lambda s, x: (s.a(x) * s.b(x), s.a(x) + x[:, :1], s.a(x).sigmoid() + s.b(x).sigmoid()),
        {"a": c3(4, 16), "b": c3(4, 16)},
    ),
    "a line": (lambda s, x: s.a(x.flatten(2)).relu(), {"a": nn.Conv1d(4, 16, 3, padding=1)}),
}  # fmt: skip


def told(costs: StairTable, program: narrows.Program, batch: int | None) -> str:
    """Return of every node its form, its microseconds, and those of the layouts before it."""

    def number(seconds: float) -> str:
        return f"{seconds * 1e6:.6g}"

    return "".join(
        f"  {op.node} {op.form} {number(op.seconds)}"
        + (f" and {number(op.layout)}" if op.layout else "") + "\n"
        for op in costs.account(program, batch)
    )  # fmt: skip


def test_accounts_of_small_nets(golden: Callable[[str, str], None]) -> None:
    text = ""
    for name, (forward, parts) in NETS.items():
        net = Function(forward, **parts).eval()
        program = narrows.capture(net, (torch.zeros(2, 4, 4, 4),))
        for costs in (COSTS, PLAIN):
            where = "on blocks" if costs is COSTS else "without blocks"
            text += f"{name}, {where}\n{told(costs, program, None)}"
    golden("onnx_account", text)


def test_an_account_is_of_as_many_examples_as_are_asked_for() -> None:
    net = Function(lambda s, x: s.a(x).sigmoid(), a=c3(4, 16)).eval()
    program = narrows.capture(net, (torch.zeros(2, 4, 4, 4),))
    parts = [[op.seconds * 1e6 for op in COSTS.account(program, n)] for n in (1, 2, 6)]
    assert parts[0] == pytest.approx([5 * 16 * 4 * 16, 53 * 16 * 16, 0.0])
    assert parts[1] == pytest.approx([2 * v for v in parts[0]])
    assert parts[2] == pytest.approx([6 * v for v in parts[0]])
    layout = [op.layout * 1e6 for op in COSTS.account(program, 6)]
    assert layout == pytest.approx([0.0, 0.0, 31 * 6 * 16 * 16])


# ------------------------------------------------------------------ the runtime's own account


def test_a_profile_stands_beside_what_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def node(op: str, inputs: list[list[int]], output: list[int]) -> calibrate.Node:
        return calibrate.Node(f"n_{op}", op, inputs, [output], [2.0, 1.126, 9.0])

    nodes = [
        node("ReorderInput", [[2, 16, 4, 5]], [2, 32, 4, 5]),
        node("FusedConv", [[2, 16, 4, 5], [16, 16, 3, 3], [16]], [2, 16, 4, 5]),
        node("ReorderOutput", [[2, 16, 4, 5]], [2, 12, 4, 5]),
        node("ReorderOutput", [[2, 16, 4]], [2, 16, 4]),
        node("Gemm", [[3, 6], [6, 7]], [3, 7]),
        node("Add", [[3, 6], [6]], [3, 6]),
        node("Shape", [], []),
    ]
    monkeypatch.setattr(profile, "profile", lambda *_, **__: nodes)
    rows = profile.profiled(Path(), {}, COSTS)
    assert {row["us"] for row in rows} == {1.56}
    assert [(row["op"], row["shapes"], row["predicted_us"]) for row in rows] == [
        ("ReorderInput", "2x16x4x5 -> 2x32x4x5", 29 * 2 * 20 * 32),
        ("FusedConv", "2x16x4x5 by 16x16x3x3 -> 2x16x4x5", 2 * 2 * 20 * 16 * 16),
        ("ReorderOutput", "2x16x4x5 -> 2x12x4x5", 31 * 2 * 20 * 16),
        ("ReorderOutput", "2x16x4 -> 2x16x4", None),
        ("Gemm", "3x6 by 6x7 -> 3x7", 19 * 3 * 6 * 7),
        ("Add", "3x6 -> 3x6", None),
        ("Shape", " -> 1", None),
    ]
    assert {r["predicted_us"] for r in profile.profiled(Path(), {})} == {None}
