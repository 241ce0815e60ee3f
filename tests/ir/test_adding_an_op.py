"""Following docs/adding-an-op.md gives a right row, or a law that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import narrows
from narrows.errors import ProgramError
from narrows.ir.compare import relative_error
from narrows.ir.ops import table
from narrows.ir.ops.layout import Layout
from narrows.ir.ops.mixing import Mixing, Reduce, Spatial
from narrows.ir.ops.pointwise import Pointwise
from narrows.ir.ops.row import Row
from narrows.ir.ops.sample import Made, Sample, heads, image, tokens
from tests.ir.facts import partial_law, width_law, work_law
from tests.ir.test_op_rows import constants, probe, slice_law

aten = torch.ops.aten

FUNCTION = Sample((image(low=0.3, high=3.0),)), Sample((heads(low=0.3, high=3.0),))
WINDOWS = (
    Sample((image(), [2, 2], [1, 1], [0, 0], [2, 2])),
    Sample((image(), [3, 3], [1, 1], [1, 1], [1, 1])),
)


def laws(row: Row) -> None:
    """Hold a row to every law that the table's rows are held to."""
    for sample in row.samples:
        for law in (probe, slice_law, constants):
            law(row, sample)
    if isinstance(row, Pointwise):
        partial_law(row)
    width_law(row)
    work_law(row)


def registered(monkeypatch: pytest.MonkeyPatch, row: Row) -> Row:
    """Register a row for one test, as the guide does."""
    rows = {key: other for key, other in table._ROWS.items() if key != id(row.target)}
    monkeypatch.setattr(table, "_ROWS", rows)
    return table.register(row)


RIGHT: dict[str, Callable[[], Row]] = {
    "lgamma": lambda: Pointwise(target=aten.lgamma.default, samples=FUNCTION, partial=True),
    "i0": lambda: Pointwise(target=aten.i0.default, samples=FUNCTION, partial=True),
    "sinc": lambda: Pointwise(target=aten.sinc.default, samples=FUNCTION),
    "logcumsumexp": lambda: Mixing(
        target=aten.logcumsumexp.default, dims="dim", ordered=True,
        constants=lambda _: "none", samples=(Sample((image(), 2)), Sample((tokens(), 2))),
    ),
    "nanmedian": lambda: Reduce(target=aten.nanmedian.default, samples=(Sample((image(),)),)),
}  # fmt: skip

WRONG: dict[str, Callable[[], Row]] = {
    "lgamma has poles": lambda: Pointwise(target=aten.lgamma.default, samples=FUNCTION),
    "i0 leaves float64": lambda: Pointwise(target=aten.i0.default, samples=FUNCTION),
    "sinc does not": lambda: Pointwise(target=aten.sinc.default, samples=FUNCTION, partial=True),
    "unfold's border is no element": lambda: Layout(target=aten.im2col.default, samples=WINDOWS),
    "unfold makes more channels": lambda: Spatial(
        target=aten.im2col.default, trailing=2, samples=WINDOWS
    ),
    "fold sums": lambda: Layout(
        target=aten.col2im.default,
        samples=(Sample((Made((2, 24, 9)), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1])),),
    ),
    "logcumsumexp moves constants": lambda: Mixing(
        target=aten.logcumsumexp.default, dims="dim", ordered=True, samples=(Sample((image(), 2)),)
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_row_by_the_guide_keeps_every_law(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    laws(registered(monkeypatch, RIGHT[name]()))


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_breaks_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = registered(monkeypatch, WRONG[name]())
    with pytest.raises((AssertionError, RuntimeError, IndexError, ProgramError)):
        laws(row)


def test_a_row_from_outside_lets_channels_through(monkeypatch: pytest.MonkeyPatch) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Any) -> Any:
            return self.last(torch.lgamma(self.first(x).abs() + 1))

    program = narrows.capture(Net().double().eval(), (torch.randn(2, 3, 4, 4).double(),))
    keep = {"last.weight": (1, 2, 5)}

    def width() -> tuple[int, ...]:
        plan = narrows.plan(program, keep_inputs=keep)
        small = narrows.apply(program, plan)
        error = relative_error(small(*program.examples), plan.masked(program)(*program.examples))
        assert error < 1e-12
        return tuple(small.weights["first.weight"].shape)

    assert width() == (8, 3, 1, 1)  # a barrier
    registered(monkeypatch, RIGHT["lgamma"]())
    program = program.copy().seal()  # what was found out about the first one stays as it was
    assert width() == (3, 3, 1, 1)
