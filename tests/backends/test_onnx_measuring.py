"""How a cost table of ONNX Runtime is measured: with a made-up runtime, and made-up times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from narrows.backends.measured.layout import Layout
from narrows.backends.onnx import calibrate, costs, sweep
from narrows.backends.onnx.probes import POINTWISE, Point
from narrows.backends.onnx.steady import Quiet


def test_a_graph_of_probes_is_full_at_the_number_and_at_the_bytes() -> None:
    def job(weight: int) -> sweep.Job:
        return sweep.Job((1,), weight, lambda bench: None)

    half = calibrate.LARGEST // 2
    for weights, sizes in {
        (half, half): [2], (half, half, 1): [2, 1], (half, half + 1, half - 1): [1, 2],
        (calibrate.LARGEST + 1, 1): [1, 1], (half, half, half, half): [2, 2],
        (1,) * calibrate.MOST: [calibrate.MOST],
    }.items():  # fmt: skip
        assert [len(group) for group in calibrate.pack(map(job, weights))] == sizes
    assert list(calibrate.pack([])) == []


def test_a_sweep_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [[sweep.Job((room,), 1, lambda bench: None)] for room in range(3)]
    told: list[Any] = []
    monkeypatch.setattr(calibrate, "jobs", lambda layout, quick: [j for (j,) in groups])
    monkeypatch.setattr(calibrate, "measure", lambda group, *how: {"n": {group[0].room: how}})
    quiet: Any = "quiet"
    asked = {"quick": True, "rounds": 5, "bias": 0.5, "quiet": quiet}
    found = list(calibrate.sweep(Layout(), **asked, tell=lambda *of: told.append(of)))
    assert found == [{"n": {(room,): (5, 0.5, quiet)}} for room in range(3)]
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_times_of_probes_are_put_into_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less what profiling adds, less another probe's, by the share; reorders by their elements."""

    def job(point: Any) -> sweep.Job:
        def add(bench: Any) -> None:
            bench.tag(point)
            bench.use(bench.input(1, 4), conv=False)

        return sweep.Job((0,), 0, add)

    def node(name: str, op: str, *us: float, read: Any = (), made: Any = ()) -> calibrate.Node:
        return calibrate.Node(name, op, [list(read)], [list(made)], list(us))

    points = [
        Point("one", (("positions", 4), ("inputs", 7))), Point("two", (("outputs", 3),), share=2),
        Point("two", (("outputs", 5),), minus=1), Point("two", (("outputs", 6),), minus=1),
        "no point", Point("none", (("outputs", 1),)),
    ]  # fmt: skip
    nodes = [
        node("probe0_v1", "Conv", 9.0, 5.0, 5.0, 70.0), node("probe0_v2", "Relu", 1.2),
        node("n_probe1_v1", "Conv", 21.0), node("probe2_v4", "Add", 31.0),
        node("probe3_v4", "Add", 11.0), node("probe4_v1", "Conv", 3.0), node("nv9", "Conv", 99.0),
        node("probe0_r", "ReorderInput", 3.0, read=(1, 3, 4, 4), made=(1, 16, 4, 4)),
        node("r1", "ReorderInput", 5.0, made=(1, 16, 4, 4)),
        node("r2", "ReorderInput", 9.0, made=(1, 16, 4, 4)),
        node("r3", "ReorderOutput", 1.0, read=(2, 16, 4, 4), made=(2, 12, 4, 4)),
    ]  # fmt: skip
    monkeypatch.setattr(calibrate, "profile", lambda model, **how: nodes)
    times = calibrate.measure([job(p) for p in points], 3, 1.0, None)  # type: ignore[arg-type]
    least = calibrate.LEAST
    assert {name: dict(of) for name, of in times.items()} == {
        "one": {(4, 7): pytest.approx(4.0 + 0.2)},
        "two": {(3,): 10.0, (5,): 10.0, (6,): least},
        "reorder in": {(256.0,): 3.0}, "reorder out": {(512.0,): least},
    }  # fmt: skip


def test_a_profile_counts_the_undisturbed_runs_of_every_kernel() -> None:
    def event(name: str, dur: float, cat: str = "Node", **args: Any) -> dict[str, Any]:
        return {"cat": cat, "name": name, "dur": dur, "args": {"op_name": "Conv", **args}}

    shapes = {"input_type_shape": [{"float": [1, 2]}, {"int64": []}],
              "output_type_shape": [{"float": [3]}]}  # fmt: skip
    events = [event("a_kernel_time", 9.0, **shapes), event("a_kernel_time", 1.0, "Session")]
    events += [event("a_fence_before", 1.0), event("b_kernel_time", 5.0)]
    events += [event("a_kernel_time", d) for d in (2.0, 3.0, 4.0)]
    first, second = calibrate._nodes(events, {1, 3})
    assert first == calibrate.Node("a", "Conv", [[1, 2], []], [[3]], [2.0, 4.0])
    assert (second.name, second.inputs, second.us) == ("b", [], [])


