"""The cost table of ONNX Runtime: what ships, the cache, and a very small calibration."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from narrows.backends import make_target
from narrows.backends.measured.grid import Grid
from narrows.backends.measured.layout import Layout
from narrows.backends.onnx import calibrate, costs, sweep
from narrows.backends.onnx.probes import NARROW, POINTWISE, Bench, Point
from narrows.backends.onnx.profile import work_of_node
from narrows.backends.onnx.staircase import StairTable
from narrows.backends.onnx.stairs import Layer, read_layers, reasons
from narrows.backends.onnx.steady import Quiet
from narrows.backends.tables import cache_folder, cpu_name
from narrows.ir.work import Work

CONV = Work(
    "conv", "conv2d", inputs=64, outputs=64, kernel=(3, 3), stride=(1, 1), space=(28, 28),
    source=(28, 28),
)  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NARROWS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---------------------------------------------------------------------- what ships


def test_the_shipped_table_is_small_and_knows_the_stairs():
    assert costs.TABLES.file.stat().st_size < 100_000
    table = costs.TABLES.shipped()
    assert table.runtime
    assert table.cpu
    assert (table.layout.block, table.layout.align) == (16, 4)
    assert table.seconds(CONV.resized(outputs=100)) == table.seconds(CONV.resized(outputs=112))
    assert table.seconds(CONV.resized(outputs=127)) == table.seconds(CONV.resized(outputs=128))
    assert table.seconds(CONV.resized(inputs=62)) > 1.1 * table.seconds(CONV)
    deep = dataclasses.replace(CONV, kind="depthwise", groups=64)
    assert table.seconds(deep.resized(outputs=63)) > 3 * table.seconds(deep)
    copies = {k: table.copy_seconds(k, 64, 64, (28, 28), plain=True) for k in ("gather", "pick")}
    assert 10 * copies["gather"] < copies["pick"]
    assert table.copy_seconds("gather", 64, 64, (28, 28)) < table.seconds(CONV)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("side", [7, 14, 28, 56])
def test_the_shipped_stairs_rise(kernel: int, side: int):
    work = dataclasses.replace(CONV, kernel=(kernel, kernel), space=(side, side))
    table = costs.TABLES.shipped()
    for other in (16, 64, 192):
        times = [table.seconds(work.resized(inputs=other, outputs=o)) for o in range(16, 513, 16)]
        assert times == sorted(times)


def test_the_target_answers_with_it(cache):
    assert make_target("onnx").costs() is costs.TABLES.shipped()


# ---------------------------------------------------------------------- the cache


def own(**changes) -> StairTable:
    here = {"runtime": costs.TABLES.version(), "cpu": cpu_name()}
    return dataclasses.replace(costs.TABLES.shipped(), **(here | changes))


def test_a_table_of_this_machine_goes_first(cache):
    assert costs.TABLES.cached() is None
    path = costs.TABLES.keep(own(made="here"))
    assert path.parent == cache
    assert [p.name for p in cache.iterdir()] == [path.name]
    assert costs.TABLES.cached().made == "here"
    assert make_target("onnx").costs().made == "here"
    costs.TABLES.keep(own(made="later"))
    assert costs.TABLES.current().made == "later"


@pytest.mark.parametrize("changes", [{"cpu": "another"}, {"runtime": "0.1"}, {"threads": 4}])
def test_a_table_of_elsewhere_is_not_taken(changes, cache):
    costs.TABLES.keep(own(**changes), costs.TABLES.path())
    assert costs.TABLES.cached() is None
    assert costs.TABLES.current() is costs.TABLES.shipped()


@pytest.mark.parametrize("text", ["", "{", '{"format": 1}', "[1]"])
def test_a_damaged_table_is_not_taken(text: str, cache):
    cache.mkdir()
    costs.TABLES.path().write_text(text)
    assert costs.TABLES.current() is costs.TABLES.shipped()


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NARROWS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/narrows")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/narrows"
    assert costs.TABLES.path(1) != costs.TABLES.path(2)


# ---------------------------------------------------------------------- measuring


def few(layout: Layout, quick: bool):
    yield from sweep._conv("blocked conv", 1, (7, 7), 16, 16, (1, 1), 1)
    yield from sweep._conv("blocked conv", 1, (7, 7), 16, 32, (1, 1), 1)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "jobs", few)
    monkeypatch.setattr(costs, "QUICK_ROUNDS", 2)
    monkeypatch.setattr("narrows.backends.onnx.steady.EVICTED", 16)


def test_a_calibration_measures_and_fills_the_rest(tiny, cache):
    told = []
    table, complete = costs.calibrate(quick=True, tell=lambda done, all: told.append((done, all)))
    assert complete
    assert told == [(0, 1), (1, 1)]
    assert (table.runtime, table.cpu) == (costs.TABLES.version(), cpu_name())
    assert (table.grids["blocked conv 1x1/1"].us > 0).all()
    assert table.overhead > 0
    if table.layout.block == costs.TABLES.shipped().layout.block:
        assert set(table.grids) >= set(costs.TABLES.shipped().grids)
        name = "blocked conv 3x3/1"  # was not measured: the shipped one, at this machine's scale
        scale = table.grids[name].us / costs.TABLES.shipped().grids[name].us
        assert scale.max() == pytest.approx(scale.min())
    again, complete = costs.measure_works(table, [CONV.resized(inputs=8, outputs=8)])
    assert complete
    assert len(again.works) == 1


def test_ctrl_c_keeps_what_was_measured(tiny, cache, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "measure", interrupted)
    table, complete = costs.calibrate()
    assert not complete
    assert set(table.grids) >= set(costs.TABLES.shipped().grids) or table.layout.block != 16


def test_works_take_what_their_probes_took(monkeypatch: pytest.MonkeyPatch):
    """Less what every node takes, and at least a little; Ctrl-C keeps what was measured."""
    works = [CONV.resized(inputs=8, outputs=8), CONV.resized(inputs=8, outputs=16)]

    def profiled(model, **_):
        names = [n.name for n in onnx.load_model_from_string(model).graph.node]
        times = [
            (n, 2.0 + 5.0 * int(found[1])) for n in names if (found := calibrate.PROBE.search(n))
        ]
        return [calibrate.Node(name, "Conv", [], [], [time]) for name, time in times]

    monkeypatch.setattr(calibrate, "profile", profiled)
    monkeypatch.setattr(calibrate, "find_overhead", lambda quiet: (0.0, 3.0))
    table, complete = costs.measure_works(costs.TABLES.shipped(), works)
    assert complete
    assert sorted(table.works[w] for w in works) == pytest.approx([calibrate.LEAST * 1e-6, 4e-6])

    def interrupted(*_, **__):
        yield {works[0]: 5e-6}
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "measure_works", interrupted)
    table, complete = costs.measure_works(costs.TABLES.shipped(), works)
    assert (table.works, complete) == ({works[0]: 5e-6}, False)


def test_the_layout_that_the_runtime_shows():
    layout = calibrate.find_layout()
    assert layout.block in (1, 8, 16)
    assert "relu" in layout.fused


def test_a_profile_has_the_probes():
    bench = Bench()
    tag = bench.tag(Point("x", ()))
    bench.use(bench.conv(bench.blocks(1, 32, (4, 4)), NARROW, (3, 3), tag=tag))
    nodes = calibrate.profile(bench.model(), rounds=2, quiet=Quiet())
    assert sum(bool(calibrate.PROBE.search(n.name)) for n in nodes) == 1
    assert all(n.us for n in nodes)


def test_a_profile_knows_the_works_of_its_nodes():
    def work(op, *shapes):
        return work_of_node(calibrate.Node("n", op, [*shapes[:-1]], [shapes[-1]], [1.0]))

    assert work("FusedConv", [2, 6, 9, 8], [8, 3, 3, 5], [2, 8, 5, 4]) == Work(
        "grouped", "conv2d", batch=2, inputs=6, outputs=8, groups=2, kernel=(3, 5), stride=(2, 2),
        space=(5, 4), source=(9, 8),
    )  # fmt: skip
    assert work("Conv", [1, 6, 4, 4], [6, 1, 3, 3], [1, 6, 4, 4]).kind == "depthwise"
    assert work("Gemm", [4, 5, 6], [6, 7], [4, 5, 7]) == Work(
        "linear", "linear", inputs=6, outputs=7, space=(20,)
    )
    assert work("MatMul", [2, 3, 4, 5], [2, 3, 5, 6], [2, 3, 4, 6]) == Work(
        "matmul", "matmul", 6, 5, 6, space=(4,)
    )
    assert work("Relu", [2, 3], [2, 3]) is None


@pytest.mark.parametrize(
    ("op", "shapes", "work"),
    [
        ("Conv", ([1, 3, 9, 9], [8, 3, 3, 3], [1, 8, 5, 5]), ("conv", 3, 8, 1, (2, 2), (5, 5))),
        ("Conv", ([1, 6, 4, 4], [8, 4, 1, 1], [1, 8, 4, 4]), ("conv", 6, 8, 1, (1, 1), (4, 4))),
        ("Conv", ([1, 4, 3, 3], [4, 4, 3, 3], [1, 4, 9, 9]), ("conv", 4, 4, 1, (1, 1), (9, 9))),
        ("Conv", ([1, 3, 9], [8, 3, 3], [1, 8, 7]), None),
        ("FusedGemm", ([2, 5], [5, 7], [2, 7]), ("linear", 5, 7, 1, (), (2,))),
        ("FusedMatMul", ([4, 5], [2, 5, 6], [2, 4, 6]), ("matmul", 5, 6, 1, (), (4,))),
        ("Gemm", ([], [5, 7], [7]), None),
        ("Gemm", ([2, 5], [], [7]), None),
        ("Gemm", ([2, 5], [2, 7]), None),
        ("MatMul", ([5], [5, 7], []), None),
    ],
)
def test_works_of_other_nodes(op: str, shapes: tuple[list[int], ...], work: Any) -> None:
    found = work_of_node(calibrate.Node("n", op, [*shapes[:-1]], [shapes[-1]], [1.0]))
    if work is None:
        assert found is None
        return
    assert found
    told = (found.kind, found.inputs, found.outputs, found.groups, found.stride, found.space)
    assert told == work


def test_layers_are_read_without_the_weights(tmp_path: Path):
    weight = onnx.helper.make_tensor("w", 1, [8, 2, 3, 3], bytes(576), raw=True)
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], group=4)
    ends = [onnx.helper.make_tensor_value_info(n, 1, None) for n in "xy"]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    where = {"location": "data", "size_threshold": 0}
    model = onnx.helper.make_model(graph)
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, **where)
    (tmp_path / "data").unlink()
    layers, _ = read_layers(tmp_path / "m.onnx")
    assert layers == [Layer("", "grouped", 8, 8, 4, 9)]


def test_probes_are_packed_by_size():
    def job(room: int, weight: int) -> sweep.Job:
        return sweep.Job((room,), weight, lambda bench: None)

    wanted = [job(1, 1) for _ in range(calibrate.MOST + 1)] + [job(2, calibrate.LARGEST)] * 2
    groups = list(calibrate.pack(wanted))
    assert sorted(map(len, groups)) == [1, 1, 1, calibrate.MOST]
    assert all(len({j.room for j in g}) == 1 for g in groups)


def test_a_grid_is_made_whole_from_what_was_measured():
    times = {"linear": {(1.0, 4.0, 8.0): 2.0, (1.0, 8.0, 8.0): 4.0, (2.0, 4.0, 8.0): 3.0}}
    grid = Grid.of(sweep.axes_of(["linear"])["linear"], times["linear"])
    assert grid.us.shape == (2, 2, 1)
    assert grid.us[1, 1, 0] == pytest.approx((8 * 6) ** 0.5)  # twice either neighbour


# ---------------------------------------------------------------------- widths off a step


@pytest.mark.parametrize(
    ("kind", "widths", "aligned", "wasted"),
    [
        ("dense", (64, 64, 1), True, 0),
        ("dense", (62, 64, 1), False, 1 - 62 / 64),
        ("1x1", (64, 40, 1), True, 1 - 40 / 48),
        ("1x1", (3, 64, 1), True, 0),
        ("depthwise", (62, 62, 62), False, 1 - 62 / 64),
        ("depthwise", (60, 60, 60), True, 1 - 60 / 64),
        ("grouped", (64, 64, 4), True, 0),
        ("grouped", (64, 64, 8), False, 0),
        ("grouped", (64, 32, 4), False, 0),
        ("grouped", (32, 64, 4), False, 0),
        ("dense", (16, 8, 1), True, 0.5),
        ("dense", (15, 16, 1), True, 0),
        ("dense", (18, 8, 1), False, 1 - 0.5 * 18 / 32),
    ],
)
def test_layers_and_the_step(kind, widths, aligned, wasted):
    layer = Layer("x", kind, *widths, taps=9)
    layout = Layout(16, 4, 4)
    assert layer.aligned(layout) is aligned
    assert layer.wasted(layout) == pytest.approx(wasted)


def test_reasons_are_told_in_words(tmp_path: Path):
    def model(name: str, width: int, gather: bool = False) -> Path:
        bench = Bench()
        x = bench.blocks(1, width, (8, 8))
        x = bench.conv(x, width, (3, 3), groups=width)
        if gather:
            order = bench.constant(__import__("numpy").arange(width))
            x = bench.node("Gather", [x, order], (1, width, 8, 8), axis=1)
        bench.use(x)
        (tmp_path / name).write_bytes(bench.model())
        return tmp_path / name

    good, bad = model("good", 64), model("bad", 62, gather=True)
    found = reasons(bad, good, Layout(16, 4, 4))
    assert "1 of 1 depthwise layers are no multiple of 4 wide" in found[0]
    assert any("moves channels 1 times more often" in line for line in found)
    assert reasons(good, good, Layout(16, 4, 4)) == []
    assert reasons(bad, good, Layout())[0].startswith("it moves channels")


def test_what_is_no_worse_than_before_is_no_reason(tmp_path: Path) -> None:
    def model(name: str, *convs: tuple[int, int, int], slices: int = 0) -> Path:
        bench = Bench()
        for inputs, outputs, groups in convs:
            made = bench.input(1, inputs, 8, 8)
            kernel = (1, 1) if (inputs, groups) == (36, 1) else (3, 3)
            bench.use(bench.conv(made, outputs, kernel, groups=groups), conv=False)
        for _ in range(slices):
            bench.use(bench.node("Transpose", [bench.input(1, 4)], (4, 1)), conv=False)
        (tmp_path / name).write_bytes(bench.model())
        return tmp_path / name

    layout = Layout(16, 4, 4)
    off = [(18, 16, 1), (18, 18, 18), (36, 36, 2), (36, 16, 1)]
    one, two = model("one", *off, slices=1), model("two", *off, *off, slices=3)
    assert reasons(one, two, layout) == reasons(one, one, layout) == []
    more = reasons(two, one, layout)
    assert [line.partition(",")[0] for line in more] == [
        "2 of 2 depthwise layers are no multiple of 4 wide",
        "2 of 2 dense convolutions are no multiple of 4 wide",
        "2 of 2 1x1 convolutions fall off the 16-channel step",
        "2 of 2 grouped layers are no multiple of 16 channels a group wide",
        "it moves channels 2 times more often (gather",
    ]
    alone = reasons(one, None, layout)
    assert [line.partition(" are")[0].partition(" fall")[0] for line in alone] == [
        "1 of 1 depthwise layers", "1 of 1 dense convolutions", "1 of 1 1x1 convolutions",
        "1 of 1 grouped layers",
    ]  # fmt: skip
    assert reasons(two, one, Layout()) == [
        "it moves channels 2 times more often (gather, slice, concat ...)"
    ]
    full = model("full", (16, 61, 1), (16, 60, 1))  # 3 of 64 channels fill a block, and 4
    assert reasons(full, None, layout)[0].startswith("1 of 2 dense convolutions fall off")


def test_the_shipped_table_is_json_of_one_line_a_grid():
    lines = costs.TABLES.file.read_text().splitlines()
    assert max(map(len, lines)) < 6000
    assert json.loads("\n".join(lines))["format"] == 1


# ---------------------------------------------------------------------- what a runtime is asked


def test_a_runtime_without_blocks_has_a_plain_layout(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calibrate, "optimized_ops", lambda model: ["FusedConv"])
    layout = calibrate.find_layout()
    assert (layout.block, layout.blocked) == (Layout().block, Layout().blocked)
    assert "relu" in layout.fused


def test_a_runtime_with_blocks_is_asked_which_operators_run_on_them(
    monkeypatch: pytest.MonkeyPatch,
):
    found = ["ReorderInput", "Conv", "Other", "ReorderOutput", "Concat"]
    monkeypatch.setattr(calibrate, "optimized_ops", lambda model: found)
    layout = calibrate.find_layout()
    assert layout.block == 16
    assert layout.fused == ()
    assert {*layout.blocked} == {*POINTWISE}


def test_the_time_of_a_run_is_the_time_and_not_how_much_it_was_slowed():
    class Still(Quiet):
        def runs(self, run: Any, wanted: int) -> list[tuple[float, float]]:
            run()
            return [(1.0, 9.0)] * wanted

    bench = Bench()
    bench.use(bench.conv(bench.input(1, 8, 4, 4), 8))
    assert calibrate.cpu_time(bench.model(), rounds=3, quiet=Still()) == 1.0


def test_a_concat_that_channels_pass_through_pays_for_no_change_of_layout():
    table = costs.TABLES.shipped()
    odd = Work("concat", "cat", inputs=20, outputs=20, space=(7, 7))  # 20 is no multiple of a block
    assert table.passing_seconds(odd) == table.seconds(odd, alone=True) < table.seconds(odd)
