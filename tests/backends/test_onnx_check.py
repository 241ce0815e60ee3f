"""The check that holds an artifact to its program: it has to be able to fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from torch import Tensor, nn

from narrows.backends import lower
from narrows.backends.base import Pair
from narrows.backends.compare import Wanted, draw_inputs, output_error
from narrows.backends.onnx import target
from narrows.backends.onnx.check import check
from narrows.errors import LowerError
from narrows.frontend import capture
from narrows.ir.program import Program
from tests.backends.held import held


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3))
    return capture(nn.Sequential(*layers).eval(), (torch.randn(2, 6),))


def corrupt(path: Path, name: str, amount: float) -> None:
    """Add ``amount`` to one number of an initializer of a model file."""
    model = onnx.load(path)
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[0] += amount
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("weight", "node"), [("0.weight", "_0"), ("2.bias", "_2"), ("4.weight", "_4")]
)
def test_a_corrupt_weight_is_caught_and_its_node_named(
    program: Program, monkeypatch: pytest.MonkeyPatch, weight: str, node: str
):
    write = target.write

    def write_badly(model: Any, folder: Path, limit: int) -> dict[str, Any]:
        files = write(model, folder, limit)
        corrupt(folder / "model.onnx", weight, 0.05)
        return files

    monkeypatch.setattr(target, "write", write_badly)
    with pytest.raises(LowerError) as caught:
        lower(program)
    error = caught.value
    assert "output _4 of the ONNX model differs from the program by" in error.what
    assert error.where.startswith(node + " (") or error.where == node
    assert "the first that differs" in error.why


def test_rounding_passes_and_a_thousandth_does_not(program: Program):
    artifact = lower(program, check=False)
    assert max(c["error"] for c in held(artifact, program, 3).fidelity["checked"]) < 1e-6
    corrupt(artifact.folder / "model.onnx", "4.bias", 1e-3)
    with pytest.raises(LowerError, match="differs from the program by"):
        held(type(artifact)(artifact.folder, artifact.manifest), program, 1)


def test_another_reference_is_what_counts(program: Program):
    weights = {**program.weights, "4.bias": program.weights["4.bias"] + 1}
    other = program.replace(weights=weights)
    with pytest.raises(LowerError, match="output _4 of the ONNX model differs"):
        lower(program, reference=other)
    lower(program, reference=program.replace(weights=dict(program.weights)), samples=1)


def test_wrong_whole_numbers_are_caught(program: Program):
    net = nn.Sequential(nn.Embedding(50_000, 1), nn.Flatten(0)).eval()
    assert output_error(np.array([49_999]), torch.tensor([50_000])) == np.inf
    assert output_error(np.array([50_000]), torch.tensor([50_000])) == 0
    lower(capture(net, (torch.tensor([[3], [49_999]]),)), samples=1)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (np.zeros((2, 3), np.float32), torch.zeros(3, 2)),
        (np.zeros(3, np.float64), torch.zeros(3)),
        (np.array([1.0, np.nan], np.float32), torch.tensor([1.0, 2.0])),
        (np.array([True]), torch.tensor([False])),
        (3, 4),
        (None, 0),
    ],
)
def test_a_result_of_another_kind_is_infinitely_wrong(actual: Any, expected: Any):
    assert output_error(actual, expected) == np.inf


def test_a_program_without_finite_numbers_cannot_be_checked(program: Program):
    weights = {**program.weights, "4.bias": torch.full((3,), float("nan"))}
    with pytest.raises(LowerError, match=r"(?s)cannot be checked.*no finite number.*check=False"):
        lower(program.replace(weights=weights))


def test_a_check_that_says_little_says_so(program: Program):
    weights = {**program.weights, "4.weight": torch.zeros(3, 4), "4.bias": torch.zeros(3)}
    artifact = lower(program.replace(weights=weights))
    assert [n["reason"] for n in artifact.notes] == ["check"]
    assert "the check tells little" in artifact.report
    assert not lower(program, samples=1).notes


def test_inputs_are_drawn_like_the_example():
    class Net(nn.Module):
        def forward(self, ids: Tensor, x: Tensor, flag: Tensor, scale: Tensor) -> Tensor:
            return (x * scale + ids[:, :1]).masked_fill(flag, 0)

    ids = torch.tensor([[3, 4], [6, 0]])
    x = torch.tensor([[0.5, 2.0], [1.0, 1.5]])
    flag = torch.tensor([[True, False], [False, False]])
    program = capture(Net().eval(), (ids, x, flag, torch.tensor([1.0, 2.0, 3.0])[:1].expand(1)))
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 2, 5):
        drawn = draw_inputs(program, batch, generator)
        assert [tuple(d.shape) for d in drawn] == [(batch, 2), (batch, 2), (batch, 2), (1,)]
        rows = {tuple(row) for row in drawn[0].tolist()}
        assert rows <= {(3, 4), (6, 0)}
        assert bool(((drawn[1] >= 0.5) & (drawn[1] <= 2.0)).all())
        assert {tuple(row) for row in drawn[2].tolist()} <= {(True, False), (False, False)}
    first = draw_inputs(program, 5, None)
    assert torch.equal(first[0], ids[[0, 1, 0, 1, 0]])
    assert torch.equal(first[1], x[[0, 1, 0, 1, 0]])
    assert draw_inputs(program, 5, generator)[1].unique().numel() > 2


def test_an_example_of_zeros_is_not_the_only_input():
    program = capture(nn.ReLU().eval(), (torch.zeros(2, 3),))
    drawn = draw_inputs(program, 2, torch.Generator().manual_seed(0))
    assert drawn[0].abs().max() > 0


# ------------------------------------------------------------------ rounding that is carried far


class Faint(nn.Module):
    """A sigmoid of numbers around -9: results of 1e-4, as exact as a runtime's numbers around 1."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        nn.init.constant_(self.b.bias, -9.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.b(self.a(x).relu()))


