"""Running an artifact: what it takes, what it refuses, and that it needs no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.backends import lower
from narrows.backends.artifact import Artifact, TensorSpec
from narrows.errors import ArtifactError
from narrows.frontend import capture
from narrows.ir.program import Note

ROOT = Path(narrows.__file__).parents[1]


class TwoInTwoOut(nn.Module):
    """Nested both ways; an input by name, one that is no tensor, and one passed through."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, pair: tuple[Tensor, int], *, mask: Tensor) -> dict[str, Any]:
        x, times = pair
        y = self.fc(x) * times
        return {"logits": y, "rest": [x, (y.argmax(1), mask), None], "batch": x.shape[0]}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return TwoInTwoOut().eval()


@pytest.fixture(scope="module")
def artifact(model: nn.Module) -> Artifact:
    mask = torch.tensor([[True, False], [False, True]])
    program = capture(model, ((torch.randn(2, 4), 3),), kwargs={"mask": mask}, name="two")
    return lower(program, samples=1)


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)


@pytest.fixture
def mask() -> np.ndarray:
    return np.arange(10).reshape(5, 2) % 3 == 0


def test_nested_inputs_and_outputs(
    artifact: Artifact, model: nn.Module, x: np.ndarray, mask: np.ndarray
):
    got = artifact.run((x, 3), mask=mask)
    want = model((torch.from_numpy(x), 3), mask=torch.from_numpy(mask))
    assert list(got) == ["logits", "rest", "batch"]
    np.testing.assert_allclose(got["logits"], want["logits"].detach(), atol=1e-5)
    assert np.array_equal(got["rest"][0], x)
    assert np.array_equal(got["rest"][1][0], want["rest"][1][0])
    assert np.array_equal(got["rest"][1][1], mask)
    assert got["rest"][2] is None
    assert got["batch"] == 5
    assert isinstance(got["batch"], int)


def test_torch_tensors_are_taken_as_they_are(artifact: Artifact, x: np.ndarray, mask: np.ndarray):
    leaf = torch.from_numpy(x).clone().requires_grad_()
    got = artifact.run((leaf, 3), mask=torch.from_numpy(mask))
    assert np.array_equal(got["logits"], artifact.run((x, 3), mask=mask)["logits"])


def test_arrays_need_not_be_contiguous(artifact: Artifact, x: np.ndarray, mask: np.ndarray):
    strided = np.asfortranarray(x)
    got = artifact.run([strided, 3], mask=mask)
    assert np.array_equal(got["logits"], artifact.run((x, 3), mask=mask)["logits"])


def test_inputs_and_outputs_are_described(artifact: Artifact):
    assert artifact.inputs == (
        TensorSpec(artifact.inputs[0].name, ("b", 4), "float32"),
        TensorSpec(artifact.inputs[1].name, ("b", 2), "bool"),
    )
    assert [(s.shape, s.dtype) for s in artifact.outputs] == [
        (("b", 3), "float32"),
        (("b",), "int64"),
        ((), "int64"),
    ]
    assert str(artifact.inputs[1]).endswith(": bool[b,2]")
    assert repr(artifact).startswith("Artifact(two: onnx, ")


def test_sessions_are_made_once_per_number_of_threads(
    artifact: Artifact, x: np.ndarray, mask: np.ndarray
):
    one = artifact.open(threads=1)
    assert artifact.open(threads=1) is one
    assert artifact.session is artifact.open()
    assert artifact.session is not one
    assert one.inference.get_session_options().intra_op_num_threads == 1  # type: ignore[attr-defined]
    got = artifact.run((x, 3), mask=mask, threads=1)
    np.testing.assert_allclose(
        got["logits"], artifact.run((x, 3), mask=mask)["logits"], rtol=1e-5, atol=1e-6
    )


# ------------------------------------------------------------------ refusing


