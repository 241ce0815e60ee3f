"""What quantization costs: numbers measured once more by hand, culprits, and a page that parses."""

from __future__ import annotations

import json
import math
import re
import xml.dom.minidom
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import narrows
from narrows.errors import ArtifactError, NarrowsError, PassError, ProgramError, UsageError
from narrows.ir.graph import Run
from narrows.ir.program import Program
from narrows.passes.quant.figures import Measured
from narrows.passes.quant.quantization import Quantized
from narrows.passes.quant.report import QuantReport
from tests.builder import Builder, aten, ramp
from tests.passes.test_quantize import captured, images, network

ops: Any = torch.ops.narrows


@pytest.fixture(scope="module")
def quantized() -> Quantized:
    bits = {"head": 2, "*": 8}
    return narrows.quantize(captured(), [images(4, 3, 8, 8)], weights=bits, first_last=None)


@pytest.fixture(scope="module")
def report(quantized: Quantized) -> QuantReport:
    data = images(7, 3, 8, 8)
    return quantized.report(iter([data[:4], (data[4:],)]), samples=5)


def decibels(x: Tensor, got: Tensor) -> float:
    signal, noise = x.double().square().sum(), (got - x).double().square().sum()
    return 10 * math.log10(signal / noise)


def tensor(report: QuantReport, name: str) -> Measured:
    (found,) = (t for t in report.tensors if t.name == name)
    return found


# ------------------------------------------------------------------ the numbers


def test_every_quantizer_is_measured(quantized: Quantized, report: QuantReport) -> None:
    plan = quantized.plan
    assert {t.name for t in report.tensors} == {*plan.weights, *plan.activations}
    assert report.samples == 7
    assert report.switched == 5  # the second batch was cut
    assert report.before == 4 * sum(t.numel() for t in quantized.prepared.weights.values())
    assert report.after == sum(t.nbytes for t in quantized.program.weights.values())
    assert all(t.gain is not None for t in report.tensors)
    names = [t.name for t in report.tensors]
    assert names.index("body.weight") < names.index("gate.weight") < names.index("head")


def test_an_activation_is_measured_on_its_grid(quantized: Quantized, report: QuantReport) -> None:
    seen: dict[str, Tensor] = {}
    for program in (quantized.prepared, quantized.fake):
        program.run_flat(
            [images(7, 3, 8, 8)], observe=lambda n, v: seen.__setitem__(n.name, v.detach())
        )
        x = seen.setdefault("exact", seen["gate"])  # the float program's, run first
    got, grid = tensor(report, "gate"), quantized.plan.activations["gate"]
    low, high = (grid.low - grid.zero) * grid.scale, (grid.high - grid.zero) * grid.scale
    alone = ((x / grid.scale).round() * grid.scale).clamp(low, high)
    beyond = (x > high + grid.scale / 2) | (x < low - grid.scale / 2)
    assert got.sqnr == pytest.approx(decibels(x, alone))
    assert got.along == pytest.approx(decibels(x, seen["gate_q"]))
    assert got.along < got.sqnr
    assert (got.low, got.high) == pytest.approx((float(x.min()), float(x.max())))
    assert got.rms == pytest.approx(float(x.square().mean().sqrt()))
    assert got.clipped == float(beyond.float().mean())
    inside = ((alone - x) * ~beyond).square().mean().sqrt()
    assert got.rounding == pytest.approx(float(inside))
    assert got.source.partition(":")[0].endswith("test_quantize.py")


def test_clipping_is_told_from_rounding() -> None:
    b = Builder((1, 1, 2, 4))
    program = b.program(b.relu(b.inputs[0]))
    quantized = narrows.quantize(program, [torch.full((1, 1, 2, 4), 255.0)], method="minmax")
    x = torch.tensor([0.0, 3.25, 255.4, 258.0, 0.0, 0.0, 0.0, 0.0]).reshape(1, 1, 2, 4)
    got = tensor(quantized.report([x]), program.placeholders[0].name)
    assert got.grid == "2^0"
    assert got.clipped == 1 / 8
    assert got.clipping == pytest.approx(3 / math.sqrt(8))
    assert got.rounding == pytest.approx(math.hypot(0.25, 0.4) / math.sqrt(8), rel=1e-4)


def test_a_weight_is_measured_on_its_grid(quantized: Quantized, report: QuantReport) -> None:
    got, grid = tensor(report, "head.weight"), quantized.plan.weights["head.weight"]
    x = quantized.prepared.weights["head.weight"]
    scale = torch.tensor([2.0**-e for e in grid.exponents]).view(-1, 1)
    assert got.sqnr == pytest.approx(decibels(x, (x / scale).round().clamp(-1, 1) * scale))
    assert got.along is None
    assert got.bits == 2


def test_the_outputs_ratio(quantized: Quantized, report: QuantReport) -> None:
    x = images(7, 3, 8, 8)
    assert report.sqnr == pytest.approx(decibels(quantized.prepared(x), quantized.fake(x)))
    assert tensor(report, "head").along == pytest.approx(report.sqnr)


# ------------------------------------------------------------------ culprits


def switched_off(quantized: Quantized, name: str) -> Program:
    """Return the fake-quantized program with what rounds a tensor, or a weight, taken out."""
    program = quantized.fake.copy()
    for node in list(program.graph.nodes):
        if node.target is ops.fake_quantize.default and node.args[0].name == name:
            node.replace_all_uses_with(node.args[0])
        if node.target is ops.fake_quantize_weight.default and node.args[0].target == name:
            node.replace_all_uses_with(node.args[0])
    bias = name.replace("weight", "bias")
    if name in quantized.plan.offsets:  # no rounding, no mean error to correct
        program.weights[bias] = quantized.prepared.weights[bias]
    return program


