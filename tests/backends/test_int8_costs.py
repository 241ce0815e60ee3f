"""The cost table of integers in ONNX Runtime: what ships, what is measured, and who asks it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import narrows
from narrows.backends import make_target
from narrows.backends.onnx import calibrate
from narrows.backends.onnx.int8 import costs, probes, spelled
from narrows.backends.onnx.int8.table import Int8Table
from narrows.backends.onnx.probes import Point
from narrows.cli.calibrate import _lowered
from narrows.errors import UsageError
from narrows.ir.costfiles import load_costs
from narrows.ir.work import Work

CONV = Work(
    "conv", "conv2d", inputs=64, outputs=64, kernel=(3, 3), stride=(1, 1), space=(28, 28),
    source=(28, 28),
)  # fmt: skip
DEEP = dataclasses.replace(CONV, kind="depthwise", groups=64)


# ---------------------------------------------------------------------- what ships


def test_the_shipped_table_knows_the_stairs():
    assert costs.TABLES.file.stat().st_size < 100_000
    table = costs.TABLES.shipped()
    assert table.runtime
    assert table.cpu in table.origin
    assert table.seconds(CONV.resized(outputs=100)) == table.seconds(CONV.resized(outputs=112))
    assert table.seconds(CONV.resized(inputs=63)) > 1.2 * table.seconds(CONV)
    assert table.seconds(CONV.resized(outputs=12)) > table.seconds(CONV.resized(outputs=16))
    assert table.seconds(DEEP.resized(outputs=60)) > table.seconds(DEEP)
    assert [table.fits(w) for w in (CONV, CONV.resized(inputs=63), DEEP.resized(outputs=60))] == [
        True, False, False,
    ]  # fmt: skip
    assert (table.step, table.least_step) == (16, 4)
    assert not table.fuses_sums
    assert table.fuses(Work("pointwise", "relu"))
    assert table.fused_seconds(Work("pointwise", "relu", outputs=64)) == 0.0


def test_activations_that_are_spelled_out_cost_more_than_in_floats():
    table, floats = costs.TABLES.shipped(), make_target("onnx").costs()
    assert isinstance(floats, narrows.ir.costs.Costs)
    silu = Work("pointwise", "silu", outputs=64, inputs=64, space=(28, 28))
    assert table.seconds(silu) > table.seconds(dataclasses.replace(silu, op="relu"))
    norm = Work("norm", "layer_norm", outputs=64, inputs=64, space=(197,))
    assert table.seconds(norm) > floats.seconds(norm)


def test_the_file_is_read_by_its_name():
    assert isinstance(load_costs(costs.TABLES.file), Int8Table)


# ---------------------------------------------------------------------- measuring


def test_layers_of_bytes_run_in_kernels_for_bytes():
    bench = probes.ByteBench()
    point = Point("blocked conv 3x3/1", (("positions", 64.0), ("inputs", 16.0), ("outputs", 16.0)))
    bench.use(bench.conv(bench.blocks(1, 16, (8, 8)), 16, (3, 3), tag=bench.tag(point)))
    probes.linear(bench, point, 4, 16, 16)
    probes.matmul(bench, point, 4, 16, 16)
    ops = calibrate.optimized_ops(bench.model())
    assert {"QLinearConv", "QGemm", "QLinearMatMul"} <= set(ops)
    assert not {"Conv", "Gemm", "MatMul", "QuantizeLinear"} & set(ops)


def test_every_probe_has_the_form_that_the_table_asks_for():
    table = costs.TABLES.shipped()
    for job in probes.jobs(quick=True):
        bench = probes.ByteBench()
        job.add(bench)
        (point,) = bench.probes
        form, _, window = point.grid.partition(" ")
        kind, _, window = window.partition(" ")
        if form not in ("blocked", "narrow", "plain"):
            continue
        sizes = dict(point.sizes)
        made = int(sizes["outputs"])
        groups = made if kind == "depthwise" else 1
        side = round(sizes["positions"] ** 0.5)
        work = dataclasses.replace(
            CONV, kind=kind, inputs=int(sizes.get("inputs", made)), outputs=made, groups=groups,
            space=(side, side),
        )  # fmt: skip
        assert table.form(work) == form


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A calibration of one network and one graph of probes, in a cache of its own."""
    monkeypatch.setenv("NARROWS_CACHE", str(tmp_path / "cache"))
    jobs = probes._conv("blocked", "conv", 7, 16, 16, 1, 1)
    first = list(jobs)
    monkeypatch.setattr(probes, "jobs", lambda quick: iter(first))
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Conv2d(8, 4, 1)).eval()
    monkeypatch.setattr(spelled, "networks", lambda quick: [(network, torch.randn(1, 3, 7, 7))])