@pytest.mark.parametrize(
    ("values", "mean"), [([3.0], 3.0), ([9.0, 1.0], 1.0), ([5.0, 1.0, 2.0], 1.5), ([4.0] * 4, 4.0)]
)
def test_the_quicker_half_of_the_runs_counts(values: list[float], mean: float) -> None:
    assert calibrate.quick_half(values) == mean


@pytest.mark.parametrize(
    ("one", "other", "agreed"), [(4.0, 5.0, 4.5), (5.0, 4.0, 4.5), (4.0, 5.1, 4.0), (2.0, 2.0, 2.0)]
)
def test_two_measurements_that_disagree(one: float, other: float, agreed: float) -> None:
    assert costs.agreed(one, other) == agreed


@pytest.mark.parametrize("quick", [True, False])
def test_a_calibration_goes_through_all_sizes(
    quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, unless it is quick; what is left out then comes from the table that there is."""
    monkeypatch.setenv("NARROWS_CACHE", str(tmp_path / "cache"))
    asked: list[Any] = []

    def swept(layout: Layout, *, tell: Any, quiet: Quiet, **how: Any) -> Any:
        asked.append(how)
        for done in range(2):
            tell(done, 2)
        yield {"linear": {(1.0, 4.0, 8.0): 2.0 if len(asked) == 1 else 2.4}}

    monkeypatch.setattr(calibrate, "find_layout", lambda: costs.TABLES.shipped().layout)
    monkeypatch.setattr(calibrate, "find_overhead", lambda quiet: (0.5, 0.25))
    monkeypatch.setattr(calibrate, "sweep", swept)
    monkeypatch.setattr("narrows.backends.onnx.steady.EVICTED", 16)
    told: list[Any] = []
    table, complete = costs.calibrate(quick=quick, tell=lambda *of: told.append(of))
    assert complete
    assert asked == [{"quick": quick, "rounds": 6 if quick else 8, "bias": 0.25}] * (2 - quick)
    assert told == ([(0, 2), (1, 2)] if quick else [(0, 4), (1, 4), (2, 4), (3, 4)])
    assert (len(table.grids) > 1) == quick
    assert table.overhead == 0.5e-6
    if not quick:
        assert table.grids["linear"].us.ravel()[0] == pytest.approx(2.2)
    assert table.made.startswith("quick cal" if quick else "full cal")


@pytest.mark.parametrize(
    ("block", "align"), [(8, 1), (8, 2), (16, 4), (32, 8), (16, 16), (16, 0), (64, 4)]
)
def test_blocks_and_what_fits_them_are_found(
    block: int, align: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that joins whole blocks, and whose widths on blocks are multiples of a number."""

    def optimized(model: bytes) -> list[str]:
        graph = onnx.load_model_from_string(model).graph
        weights = {w.name: w.dims for w in graph.initializer}
        convs = [weights[n.input[1]] for n in graph.node if n.op_type == "Conv"]
        kinds = [n.op_type for n in graph.node]
        if "Concat" in kinds:
            whole = convs[0][0] % block == 0
            return ["ReorderInput", "Conv", *["ReorderOutput"] * (not whole), "Concat", "Conv"]
        off = any(3 in w and w[1] % (align or 1000) for w in convs)
        between = {"Relu": [], "Clip": ["ReorderOutput"], "Tanh": ["Tanh"]}
        others = [k for k in kinds if k not in ("Conv", "Relu")]
        told = between.get((others or ["Relu"])[0], ["ReorderOutput", "Some", "ReorderInput"])
        return ["ReorderInput", *(["FusedConv"] if off else ["Conv"]), *told, "Conv"]

    monkeypatch.setattr(calibrate, "optimized_ops", optimized)
    layout = calibrate.find_layout()
    found = block if block in (8, 16, 32) else 16
    assert (layout.block, layout.sets) == (found, 4)
    steps = [a for a in (1, 2, 4, 8) if align and (found + a) % align == 0]
    assert layout.align == (steps[0] if steps else found)
    assert layout.fused == ("relu", "relu6", "hardtanh")
    assert layout.blocked == tuple(op for op in POINTWISE if op not in ("relu", "tanh"))
