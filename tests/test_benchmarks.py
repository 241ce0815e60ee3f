"""The benchmark of masks in all their forms, on a network that takes no time."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import narrows
from benchmarks import latency_plan
from benchmarks.reorder.bound import load_table
from benchmarks.reorder.case import Case, drawn, maskable, strongest
from benchmarks.reorder.copies import introduced
from benchmarks.reorder.forms import FORMS, STEP, Source, common, plain, tidied, unpruned
from benchmarks.reorder.gathers import gathered, slice_gathers, sliced
from benchmarks.reorder.goals import goals
from benchmarks.reorder.prepare import MODEL, RUNTIMES, Shelf, make, open_onnx
from benchmarks.reorder.ratios import EXACT, against_best, relative
from benchmarks.reorder.report import EXACT_DOUBLE, report
from benchmarks.reorder.timing import time_forms
from narrows.ir.program import Program
from narrows.ir.verify import verify
from tests.networks.registry import conv_bn, randomise

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own


class Residual(nn.Module):
    """Three convolutions that read the same residual stream, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 40)
        self.first = conv_bn(40, 40)
        self.second = conv_bn(40, 40)
        self.third = conv_bn(40, 8)
        self.head = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.first(x))
        x = torch.relu(x + self.second(x))
        return self.head(self.third(x).mean((2, 3)))


@dataclasses.dataclass(frozen=True)
class Small(Case):
    """A case of a network that the zoo does not have."""

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        module = Residual()
        randomise(module, 0, self.inputs(4))
        return module

    def inputs(self, batch: int, seed: int = 1) -> tuple[Tensor, ...]:
        return (torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed)),)


CASE = Small("resnet18", 0.7, size=8)


@pytest.fixture(scope="module")
def source() -> Source:
    module = CASE.build()
    return Source(narrows.capture(module, CASE.inputs(2)), CASE.keep(module))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("forms")
    shelf = Shelf(folder / "kept", folder / "passing")
    forms = make(CASE, list(FORMS), RUNTIMES, "", shelf)
    folders = {name: shelf.folder(CASE, name) for name in forms}
    latency = {
        f"{runtime}-{batch}": time_forms(CASE, folders, runtime, batch, 2, 1.0)
        for runtime in RUNTIMES
        for batch in (1, 3)
    }
    return {
        "model": CASE.model, "amount": CASE.amount, "forms": forms, "latency": latency,
        "shelf": shelf,
    }  # fmt: skip


def test_masks_take_what_matters_least() -> None:
    weights = {"w": torch.tensor([3.0, 1.0, 2.0, 4.0]).view(1, 4, 1, 1).expand(2, 4, 1, 1)}
    assert strongest(weights, 0.5) == {"w": (0, 3)}
    assert len(drawn(weights, 0.3)["w"]) == 3
    assert drawn(weights, 0.3) == drawn(weights, 0.3)


def test_images_and_classifiers_get_no_mask() -> None:
    assert set(maskable(CASE.build(), CASE.inputs(1))) == {
        f"{name}.0.weight" for name in ("first", "second", "third")
    }


def test_every_form_is_exact(result: dict[str, Any]) -> None:
    for name, facts in result["forms"].items():
        assert "failure" not in facts, (name, facts)
        for runtime in RUNTIMES:
            error = facts[runtime].get("error", 0.0)
            assert error <= EXACT, (name, runtime)
    assert result["forms"]["narrows"]["float64"] <= EXACT_DOUBLE