def capture(network: Any, inputs: Any) -> Any:
    return narrows.capture(network, inputs)


def test_a_calibration_measures_and_fills_the_rest(tiny: None):
    table, complete = costs.calibrate(capture=capture, lower=_lowered, quick=True)
    assert complete
    assert (table.name, table.runtime) == ("onnxruntime-int8", costs.TABLES.version())
    assert table.grids.keys() == costs.TABLES.shipped().grids.keys()
    costs.TABLES.keep(table)
    assert make_target("onnx").integer_costs().made == table.made  # type: ignore[union-attr]
    assert make_target("onnx").costs().made != table.made  # type: ignore[union-attr]


def test_an_operator_takes_what_its_nodes_take(tiny: None):
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Conv2d(8, 4, 1), nn.ReLU()).eval()
    program = narrows.capture(network, torch.randn(2, 3, 7, 7))
    table, complete = costs.measure_program(costs.TABLES.shipped(), program, lower=_lowered)
    assert complete
    by_op = {work.op: seconds for work, seconds in table.works.items()}
    assert by_op.keys() == {"conv2d", "silu", "relu"}
    assert by_op["relu"] == pytest.approx(calibrate.LEAST * 1e-6)  # in the layer before it
    # Dequantized, a sigmoid, a product, quantized.
    assert by_op["silu"] > 3 * by_op["relu"]


# ---------------------------------------------------------------------- who asks it


def test_only_what_is_quantized_next_goes_by_it(monkeypatch: pytest.MonkeyPatch):
    network = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 20, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    program = narrows.capture(network, x)
    plan = narrows.plan(program, None, {"0.weight": tuple(range(17))}, zeros=False)

    def origin(**how: Any) -> list[str]:
        made = narrows.apply(program, plan, **how)
        return [n.message for n in made.notes if n.reason == "costs"]

    (floats,) = origin(target="onnx")
    (integers,) = origin(target="onnx", integers=True)
    assert "onnxruntime-int8" in integers
    assert "onnxruntime-int8" not in floats
    assert origin() == []
    with pytest.raises(UsageError, match="integers would have no effect without a target"):
        narrows.apply(program, plan, integers=True)
    artifact = narrows.compile(network, x, plan, quantize=[x], check=False)
    assert integers in [note["message"] for note in artifact.notes]


def test_a_latency_in_integers_is_one_of_the_unpruned_program_in_integers():
    network = nn.Sequential(
        nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Conv2d(48, 64, 3), nn.ReLU(), nn.Conv2d(64, 20, 3)
    ).eval()
    x = torch.randn(2, 3, 16, 16)
    program = narrows.capture(network, x)
    plan = narrows.plan(program, latency=0.7, target="onnx", integers=True)
    table = costs.TABLES.shipped()
    small, whole = (
        sum(seconds for _, seconds in table.predict(made, 1))
        for made in (narrows.apply(program, plan, target="onnx", integers=True), program)
    )
    assert 0.5 < small / whole <= 0.7
    (note,) = [n.message for n in plan.notes if n.reason == "latency"]
    assert "onnxruntime-int8" in note
    with pytest.raises(UsageError, match="integers would have no effect without a target"):
        narrows.plan(program, macs=0.7, integers=True)


def test_compressing_to_bits_aims_at_their_latency():
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 48, 3), nn.ReLU(), nn.Conv2d(48, 10, 3)
    ).eval()
    x = torch.randn(16, 3, 12, 12)

    def told(bits: int | None) -> str:
        made = narrows.compress(network, (x[:2],), data=[x], latency=0.8, bits=bits, check=False)
        (message,) = [note["message"] for note in made.notes if note["reason"] == "latency"]
        return message

    assert "onnxruntime-int8" in told(8)
    assert "onnxruntime-int8" not in told(None)
