"""The OpenVINO backend: what it makes of a program, and what its check finds."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.backends import make_target, target_type
from narrows.backends.artifact import Artifact, load
from narrows.backends.compare import Case, Wanted
from narrows.backends.onnx import OnnxTarget
from narrows.backends.openvino import OpenvinoTarget, check, session, track
from narrows.errors import ArtifactError, LowerError, UsageError
from narrows.ir.program import Program

NEEDS = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None,
    reason="openvino is not installed: pip install 'narrows[openvino]'",
)


class Net(nn.Module):
    """Convolutions around a sum, as residual networks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.two, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (self.two(self.one(x).relu()) + x).relu()
        return self.head(x.mean((2, 3)))


def program() -> Program:
    torch.manual_seed(0)
    return narrows.capture(Net().eval(), (torch.randn(2, 3, 8, 8),))


def integers() -> Program:
    made = program()
    return narrows.quantize(made, list(made.examples)).program


# ---------------------------------------------------------------------- without OpenVINO


def test_it_is_a_target_with_the_options_of_onnx():
    assert target_type("openvino") is OpenvinoTarget
    assert make_target("openvino", opset=21).opset == 21  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="an opset from 18 to 25, got 11"):
        make_target("openvino", opset=11)


def test_what_it_needs_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "openvino" or None)
    assert OpenvinoTarget.available() == "it needs openvino: pip install openvino"
    (row,) = OpenvinoTarget.variants()
    assert (row.name, row.usable) == ("openvino", False)
    assert "openvino" in row.needs


def test_running_without_openvino_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(ArtifactError, match="runs in OpenVINO, which is not installed"):
        session.OpenvinoSession(Path("model.onnx"))


def by_hand(made: Program, monkeypatch: pytest.MonkeyPatch, change: Any) -> tuple[Artifact, Any]:
    """Return an artifact and the check of what a runtime would have given that changes outputs."""
    artifact = OnnxTarget(check=False).write(_pair(made)).artifact
    wanted = Wanted.of(made, (1, 2), 1)

    def run(module: str, fed: Sequence[Any], *_: str, **__: Any) -> list[list[np.ndarray]]:
        return [[change(made.run_flat([torch.from_numpy(a) for a in f.values()])[0])] for f in fed]

    monkeypatch.setattr(check, "run_apart", run)
    whole = any("narrows" in str(n.target) for n in made.nodes)
    return artifact, lambda: check.check(artifact, wanted, lambda: _pair(made), whole)


def _pair(made: Program) -> Any:
    from narrows.backends.base import Pair

    return Pair(made, made)


def test_equal_integers_are_said_to_be(monkeypatch: pytest.MonkeyPatch):
    _, run = by_hand(integers(), monkeypatch, lambda y: y.numpy())
    checked = run()
    assert not checked.remarks
    assert checked.fidelity["tolerance"] == 0.0
    assert [entry["error"] for entry in checked.fidelity["checked"]] == [0.0, 0.0]


def test_integers_that_differ_by_rounding_are_measured(monkeypatch: pytest.MonkeyPatch):
    made = integers()
    step = float(made.run_flat(list(made.examples))[0].unique().diff().min())
    artifact, run = by_hand(made, monkeypatch, lambda y: (y + step).numpy())
    checked = run()
    (remark,) = checked.remarks
    assert "100.0% differ" in remark
    assert 0 < checked.fidelity["checked"][0]["error"] <= checked.fidelity["tolerance"] < 0.5
    assert "golden" not in artifact.manifest


@pytest.mark.parametrize("integer", [False, True])
def test_an_output_that_is_another_is_refused(monkeypatch: pytest.MonkeyPatch, integer: bool):
    made = integers() if integer else program()
    _, run = by_hand(made, monkeypatch, lambda y: y.flip(1).numpy())
    with pytest.raises(LowerError, match=r"differs from the program by .* in OpenVINO"):
        run()


def test_indices_are_equal_or_wrong():
    codes = torch.tensor([3, 200], dtype=torch.uint8)
    assert check.code_error(np.array([4, 200], np.uint8), codes) == 1 / 200
    assert check.code_error(np.array([4, 200], np.int16), codes) == math.inf
    assert check.code_error(np.array([4]), torch.tensor([3])) == math.inf


def test_moved_codes_stay_in_their_range():
    made = integers()
    case = Case(None, list(made.examples), made.run_flat(list(made.examples)))
    first = check._moved(made, case)
    assert 0 < first < 0.5
    assert check._moved(made, case) == first


# ---------------------------------------------------------------------- in OpenVINO


@NEEDS
@pytest.mark.parametrize("integer", [False, True])
def test_the_file_is_that_of_onnx_and_runs_at_any_batch(tmp_path: Path, integer: bool):
    made = integers() if integer else program()
    artifact = narrows.lower(made, "openvino")
    assert artifact.manifest["files"] == narrows.lower(made, "onnx").manifest["files"]
    assert {entry["batch"] for entry in artifact.fidelity["checked"]} == {1, 2, 5}
    assert "openvino" in artifact.manifest["versions"]
    artifact.save(tmp_path / "out")
    x = torch.randn(3, 3, 8, 8)
    found, expected = load(tmp_path / "out").run(x, threads=1), made(x).numpy()
    limit = artifact.fidelity["tolerance"] * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=max(limit, 1e-6))


@NEEDS
def test_a_copy_that_it_would_compute_wrongly_is_not_written():
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = (nn.Conv2d(i, 8, 1) for i in (3, 3, 16))
            self.order = torch.randperm(16, generator=torch.Generator().manual_seed(0))

        def forward(self, x: Tensor) -> Tensor:
            both = torch.cat([self.one(x).relu(), self.two(x).relu()], 1)
            return self.head(both[:, self.order])

    made = narrows.capture(Turned().eval(), (torch.randn(2, 3, 8, 8),))
    assert narrows.lower(narrows.apply(made, target="openvino"), "openvino").fidelity


@NEEDS
def test_a_broken_file_is_told(tmp_path: Path):
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(ArtifactError, match=r"OpenVINO cannot load model\.onnx"):
        session.OpenvinoSession(tmp_path / "model.onnx")


# ---------------------------------------------------------------------- contests


def test_where_it_is_not_installed_forms_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenvinoTarget, "available", classmethod(lambda cls: "it needs openvino"))
    assert OpenvinoTarget().track() is None
    assert OpenvinoTarget().untimed == "OpenVINO does not run here: it needs openvino"


@NEEDS
@pytest.mark.parametrize("make", [program, integers])
def test_forms_are_timed_in_one_process_of_their_own(make: Any) -> None:
    place = OpenvinoTarget().track()
    assert place is not None
    with place as trial:
        both = [trial(make(), 1), trial(make(), 3)]
        assert all(0 <= one(2) < math.inf for one in both * 2)


@NEEDS
def test_what_openvino_refuses_is_said_and_others_run() -> None:
    with track.track(lambda program, batch: (b"no model", {})) as trial:
        with pytest.raises(LowerError, match=r"OpenVINO cannot load 1\.onnx"):
            trial(program(), 1)
        with pytest.raises(LowerError, match=r"OpenVINO cannot load 2\.onnx"):
            trial(program(), 1)


def test_a_process_that_ends_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "MODULE", "abc")  # which ends at once
    made, place = program(), track.track(lambda program, batch: (b"", {}))
    ended = pytest.raises(LowerError, match=r"OpenVINO does not run here \(exit code 0\)")
    with place as trial, ended:
        trial(made, 1)