@pytest.mark.parametrize("name", ["x", "relu6", "add", "cat", "first.weight", "head.weight"])
def test_gains_are_those_of_a_program_without_the_quantizer(
    quantized: Quantized, report: QuantReport, name: str
) -> None:
    x = images(7, 3, 8, 8)[:5]
    parts = [x[:4], x[4:]]
    exact = torch.cat([quantized.prepared(p) for p in parts])
    whole = decibels(exact, torch.cat([quantized.fake(p) for p in parts]))
    program = switched_off(quantized, name)
    without = decibels(exact, torch.cat([program(p) for p in parts]))
    assert tensor(report, name).gain == pytest.approx(without - whole, abs=1e-6)
    assert without != whole


def test_the_coarse_layer_is_the_culprit(report: QuantReport) -> None:
    assert report.culprits[0].name == "head.weight"
    assert report.culprits[0].gain > 3 * report.culprits[1].gain > 0


def test_a_run_branches_off_without_touching_the_first() -> None:
    b = Builder((2, 3))
    (x,) = b.inputs
    y = b.call(aten.add.Tensor, x, x, name="y")
    z = b.call(aten.mul.Tensor, y, x, name="z")
    program = b.program(b.call(aten.add.Tensor, z, y))
    given = ramp(2, 3)
    called: list[str] = []

    def call(node: Any, args: Any, kwargs: Any) -> Any:
        called.append(node.name)
        return node.target(*args, **kwargs)

    base = Run(program.graph, [given], program.weights, call=call)
    assert torch.equal(base.to(program.node("y")), 2 * given)
    base.before(program.node("z"))
    other = base.branch({program.node("y"): torch.zeros(2, 3), program.node("z"): given})
    (changed,) = other.finish()
    assert called == ["y", "add_tensor"]
    assert torch.equal(changed, given)
    assert torch.equal(base.finish()[0], program(given))


# ------------------------------------------------------------------ as files


def test_a_report_is_three_files(report: QuantReport, tmp_path: Path) -> None:
    folder = report.save(tmp_path / "out" / "report")
    assert {p.name for p in folder.iterdir()} == {"report.txt", "report.json", "report.html"}
    assert (folder / "report.txt").read_text() == str(report)
    page = (folder / "report.html").read_text()
    xml.dom.minidom.parseString(page)
    assert "<script" not in page
    bars = [float(w) for w in re.findall(r'class="two" x="0" y="3" width="([0-9.]+)"', page)]
    assert bars[0] == max(bars) == 260 > min(bars)  # the costliest has the longest
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    data = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    assert data["culprits"][0] == "head.weight"
    for t in report.tensors:
        assert page.count(f"<title>{t.name} (") >= 1
        assert t.name in str(report)
    assert report.save(folder) == folder  # again, over the first


def test_names_are_escaped(report: QuantReport) -> None:
    from dataclasses import replace

    from narrows.passes.quant.page import page

    odd = replace(report, name="<b>&", floats={"<i>": 'it has "<'})
    xml.dom.minidom.parseString(page(odd))
    assert "<b>&" not in page(odd)


def test_nothing_lost_is_exact(tmp_path: Path) -> None:
    b = Builder((1, 1, 2, 4))
    program = b.program(b.relu(b.inputs[0]))
    x = torch.arange(8.0).reshape(1, 1, 2, 4)
    made = narrows.quantize(program, [255 * x / 7], method="minmax").report([x])
    assert made.sqnr == math.inf
    assert "outputs exact" in str(made)
    assert "stays floating-point: nothing" in str(made)
    data = json.loads((made.save(tmp_path) / "report.json").read_text(), parse_constant=pytest.fail)
    assert data["sqnr"] is None
    assert {t["gain"] for t in data["tensors"]} == {0.0}


def test_islands_are_told_with_reasons() -> None:
    program, inputs = network("cumsum_space")
    made = narrows.quantize(program, [inputs]).report([inputs], samples=0)
    assert made.culprits == []
    assert made.switched == 0
    (reason,) = made.floats.values()
    assert reason.startswith("cumsum.default has no integer form  (")
    assert ".py:" in reason
    assert reason in str(made).split("stays floating-point:")[1]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"data": []}, UsageError, "there is no data"),
        ({"data": [3]}, UsageError, "the data holds a int"),
        ({"data": [images(1, 3, 8, 7)]}, ProgramError, "has shape"),
        ({"data": [images(1, 3, 8, 8) / 0]}, PassError, "NaN or infinity"),
        ({"data": [images(1, 3, 8, 8).log()]}, PassError, "NaN or infinity\n  at x\n"),
        ({"data": [images(1, 3, 8, 8)], "samples": -1}, UsageError, "samples counts from 0"),
    ],
)
def test_what_cannot_be_measured(
    quantized: Quantized, options: dict[str, Any], error: type[NarrowsError], text: str
) -> None:
    with pytest.raises(error, match=text):
        quantized.report(**options)


def test_where_nothing_can_be_written(report: QuantReport, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="cannot write the report"):
        report.save(tmp_path / "file")
    (tmp_path / "report.json").mkdir()
    with pytest.raises(ArtifactError, match="cannot write"):
        report.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
