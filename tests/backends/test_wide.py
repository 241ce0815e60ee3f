"""Activations of 12 and 16 bits in ONNX Runtime and C: the same integers, whatever they meet."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.backends.c.compiler import find_compiler
from narrows.backends.onnx.check import first_difference
from narrows.backends.onnx.session import MODEL
from narrows.cli import main
from narrows.errors import LowerError
from narrows.ir.integer.statistics import LARGEST_WIDE_NORM
from narrows.ir.program import Program
from tests.backends.several_forms import WIDE, integers
from tests.passes.test_wide import captured, images

needs_compiler = pytest.mark.skipif(not find_compiler(), reason="there is no C compiler")

ASKED: dict[str, Any] = {
    "12": 12,
    "16": 16,
    "mixed": {"body": 16, "silu": 12, "cat": 14, "*": 8},
    "one": {"gate": 16, "*": 8},
}


@cache
def quantized(asked: str, rounding: str = "half_even") -> Program:
    made = narrows.quantize(captured(), [images(8)], activations=ASKED[asked], rounding=rounding)
    return made.program


FORMS = [*((a, "half_even", f) for a in ASKED for f in ("qdq", "qlinear", "integer")),
         ("mixed", "half_up", "integer")]  # fmt: skip


@pytest.mark.parametrize(("asked", "rounding", "form"), FORMS)
def test_onnx_runtime_computes_the_same(asked: str, rounding: str, form: str) -> None:
    program = quantized(asked, rounding)
    artifact = narrows.lower(program, form=form)
    x = 2 * images(3)
    assert np.array_equal(artifact.run(x), program(x).numpy())


@needs_compiler
@pytest.mark.parametrize(
    ("name", "rounding"), [(WIDE[0], "half_up"), *((n, "half_even") for n in WIDE)]
)
def test_many_operators_are_the_interpreter(name: str, rounding: str) -> None:
    program = integers(name, rounding, bits=12)
    narrows.lower(program, form="integer", samples=1)  # lower itself compares, with ==
    narrows.lower(program, "c", samples=1)


@needs_compiler
@pytest.mark.parametrize(
    ("asked", "rounding"), [*((a, "half_even") for a in ASKED), ("mixed", "half_up")]
)
def test_c_computes_the_same(asked: str, rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrows.backends.c.session.FAST", ("-O1", "-DNARROWS_LANES=32"))
    program = quantized(asked, rounding)
    artifact = narrows.lower(program, "c", batch=2)  # lower itself compares, with vectors, too
    x = 2 * images(2)
    assert np.array_equal(artifact.run(x), program(x).numpy())


@needs_compiler
def test_nine_bits_that_end_where_eight_do() -> None:
    """With a sign the largest code is 255, too; a layer of them makes narrow codes for softmax."""
    torch.manual_seed(0)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3), nn.Softmax(1)).eval()
    program = narrows.capture(net, x)
    made = narrows.quantize(program, [x], activations=9).program
    assert np.array_equal(narrows.lower(made, "c", batch=8).run(x), made(x).numpy())


@needs_compiler
def test_c_files_of_wide_codes(tmp_path: Path) -> None:
    """The caller hands over int16; nothing is undefined on the way."""
    artifact = narrows.lower(quantized("16"), "c", check=False)
    header = (artifact.folder / "model.h").read_text()
    assert "int narrows_run(const int16_t *in_x, int16_t *out_head);" in header
    assert "static inline int16_t narrows_quantize_in_x(float value)" in header
    artifact.save(tmp_path / "out")
    done = subprocess.run(
        ["make", "sanitize"], cwd=tmp_path / "out", capture_output=True, text=True
    )
    assert "8 of 8 vectors agree" in done.stdout, done
    assert main(["check", str(tmp_path / "out")]) == 0


@needs_compiler
def test_weights_of_few_powers_shift_wide_codes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"weights": "pot4", "first_last": None, "activations": 12}
    made = narrows.quantize(captured(), [images(8)], **options)
    narrows.lower(made.program, "c").save(tmp_path / "out")
    line = [
        "make",
        "test",
        "CFLAGS=-O1 -DNARROWS_SHIFT_ADD -fsanitize=undefined -fno-sanitize-recover",
    ]
    done = subprocess.run(line, cwd=tmp_path / "out", capture_output=True, text=True)
    assert "8 of 8 vectors agree" in done.stdout, done


@needs_compiler
@pytest.mark.parametrize("rounding", ["half_even", "half_up"])
def test_norms_of_the_largest_codes_and_the_longest_rows(rounding: str) -> None:
    """What they form of sums needs all of 64 bits."""
    count = LARGEST_WIDE_NORM
    x = torch.randn(6, count, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    x[0], x[1], x[2], x[2, ::2] = 1.0, -1.0, 1.0, -1.0
    net = nn.LayerNorm(count, elementwise_affine=False).eval()
    program = narrows.capture(net, (x,), dynamic_batch=False)
    made = narrows.quantize(
        program, [x], activations=16, method="minmax", rounding=rounding, check=False
    )
    ends = 2 * x
    for target in ("onnx", "c"):
        options = {"form": "integer"} if target == "onnx" else {}
        artifact = narrows.lower(made.program, target, samples=1, **options)
        assert np.array_equal(artifact.run(ends), made.program(ends).numpy())


class Words(nn.Module):
    """Wide codes that are looked up, moved about, and compared."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.words(x).transpose(1, 2).flip(2).roll(1, 1)
        y = F.max_pool2d(y.unflatten(1, (2, 4)), 2, 1, padding=1).amax(1)
        return self.head(y.flatten(1)[:, :8] - y.flatten(1)[:, 8:16])


