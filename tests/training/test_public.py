"""The public names of `narrows.training`: a change here is a change for users."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from narrows import training

GATES = {
    "AnnealedMasks", "AttendedRatios", "DifferentiableMasks", "GeneratedGates", "GumbelGates",
    "NormSparsity", "Predictors", "SearchedWidths", "SoftMasks",
}  # fmt: skip
OTHERS = {
    "Footprint", "Gates", "LatencyPredictor", "Ramp", "Sawtooth", "Tent", "channel_wise",
    "distillation", "element_mask", "follow", "self_supervised", "spatial_attention", "stability",
}  # fmt: skip


def test_names() -> None:
    assert set(training.__all__) == GATES | OTHERS
    assert training.__all__ == sorted(training.__all__)


@pytest.mark.parametrize("name", sorted(GATES | OTHERS))
def test_docstring_says_what_you_get(name: str) -> None:
    assert (inspect.getdoc(getattr(training, name)) or "").split("\n\n")[0].endswith((".", ":"))


@pytest.mark.parametrize("name", sorted(GATES))
def test_gates_are_asked_for_in_one_way(name: str) -> None:
    kind = getattr(training, name)
    assert issubclass(kind, training.Gates)
    assert list(inspect.signature(kind).parameters)[:3] == ["model", "program", "outputs"]
    paper = inspect.getdoc(inspect.getmodule(kind)) or ""
    assert any(str(year) in paper for year in range(2017, 2027))


def test_import_narrows_leaves_it_alone() -> None:
    code = "import narrows, sys; print('narrows.training' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