def test_a_wrong_form_is_seen(source: Source, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(FORMS, "narrows", unpruned)
    facts = make(CASE, ["narrows"], ["eager"], "", Shelf(tmp_path, tmp_path))["narrows"]
    assert facts["eager"]["error"] > EXACT
    assert facts["float64"] > EXACT_DOUBLE


def test_a_failing_form_is_a_line(monkeypatch: Any, tmp_path: Path) -> None:
    def broken(source: Source, runtime: str) -> Program:
        raise ValueError("no\nway")

    monkeypatch.setitem(FORMS, "narrows", broken)
    facts = make(CASE, ["narrows"], ["eager"], "", Shelf(tmp_path, tmp_path))["narrows"]
    assert facts["failure"] == "ValueError: no way"


def test_the_common_mask_needs_no_copies(source: Source) -> None:
    program = common(source, "onnx")
    assert introduced(program, source.program)[0] == 0
    assert introduced(plain(source, "onnx"), source.program)[0] > 0
    live = len(set().union(*CASE.keep(CASE.build()).values()))
    assert STEP < live < 2 * STEP  # of 40
    widths = {t.shape[1] for t in program.weights.values() if t.dim() == 4}
    assert widths == {3, 2 * STEP}


def test_forms_that_do_not_change_are_kept(result: dict[str, Any]) -> None:
    shelf = result["shelf"]
    assert shelf.facts(CASE, "common-16") == result["forms"]["common-16"]
    assert shelf.facts(CASE, "narrows") is None
    assert dataclasses.replace(shelf, redo=("common-16",)).facts(CASE, "common-16") is None


def test_latency_is_taken_of_all_forms(result: dict[str, Any]) -> None:
    for key, timing in result["latency"].items():
        assert not timing["failures"], key
        assert relative(result, key, "unpruned") == 1
        assert all(relative(result, key, form) for form in FORMS)


def test_the_report_has_every_goal_that_was_measured(result: dict[str, Any]) -> None:
    text = report([result])
    assert "eager torch, batch 3" in text
    assert "goal 1 at 0.7" in text
    assert "goal 2" not in text  # apple-upscale did not run
    assert ("most lost at" in text) == (load_table("onnx") is not None)
    json.dumps({k: v for k, v in result.items() if k != "shelf"})


def test_goals_compare_with_the_faster_export() -> None:
    rounds = {
        "unpruned": [10.0, 20.0], "narrows": [6.0, 12.0], "upscale-default": [9.0, 18.0],
        "upscale-narrow": [8.0, 16.0],
    }  # fmt: skip
    known = {"onnx": {"macs": 1, "copies": 0, "bytes": 0, "error": 0.0}, "seconds": 0.5}
    made = {
        "model": "resnet18", "amount": 0.3, "forms": {form: known for form in rounds},
        "latency": {"onnx-1": {"rounds": rounds}},
    }  # fmt: skip
    assert against_best(made, "onnx-1", ["upscale-default", "upscale-narrow"]) == (
        0.75,
        "upscale-narrow",
    )
    lines = goals([made], 0.3)
    assert "geomean 0.750 of apple-upscale's" in lines[1]
    assert lines[1].endswith("(goal 0.75): met")
    wrong = {**known, "onnx": {**known["onnx"], "error": 1.0}}
    made["forms"] = {**made["forms"], "upscale-narrow": wrong}  # a wrong form is no rival
    assert against_best(made, "onnx-1", ["upscale-default", "upscale-narrow"]) == (
        pytest.approx(2 / 3),
        "upscale-default",
    )


def test_a_plan_for_a_latency_is_written_down_and_weighed(tmp_path: Path) -> None:
    made = latency_plan.make_plan(CASE, 0.9, Shelf(tmp_path, tmp_path))
    assert made["predicted"] <= 0.9
    assert made["error"] <= EXACT
    assert (
        latency_plan.folder_of(CASE, latency_plan.OURS, Shelf(tmp_path, tmp_path)) / MODEL
    ).exists()
    for theirs, ours in made["mass"].values():
        assert 0 < theirs < ours < 1
    timing = {"measured": 0.9, "against": 1.0, "quartiles": None}
    known = {"model": "small", "upscale": 0.9, "asked": 0.9, **timing, **made}
    slow = {"model": "slow", "upscale": 1.1}
    text = latency_plan.report([known, slow])
    assert "slow: apple-upscale's export is not faster than unpruned" in text
    assert "of 1 (goal 1.15)" in text


def test_a_plan_that_comes_out_slower_is_tightened(monkeypatch: Any, tmp_path: Path) -> None:
    asked = []

    def made(_: Any, case: Case, share: float, shelf: Shelf, limit: float) -> dict[str, Any]:
        asked.append(share)
        return {"predicted": share, "error": 0.0}

    def timed(case: Case, names: list[str], *_: Any) -> Any:
        seconds = {"unpruned": 1.0, "upscale-default": 0.8, "upscale-narrow": 0.9}
        ours = 0.88 if len(asked) < 2 else 0.8
        return {"rounds": {n: [seconds.get(n, ours)] * 3 for n in names}}

    forms = {form: {"onnx": {}} for form in ("unpruned", "upscale-default", "upscale-narrow")}
    monkeypatch.setattr(latency_plan, "prepare", lambda *_: forms)
    monkeypatch.setattr(latency_plan, "apart", made)
    monkeypatch.setattr(latency_plan, "timed", timed)
    options = latency_plan.parse([])
    result = latency_plan.measure(CASE, options, Shelf(tmp_path, tmp_path))
    assert asked == pytest.approx([0.8, 0.8 / 1.1])
    assert result["tightened"]
    assert result["export"] == "upscale-default"
    assert "asked for 0.727" in latency_plan.remark(result)


def test_a_selection_is_a_gather_or_slices(tmp_path: Path) -> None:
    class Picks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, [0, 1, 2, 5, 7, 6]].relu()

    x = torch.randn(2, 8, 3, 3)
    program = narrows.capture(Picks().eval(), (x,))
    one = gathered(program)
    parts = tidied(sliced(one))
    for changed in (one, parts):
        verify(changed)
        assert torch.equal(changed(x), x[:, [0, 1, 2, 5, 7, 6]].relu())
    assert introduced(parts, program)[2] == {"slice": 4, "cat": 1}
    artifact = narrows.lower(one, "onnx")  # its folder goes with it
    shutil.copyfile(artifact.folder / MODEL, tmp_path / MODEL)
    slice_gathers(tmp_path / MODEL)
    kinds = [node.op_type for node in onnx.load(tmp_path / MODEL).graph.node]
    assert kinds == ["Slice"] * 4 + ["Concat", "Relu"]
    assert torch.equal(open_onnx(tmp_path)(x)[0], one(x))


def test_apple_upscale_gets_the_same_masks(tmp_path: Path) -> None:
    pytest.importorskip("upscale", reason="apple-upscale is not installed")
    from benchmarks.reorder.peers import UPSCALE, make_upscale

    found = make_upscale(CASE, UPSCALE, Shelf(tmp_path, tmp_path))
    for name in UPSCALE:
        assert found[name]["onnx"]["error"] <= EXACT
        assert found[name]["seconds"] > 0


def test_torch_pruning_meets_the_macs(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    from benchmarks.reorder.peers import count_macs, make_torch_pruning

    whole = count_macs(CASE.build(), CASE.inputs(1))
    facts = make_torch_pruning(
        CASE, ["torch-pruning"], round(0.6 * whole), Shelf(tmp_path, tmp_path)
    )["torch-pruning"]
    assert 0.5 < facts["onnx"]["macs"] / whole < 0.7
    assert 0 < facts["ratio"] < 1