@pytest.fixture
def faint() -> Program:
    torch.manual_seed(0)
    return capture(Faint().eval(), (torch.randn(64, 6),))


def test_what_the_runtime_cannot_do_better_passes_and_says_so(
    faint: Program, monkeypatch: pytest.MonkeyPatch
):
    """How far off a runtime's sigmoid is depends on the processor; the bound here does not."""
    monkeypatch.setattr("narrows.backends.onnx.check.limit_of", lambda _: 1e-9)
    monkeypatch.setattr("narrows.backends.compare.tolerance_of", lambda _: 1e-9)
    artifact = lower(faint)
    worst = max(c["error"] for c in artifact.fidelity["checked"])
    assert 1e-9 < worst < 1e-2
    (note,) = [n for n in artifact.notes if n["reason"] == "rounding"]
    assert f"{worst:.1e}" in note["message"]
    assert "each operator by itself" in note["message"]


def test_the_program_is_made_again_once_however_many_outputs_are_excused(
    faint: Program, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("narrows.backends.onnx.check.limit_of", lambda _: 1e-9)
    made: list[Pair] = []

    def again() -> Pair:
        made.append(Pair(faint, faint))
        return made[-1]

    found = check(lower(faint, check=False), Wanted.of(faint, (1, 2, 5), 2), again)
    assert sum(c["error"] > 1e-9 for c in found.fidelity["checked"]) > 1
    assert len(made) == 1


@pytest.mark.parametrize(("weight", "amount"), [("b.bias", 2e-3), ("b.weight", 2e-3)])
def test_carried_rounding_is_no_excuse_for_a_wrong_operator(
    faint: Program, weight: str, amount: float
):
    artifact = lower(faint, check=False, simplify=False)
    corrupt(artifact.folder / "model.onnx", weight, amount)
    with pytest.raises(LowerError, match="differs from the program by"):
        held(type(artifact)(artifact.folder, artifact.manifest), faint, 1)


class Uneven(nn.Module):
    """One channel is ten thousand times the other, and only the small one is read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 2), nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.a.weight[1] *= 1e4
            self.b.weight[0, 1] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_a_small_channel_is_not_lost_beside_a_large_one():
    torch.manual_seed(0)
    program = capture(Uneven().eval(), (torch.randn(64, 6),))
    artifact = lower(program, check=False, simplify=False)
    corrupt(artifact.folder / "model.onnx", "a.bias", 5e-3)
    with pytest.raises(LowerError, match="differs from the program by"):
        held(type(artifact)(artifact.folder, artifact.manifest), program, 1)


def test_one_function_is_not_another_that_is_near(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    erf = capture(nn.Sequential(nn.Linear(6, 64), nn.GELU()).eval(), (5 * torch.randn(64, 6),))
    near = capture(
        nn.Sequential(nn.Linear(6, 64), nn.GELU(approximate="tanh")).eval(), erf.examples
    ).with_weights(erf.weights)
    monkeypatch.setattr("narrows.backends.onnx.check.limit_of", lambda _: 1e-9)
    with pytest.raises(LowerError, match="differs from the program by"):
        held(lower(near, check=False), erf, 1, lowered=erf)
    held(lower(erf, check=False), erf, 1)


def test_carried_rounding_is_no_excuse_for_another_program(faint: Program):
    artifact = lower(faint, check=False)
    other = faint.with_weights({**faint.weights, "b.bias": faint.weights["b.bias"] + 2e-3})
    with pytest.raises(LowerError, match="differs from the program by"):
        held(artifact, other, 1, lowered=faint)


def test_carried_rounding_is_no_excuse_for_a_runtime_that_rewrites_wrongly(
    faint: Program, monkeypatch: pytest.MonkeyPatch
):
    """Shown operator by operator all is right, and as a whole it is not."""

    def right(artifact: Any, program: Program, inputs: Any, run: Any) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        program.run_flat(inputs, observe=lambda n, v: found.__setitem__(n.name, np.asarray(v)))
        return found

    artifact = lower(faint, check=False)
    monkeypatch.setattr("narrows.backends.onnx.rounding.probe", right)
    with pytest.raises(LowerError, match="differs from the program by"):
        held(artifact, faint, 1)


def test_outputs_beyond_the_weights_are_not_held_and_are_compared_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
):
    program = capture(nn.Conv2d(1, 4, 1).eval(), (torch.randn(2, 1, 16, 16),))
    artifact = lower(program, simplify=False)
    whole = artifact.fidelity
    one = 4 * 16 * 16 * 4  # bytes of the output for one example
    monkeypatch.setattr("narrows.backends.compare.HELD", 2 * one)
    cases = Wanted.of(program, (1, 2, 5), 2).cases
    assert [isinstance(case.given, list) for case in cases] == [True, True] + 4 * [False]
    assert lower(program, simplify=False).fidelity == whole
    corrupt(artifact.folder / "model.onnx", "bias", 1e-3)
    monkeypatch.setattr("narrows.backends.compare.HELD", 0)
    with pytest.raises(LowerError, match="differs from the program by"):
        held(type(artifact)(artifact.folder, artifact.manifest), program, 1)
