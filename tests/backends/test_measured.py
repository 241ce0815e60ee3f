"""Works of small nets, grids between their points, staircases, and accounts of programs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import narrows
from narrows.backends.measured.grid import Grid
from narrows.backends.measured.layout import Layout
from narrows.backends.onnx.staircase import StairTable
from narrows.errors import UsageError
from narrows.ir.work import Work
from narrows.ir.workload import macs, work_of, works_of

WINDOWED = ("positions", "inputs", "outputs")
CONV = Work(
    "conv", "conv2d", inputs=64, outputs=64, kernel=(3, 3), stride=(1, 1), space=(14, 14),
    source=(14, 14),
)  # fmt: skip
DEPTHWISE = dataclasses.replace(CONV, kind="depthwise", groups=64)
LAYOUT = Layout(16, 4, 4, fused=("relu",), blocked=("relu", "silu", "add"))


def grid(names: tuple[str, ...], *axes: tuple[float, ...], rate: float = 1e-3) -> Grid:
    """Return a grid of times in proportion to the product of the sizes, and 2 us."""
    us = np.ones([len(a) for a in axes])
    for i, axis in enumerate(axes):
        us = us * np.array(axis).reshape([-1 if j == i else 1 for j in range(len(axes))])
    return Grid(tuple(zip(names, axes, strict=True)), 2 + rate * us)


@pytest.fixture
def costs() -> StairTable:
    elements = grid(("elements",), (1e3, 1e5, 1e6), rate=1e-4)
    conv = grid(WINDOWED, (49, 784), (16, 64, 256), (16, 32, 48, 64, 256), rate=1e-5)
    slow = Grid(conv.axes, conv.us * 1.7)
    grids = {
        "blocked conv 3x3/1": conv,
        "direct conv 3x3/1": grid(WINDOWED, (49, 784), (3, 12), (16, 64), rate=1e-5),
        "plain conv 3x3/1": slow,
        "blocked depthwise 3x3/1": grid(("positions", "outputs"), (49, 784), (16, 256)),
        "plain depthwise 3x3/1": grid(("positions", "outputs"), (49, 784), (15, 255), rate=8e-3),
        **dict.fromkeys(["reorder in", "reorder out", "copy", "gather", "pointwise"], elements),
    }
    return StairTable("test", "1", "cpu", LAYOUT, 1e-6, grids)


# ---------------------------------------------------------------------- works


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.four = nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(32, 8, 2, stride=2)
        self.last = nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = self.up(self.four(self.deep(x)))
        x = torch.nn.functional.max_pool2d(x, 2)
        x = torch.cat([x[:, :2], x[:, 2:]], 1)
        return self.last(x.mean((2, 3)))


@pytest.fixture(scope="module")
def program() -> narrows.Program:
    torch.manual_seed(0)
    return narrows.capture(Net().eval(), (torch.randn(2, 3, 16, 16),))


def test_works_of_a_net(program):
    works = {n.name: work_of(n) for n in program.nodes}
    found = {w.kind: w for w in works.values() if w is not None}
    assert works["x"] is None
    assert found["conv"] == Work(
        "conv", "conv2d", batch=2, inputs=3, outputs=16, kernel=(3, 3), stride=(2, 2),
        space=(8, 8), source=(16, 16),
    )  # fmt: skip
    assert (found["depthwise"].groups, found["grouped"].groups) == (16, 4)
    assert found["conv_transpose"].source == (8, 8)
    assert found["conv_transpose"].space == (16, 16)
    assert found["linear"].macs == 2 * 8 * 10
    assert (found["pool"].kernel, found["pool"].inputs) == ((2, 2), 8)
    assert found["concat"].outputs == 8
    assert {"scale", "pointwise", "slice", "reduce"} < set(found)


def test_macs_are_those_of_the_works(program):
    works = works_of(program)
    for node in program.nodes:
        assert works[node] == (work := work_of(node))
        assert macs(node, works) == (work.macs if work else 0)
    assert work_of(program.node("four")).macs == 2 * 64 * 32 * 4 * 9


def test_attention_and_products():
    class Attend(nn.Module):
        def forward(self, q, k, v):
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return torch.softmax(torch.matmul(y, y.transpose(-1, -2)), -1)

    shapes = ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6))
    made = narrows.capture(Attend().eval(), tuple(torch.randn(s) for s in shapes))
    works = [w for w in map(work_of, made.nodes) if w is not None]
    kinds = {w.kind: w for w in works}
    assert kinds["attention"].macs == 2 * 4 * 5 * 7 * (8 + 6)
    assert kinds["matmul"].macs == 2 * 4 * 5 * 5 * 6
    assert kinds["softmax"].elements == 2 * 4 * 5 * 5


@pytest.mark.parametrize(
    ("work", "changes", "sizes"),
    [
        (CONV, {"inputs": 48}, (48, 64, 1)),
        (CONV, {"outputs": 20}, (64, 20, 1)),
        (DEPTHWISE, {"inputs": 20}, (20, 20, 20)),
        (DEPTHWISE, {"outputs": 20}, (20, 20, 20)),
        (dataclasses.replace(CONV, kind="grouped", groups=8), {"inputs": 32, "outputs": 32},
         (32, 32, 4)),
        (dataclasses.replace(CONV, kind="grouped", groups=8), {"inputs": 40, "outputs": 56},
         (40, 56, 8)),
        (Work("pointwise", "relu", inputs=64, outputs=64), {"outputs": 8}, (8, 8, 1)),
    ],
)  # fmt: skip
def test_resized(work, changes, sizes):
    new = work.resized(**changes)
    assert (new.inputs, new.outputs, new.groups) == sizes
    assert new.resized() == new
    assert work.resized(batch=3).batch == 3


def test_a_product_has_no_batch_of_the_model():
    with pytest.raises(ValueError, match="batch"):
        Work("attention").resized(batch=2)


# ---------------------------------------------------------------------- grids


def test_a_grid_reproduces_its_points_and_is_monotone_between_and_beyond():
    one = grid(("positions", "outputs"), (10, 100, 1000), (16, 64, 256))
    for i, p in enumerate((10, 100, 1000)):
        for j, o in enumerate((16, 64, 256)):
            assert one.at({"positions": p, "outputs": o}) == pytest.approx(one.us[i, j])
    for p in (1, 10, 40, 5000):
        times = [one.at({"positions": p, "outputs": o}) for o in (1, 8, 16, 17, 64, 99, 256, 999)]
        assert times == sorted(times)
        assert times[-1] / times[-2] <= 999 / 256 + 1e-9  # beyond: at most in proportion


def test_noise_never_makes_more_work_quicker():
    noisy = Grid((("outputs", (16, 32, 64)),), np.array([10.0, 8.0, 20.0]))
    assert noisy.at({"outputs": 32}) == pytest.approx(10)


@pytest.mark.parametrize("us", [[1.0, 0.0], [1.0, -1.0]])
def test_a_grid_without_times_is_refused(us):
    with pytest.raises(ValueError, match="expected float > 0"):
        Grid.from_json({"axes": {"outputs": [1, 2]}, "us": us})


# ---------------------------------------------------------------------- the table


def test_widths_in_one_block_cost_the_same_and_the_next_costs_more(costs):
    times = [costs.seconds(CONV.resized(outputs=o)) for o in range(1, 257)]
    assert times == sorted(times)
    for o in range(16, 256, 16):
        assert len(set(times[o - 16 : o])) == 1
        assert times[o] > times[o - 1]
    whole = [costs.seconds(CONV.resized(inputs=i)) for i in range(16, 257, 4)]
    assert whole == sorted(whole)
    assert (costs.step, costs.least_step, costs.join_step) == (16, 4, 16)


def test_a_width_off_the_alignment_pays_for_the_layout(costs):
    off = CONV.resized(inputs=62)
    assert (costs.form(CONV), costs.form(off)) == ("blocked", "plain")
    assert costs.seconds(off) > costs.seconds(off, alone=True) > costs.seconds(CONV)
    assert costs.seconds(CONV) == costs.seconds(CONV, alone=True)
    assert costs.seconds(DEPTHWISE.resized(outputs=63)) > 3 * costs.seconds(DEPTHWISE)
    assert costs.form(CONV.resized(inputs=3)) == "direct"


def test_a_window_that_was_not_measured_follows_from_the_nearest(costs):
    wide = dataclasses.replace(CONV, kernel=(5, 5))
    assert costs.seconds(wide) == pytest.approx(costs.seconds(CONV) * 25 / 9)


def test_copies_cost_more_among_blocks(costs):
    alone = costs.copy_seconds("gather", 64, 48, (14, 14), plain=True)
    assert costs.copy_seconds("gather", 64, 48, (14, 14)) > 2 * alone


def test_exact_works_correct_what_lies_near(costs):
    before = costs.seconds(CONV)
    better = costs.with_works({CONV: before * 1.5})
    assert better.seconds(CONV) == pytest.approx(before * 1.5)
    near = CONV.resized(outputs=80)
    assert better.seconds(near) == pytest.approx(costs.seconds(near) * 1.5)
    other = dataclasses.replace(CONV, space=(7, 7))
    assert better.seconds(other) == costs.seconds(other)


def test_a_runtime_without_blocks_has_no_stairs(costs):
    plain = dataclasses.replace(costs, layout=Layout())
    times = [plain.seconds(CONV.resized(outputs=o)) for o in (31, 32, 33)]
    assert times[0] < times[1] < times[2]
    assert (plain.step, plain.least_step, plain.join_step) == (1, 1, 1)


def test_a_table_is_kept(costs, tmp_path: Path):
    costs = costs.with_works({CONV: 1e-4})
    costs.save(tmp_path / "t.json")
    again = StairTable.load(tmp_path / "t.json")
    assert again.layout == costs.layout
    assert again.works == pytest.approx(costs.works)
    assert again.seconds(CONV.resized(outputs=99)) == pytest.approx(
        costs.seconds(CONV.resized(outputs=99)), rel=1e-3
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "layout": 3}'])
def test_what_is_no_table_is_refused(text: str, tmp_path: Path):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UsageError, match="cost table"):
        StairTable.load(tmp_path / "t.json")


def test_a_table_with_a_broken_grid_is_refused(costs, tmp_path: Path):
    data = json.loads(json.dumps(costs.to_json()))
    data["grids"]["copy"]["us"].pop()
    with pytest.raises(UsageError, match="no cost table"):
        StairTable.from_json(data)


# ---------------------------------------------------------------------- programs


def test_a_prediction_adds_up(costs, program):
    account = costs.account(program)
    assert costs.predict(program) == [(op.node, op.total) for op in account]
    forms = {op.node: op.form for op in account}
    assert forms["stem"] == "direct"
    assert forms["norm"] == "fused"
    assert forms["relu"] == "fused"
    assert forms["deep"] == "blocked"
    assert forms["four"] == "plain"
    assert next(op for op in account if op.node == "four").layout > 0
    once, many = (sum(s for _, s in costs.predict(program, b)) for b in (1, 8))
    assert 4 * once < many < 9 * once


def test_a_sum_goes_into_the_later_convolution_and_layouts_change_once(costs):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(16, 32, 3, padding=1)
            self.second = nn.Conv2d(32, 32, 3, padding=1)

        def forward(self, x):
            x = torch.relu(self.first(x))
            return torch.relu(self.second(x) + x)

    made = narrows.capture(Block().eval(), (torch.randn(2, 16, 8, 8),))
    account = costs.account(made, 1)
    assert [op.form for op in account] == ["blocked", "fused", "blocked", "fused", "fused", "none"]
    assert [op.layout > 0 for op in account] == [True, False, False, False, False, True]


def test_a_pooling_follows_the_layout_of_what_it_reads(costs):
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x):
            return nn.functional.max_pool2d(self.conv(nn.functional.max_pool2d(x, 2)), 2)

    made = narrows.capture(Pools().eval(), (torch.randn(2, 16, 16, 16),))
    forms = [op.form for op in costs.account(made, 1)]
    assert forms == ["plain", "blocked", "blocked", "none"]


# ---------------------------------------------------------------------- channels that lie last


def test_a_gather_of_innermost_channels_is_a_pick(costs):
    """One by one: another price, and the channels are those of the axis."""

    class Pick(nn.Module):
        def forward(self, x):
            index = torch.tensor([0, 2, 3])
            return x.index_select(-1, index), x.index_select(1, index)

    program = narrows.capture(Pick().eval(), (torch.randn(2, 5, 6, 8),))
    last, inner = (w for w in map(work_of, program.nodes) if w and w.op == "index_select")
    assert last == Work("pick", "index_select", 2, 8, 3, space=(5, 6), source=(5, 6))
    assert (inner.kind, inner.outputs, inner.space) == ("gather", 3, (6, 8))
    slow = dataclasses.replace(
        costs, grids={**costs.grids, "pick": costs.grids["gather"].scaled(10)}
    )
    assert slow.seconds(last, alone=True) > 5 * costs.seconds(last, alone=True)  # it has no picks
    assert slow.seconds(inner, alone=True) == costs.seconds(inner, alone=True)
    one, other = (t.copy_seconds("pick", 64, 48, (14, 14), plain=True) for t in (slow, costs))
    assert one == pytest.approx(10 * other, rel=0.01)