def floats(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


MASK = np.zeros((5, 2), bool)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {"mask": MASK}, r"the inputs must be a tuple of 1, got 0"),
        (((floats(5, 4), 3), 1), {"mask": MASK}, r"the inputs must be a tuple of 1, got 2"),
        (((floats(5, 4),),), {"mask": MASK}, r"the inputs\[0\] must be a tuple of 2, got 1"),
        (
            ((floats(5, 4), 3),),
            {},
            r"by name must be a dict with the keys \['mask'\], got the keys",
        ),
        (((floats(5, 4), 3),), {"msk": MASK}, r"with the keys \['mask'\], got the keys \['msk'\]"),
        (((floats(5, 3), 3),), {"mask": MASK}, r"has shape \[5, 3\], the model takes \[b,4\]"),
        (((floats(5), 3),), {"mask": MASK}, r"has shape \[5\], the model takes \[b,4\]"),
        (((floats(5, 4, 1), 3),), {"mask": MASK}, r"has shape \[5, 4, 1\]"),
        (((floats(4, 4), 3),), {"mask": MASK}, r"(?s)shape \[5, 2\].*\[b,2\].*b is 4 in this call"),
        (
            ((floats(5, 4).astype(np.float64), 3),),
            {"mask": MASK},
            r"(?s)takes float32, got float64.*try: convert it: .*astype\('float32'\)",
        ),
        (((floats(5, 4), 3),), {"mask": MASK.astype(np.int64)}, r"takes bool, got int64"),
        (((floats(5, 4), 4),), {"mask": MASK}, r"(?s)must be 3, got 4.*built into the model"),
        (((floats(5, 4), True),), {"mask": MASK}, r"must be 3, got True"),
        ((([[1.0]], 3),), {"mask": MASK}, r"must be a numpy array or a torch tensor, got a list"),
        (
            ((torch.zeros(5, 4).to_sparse(), 3),),
            {"mask": MASK},
            r"(?s)has no numpy form.*Sparse",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    artifact: Artifact, args: tuple[Any, ...], kwargs: dict[str, Any], message: str
):
    with pytest.raises(ArtifactError, match=message):
        artifact.run(*args, **kwargs)


def test_a_fixed_batch_is_fixed():
    program = capture(nn.ReLU().eval(), (torch.randn(3, 2),), dynamic_batch=False)
    artifact = lower(program, samples=1)
    assert artifact.inputs[0].shape == (3, 2)
    assert artifact.fidelity["checked"][0]["batch"] == 3
    with pytest.raises(ArtifactError, match=r"shape \[2, 2\], the model takes \[3,2\]"):
        artifact.run(floats(2, 2))


# ------------------------------------------------------------------ report


def test_the_report_says_what_was_kept_and_why():
    notes = (
        Note("conv1", "padding", "the border is not constant", 3, "net.py:7"),
        Note("conv2", "groups", "blocks would be unequal", 8, "net.py:9"),
        Note("conv3", "padding", "the border is not constant", 1),
        Note("batch", "fixed-batch", "the batch is fixed", 0),
    )
    program = capture(nn.ReLU().eval(), (torch.randn(2, 3),), name="tiny")
    artifact = lower(program.replace(notes=notes, history=("prune-channels",)), samples=1)
    lines = artifact.report.splitlines()
    assert lines[0] == f"tiny: onnx, {artifact.size:,} bytes"
    assert "  passes  prune-channels" in lines
    assert "  checked batch 5, 1 input: relative error 0.0e+00" in lines
    start = lines.index("kept 12 channels that the plan drops, or that nothing needs, because of:")
    assert lines[start + 1 :] == [
        "  groups: 8 channels",
        "    conv2: blocks would be unequal  net.py:9 (8)",
        "  padding: 4 channels",
        "    conv1: the border is not constant  net.py:7 (3)",
        "    conv3: the border is not constant (1)",
        "notes:",
        "  batch: the batch is fixed",
    ]


def test_the_report_of_an_unchecked_artifact_says_so():
    artifact = lower(capture(nn.ReLU().eval(), (torch.randn(2, 3),)), check=False)
    assert "not checked against the program" in artifact.report
    assert artifact.fidelity == {}


def test_the_manifest_tells_versions_and_hashes(artifact: Artifact):
    assert artifact.manifest["narrows"] == narrows.__version__
    assert artifact.manifest["versions"]["torch"] == torch.__version__
    assert set(artifact.manifest["versions"]) >= {"python", "onnx", "onnxruntime", "onnxsim"}
    assert len(artifact.manifest["files"]["model.onnx"]["sha256"]) == 64
    assert [c["batch"] for c in artifact.fidelity["checked"]] == [1, 2, 5]
    assert artifact.fidelity["tolerance"] == 1e-4


# ------------------------------------------------------------------ without torch

WITHOUT_TORCH = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnxsim", "onnxscript", "onnx_ir"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import numpy as np
import narrows

artifact = narrows.load(sys.argv[1])
x = np.load(sys.argv[2])
got = artifact.run((x, 3), mask=x[:, :2] > 0)
np.save(sys.argv[3], got["logits"])
assert artifact.report and artifact.size
try:
    artifact.run((x[:, :2], 3), mask=x[:, :2] > 0)
except narrows.ArtifactError as error:
    print(error.what)
"""


def test_load_and_run_need_neither_torch_nor_onnx(
    artifact: Artifact, tmp_path: Path, x: np.ndarray
):
    folder = artifact.save(tmp_path / "out")
    np.save(tmp_path / "x.npy", x)
    paths = [str(folder), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *paths], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert "has shape [5, 2], the model takes [b,4]" in result.stdout
    expected = artifact.run((x, 3), mask=x[:, :2] > 0)["logits"]
    assert np.array_equal(np.load(tmp_path / "y.npy"), expected)