@needs_compiler
def test_moves_of_wide_codes() -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(0))
    program = narrows.capture(Words().eval(), (x,))
    made = narrows.quantize(program, [x], activations=16).program
    assert made.weights["words.weight"].dtype is torch.int16
    artifact = narrows.lower(made)
    assert np.array_equal(artifact.run(x), made(x).numpy())
    assert np.array_equal(narrows.lower(made, "c").run(x[:1]), made(x[:1]).numpy())


class Long(nn.Module):
    """Sums so long that two digits are not enough, and products of two wide tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.deep = nn.Conv2d(700, 4, 3), nn.Linear(16, 5000)
        self.head, self.kept = nn.Linear(5000, 4), nn.Parameter(torch.randn(4, 16))
        with torch.no_grad():
            for weight in (self.conv.weight, self.head.weight):
                weight.sign_().mul_(0.9)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2) + self.kept
        return self.head(F.relu(self.deep(y))) @ y


def long() -> tuple[Program, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 700, 6, 6, generator=torch.Generator().manual_seed(0))
    return narrows.capture(Long().eval(), (x,)), x


def test_long_sums_are_exact() -> None:
    program, x = long()
    made = narrows.quantize(program, [x], activations=16)
    assert sum("takes 64 bits" in n.message for n in made.program.notes) >= 2
    artifact = narrows.lower(made.program)
    assert np.array_equal(artifact.run(x), made.program(x).numpy())
    if find_compiler():
        narrows.lower(made.program, "c")  # its check is equality


def test_a_wrong_wide_tensor_is_named() -> None:
    program = quantized("mixed")
    other = program.weights["body.bias"] + 10**6
    wrong = program.replace(weights={**program.weights, "body.bias": other})
    artifact = narrows.lower(wrong, check=False)
    assert first_difference(artifact, program, [images(2)]).startswith("body (")


def test_tvm_refuses_them() -> None:
    pytest.importorskip("tvm")
    made = narrows.quantize(captured(), [images(2)], activations={"gate": 12, "*": 8}, check=False)
    with pytest.raises(LowerError, match="gate has codes of 12 bits, which the tvm target cannot"):
        narrows.lower(made.program, "tvm")


@pytest.mark.parametrize("form", ["qdq", "qlinear", "integer"])
def test_windows_that_leave_a_remainder(form: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 7)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(2), nn.Conv2d(4, 2, 1)).eval()
    made = narrows.quantize(narrows.capture(net, (x,)), [x], activations=16).program
    assert np.array_equal(narrows.lower(made, form=form).run(x), made(x).numpy())


def test_the_widest_channel_says_how_far_sums_reach() -> None:
    """The other one reads a single number, so that its own sum would be exact in float32."""
    net = nn.Linear(600, 2).eval()
    with torch.no_grad():
        net.weight[0, 1:], net.weight[1] = 0.0, 1.0
    x = torch.randn(4, 600, generator=torch.Generator().manual_seed(3)).abs()
    made = narrows.quantize(narrows.capture(net, (x,)), [x], activations=16).program
    artifact = narrows.lower(made, samples=1)  # its folder is there as long as it is
    nodes = onnx.load(artifact.folder / MODEL).graph.node
    assert sum(n.op_type == "MatMul" for n in nodes) == 2  # in parts that float32 sums exactly
