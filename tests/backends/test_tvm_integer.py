"""Integer programs through TVM: the numbers of the interpreter; `lower` itself compares by ==."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import narrows
import narrows.ir.integer.comparisons
import narrows.ir.integer.quotients
from narrows.backends import lower
from narrows.cli import main
from narrows.errors import LowerError
from narrows.ir.integer import windows
from narrows.ir.integer.grid import Grid
from narrows.ir.integer.statistics import exponentials
from narrows.ir.meta import Meta
from narrows.ir.program import Program
from tests.backends.marks import NEEDS_TVM
from tests.builder import Builder
from tests.networks import NETWORKS

pytestmark = [NEEDS_TVM, pytest.mark.usefixtures("own_cache")]

ops: Any = torch.ops.narrows
aten = torch.ops.aten


class Codes(Builder):
    """A program of integer operators; every result is an output."""

    def __init__(self, rounding: str, *shapes: tuple[int, ...]) -> None:
        super().__init__(*shapes)
        self.random = torch.Generator().manual_seed(0)
        self.rounding = rounding
        self.examples = tuple(self.bytes(s).to(torch.uint8) for s in shapes)
        self.outputs: list[Any] = []

    def bytes(self, shape: tuple[int, ...], low: int = 0, high: int = 256) -> Tensor:
        return torch.randint(low, high, shape, generator=self.random)

    def number(self, tensor: Tensor) -> Any:
        return self.weight(f"w{len(self.weights)}", tensor)

    def add(self, name: str, *args: Any) -> Any:
        how = {} if name in ("lookup", "dequantize") else {"rounding": self.rounding}
        made = self.call(getattr(ops, name).default, *args, **how)
        self.outputs.append(made)
        return made

    def conv(  # type: ignore[override]
        self,
        x: Any,
        shape: tuple[int, ...],
        *,
        shifts: list[int] | None = None,
        zeros: tuple[int, int] = (128, 128),
        clip: tuple[int, int] = (0, 255),
        stride: int = 1,
        padding: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: int = 4000,
        weight: int = 128,
        turned: bool = False,
    ) -> Any:
        rank, channels = len(shape) - 2, shape[1] * groups if turned else shape[0]
        by = shifts or [9 + i % 3 for i in range(channels)]
        head = (
            x, self.number(self.bytes(shape, 1 - weight, weight).to(torch.int8)),
            self.number(self.bytes((channels,), -bias, bias).to(torch.int32)) if bias else None,
            by, zeros[0], zeros[1], *clip, [stride] * rank, [padding] * rank,
        )  # fmt: skip
        more = [[0] * rank] if turned else []
        name = "conv_transpose" if turned else "conv"
        return self.add(name, *head, *more, [dilation] * rank, groups)

    def finished(self) -> Program:
        Meta(self.outputs[0]).grid = Grid(0, 128)  # by which a program is known as one of integers
        return self.program(*self.outputs)


def layers(rounding: str, few: bool = False) -> Program:
    b = Codes(rounding, (1, 3, 9, 8), (1, 20, 7), (2, 5, 21), (1, 6, 4, 4, 4), (1, 17, 21))
    image, signal, rows, volume, odd = b.inputs
    x = b.conv(image, (20, 3, 3, 3), clip=(128, 255))
    b.conv(x, (33, 20, 1, 1), padding=0, shifts=[8], bias=0, zeros=(0, 0))
    b.conv(x, (20, 1, 3, 3), groups=20, clip=(3, 200))
    b.conv(x, (20, 1, 5, 5), groups=20, stride=2, padding=2, zeros=(0, 128), shifts=[7])
    if few:
        return b.finished()
    b.conv(x, (40, 1, 3, 3), groups=20, dilation=2)
    b.conv(x, (24, 5, 3, 3), groups=4, stride=2)
    b.conv(x, (20, 7, 3, 3), turned=True, stride=2, padding=1)
    b.conv(x, (20, 1, 2, 2), turned=True, stride=2, padding=0, groups=20)
    b.conv(signal, (17, 20, 5), padding=2)
    b.conv(signal, (20, 1, 3), groups=20)
    b.conv(volume, (9, 6, 2, 2, 2))
    # Shifts to the left, by nothing, by everything; sums beyond what float32 or 32 bits hold.
    b.conv(x, (16, 20, 1, 1), padding=0, weight=2, shifts=[-3, -9, -40, 0, 1, 31, 33, 60] * 2)
    b.conv(x, (16, 20, 1, 1), padding=0, shifts=[17, 18, 22, 24] * 4, bias=2**27)
    b.conv(x, (16, 20, 1, 1), padding=0, shifts=[23] * 16, bias=2**31 - 2**20)
    b.conv(x, (16, 20, 1, 1), padding=0, shifts=[0], weight=3, zeros=(128, 0))
    weight = b.number(b.bytes((13, 21), -127, 128).to(torch.int8))
    y = b.add("linear", rows, weight, None, [8], 128, 128, 0, 255)
    b.add("linear", odd, weight, None, [8], 128, 128, 0, 255)
    alone = b.call(aten.select.int, b.call(aten.select.int, rows, 0, 0), 0, 0)
    b.add("linear", alone, weight, None, [8], 128, 128, 0, 255)
    b.add("matmul", y, b.call(aten.permute.default, y, [0, 2, 1]), 7, 128, 128, 128, 0, 255)
    b.add("matmul", rows, b.call(aten.permute.default, rows, [0, 2, 1]), 12, 0, 128, 0, 0, 255)
    return b.finished()


def others(rounding: str, floats: bool = True) -> Program:
    b = Codes(rounding, (1, 3, 9, 8), (2, 5, 21), (1, 1, 9, 8), (3, 7))
    image, rows, gate, flat = b.inputs
    x = b.conv(image, (20, 3, 3, 3), clip=(128, 255))
    y = b.conv(image, (20, 3, 1, 1), padding=0)
    b.add("add", x, y, 0, 0, 0, 128, 128, 128, 0, 255)
    b.add("add", x, y, 2, 0, 3, 128, 0, 128, 10, 250, -1)
    b.add("add", x, gate, 0, 26, 27, 128, 0, 128, 0, 255)
    b.add("add", x, y, 0, 3, -2, 128, 128, 0, 0, 255)
    b.add("mul", x, gate, 7, 128, 0, 128, 0, 255)
    b.add("mul", x, y, 20, 128, 128, 128, 0, 255)
    b.add("rescale", x, 1, 128, 0, 0, 255)
    b.add("rescale", y, -2, 128, 128, 64, 192)
    b.add("concat", [x, y, gate], 1, [0, 1, -1], [128, 128, 0], 128, 0, 255)
    b.add("concat", [rows, rows], 2, [0, 0], [128, 128], 128, 0, 255)
    b.add("lookup", x, b.number(b.bytes((256,)).to(torch.uint8)))
    b.add("mean", x, [2, 3], True, 0, 128, 128, 0, 255)
    b.add("mean", x, [1], False, -2, 128, 128, 0, 255)
    b.add("mean", rows, [0, 2], False, 1, 0, 0, 0, 255)
    b.add("mean", flat, [1], True, 1, 0, 0, 0, 255)
    b.add("mean", flat, [1], True, -26, 128, 128, 0, 255)
    pools = (
        ([2, 2], [2, 2], [0, 0], False, True, 0), ([3, 3], [2, 2], [1, 1], False, True, 1),
        ([3, 3], [2, 2], [1, 1], True, False, -1), ([2, 3], [3, 2], [1, 0], True, True, 0),
    )  # fmt: skip
    for *how, by in pools:
        b.add("average_pool", x, *how, by, 128, 128, 0, 255)
    slopes = b.number(b.bytes((20, 1, 1), -8000, 8000).to(torch.int32))
    b.add("prelu", x, slopes, 13, 12, 128, 128, 0, 255)
    b.add("mean", rows, [2], False, 3, 128, 128, 0, 255, 1)
    b.add("average_pool", rows, [3], [2], [1], True, False, 0, 128, 128, 0, 255)
    b.add("average_pool", x, [2, 2], [2, 2], [0, 0], False, True, 0, 128, 128, 0, 255, 3)
    resized = [windows.resizing("cubic", 9, 13, 0.0, False, 2),
               windows.resizing("linear", 8, 5, 0.0, True, 2)]  # fmt: skip
    for pairs, by in ((resized, -1), ([windows.uneven(9, 4), windows.uneven(8, 3)], 1)):
        places, factors = ([b.number(pair[i]) for pair in pairs] for i in range(2))
        b.add("resample", x, places, factors, by, 128, 128, 0, 255)
    for exponent, zero in ((7, 0), (8, 0), (12, 0), (-1, 128)):
        table = b.number(exponentials(4, 15))
        b.add("softmax", rows, table, 2, exponent, zero, 0, 255)
    b.add("softmax", x, b.number(exponentials(5, 12)), 1, 8, 0, 0, 255)
    groups = b.call(aten.reshape.default, x, [-1, 4, 5, 72])
    norms = (((21,), 1, rows, True), ((9, 8), 2, x, True), ((4, 5, 1), 2, groups, True),
             ((5, 72), 2, groups, False), ((4, 1, 72), 2, groups, True))  # fmt: skip
    for shape, axes, value, centred in norms:
        gain, offset = (b.number(torch.randn(shape, generator=b.random) * 40) for _ in range(2))
        b.add("layer_norm", value, gain, offset, axes, 0.01, 128, 128, 0, 255, centred)
    if floats:
        z = b.add("dequantize", y, 4, 128)
        b.add("quantize", z, 3, 128, 20, 255)
    for target, *args in (
        (aten.max_pool2d.default, [3, 3], [2, 2], [1, 1]), *[(aten.relu.default,)] * floats,
        (aten.pad.default, [1, 2, 0, 1], "constant", 128), (aten.flip.default, [1]),
        (aten.upsample_nearest2d.vec, None, [2.0, 2.0]), (aten.amax.default, [1], True),
        (aten.slice.Tensor, 1, 3, 17), (aten.permute.default, [0, 2, 3, 1]),
    ):  # fmt: skip
        b.outputs.append(b.call(target, x, *args))
    return b.finished()


def choices(rounding: str) -> Program:
    """Quotients, norms, comparisons, and what chooses; every code meets every other."""
    b = Codes(rounding, (1, 256, 4), (1, 1, 4))
    x, other = b.inputs
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 256, 1).expand(1, 256, 4)
    b.examples = every.contiguous(), torch.tensor([[[101, 90, 104, 140]]], dtype=torch.uint8)
    for by in (-9, 0, 2):
        b.add("div", x, other, by, 128, 101, 128, 0, 255)
        b.add("vector_norm", x, 2.0, [1, 2], True, by + 8, 128, 0, 0, 255)
        b.add("vector_norm", x, 2.0, [2], False, by, 100, 0, 0, 250)
    b.add("vector_norm", x, 1.0, [1], False, 8, 128, 128, 0, 255)
    b.add("vector_norm", x, float("inf"), [2], True, 0, 128, 0, 0, 255)
    part = b.call(aten.slice.Tensor, other, 2, 0, 1)
    tests = [b.call(ops.compare.default, x, part, how, 2, 0, 128, 0) for how in ("lt", "eq", "ge")]
    tests += [b.call(ops.compare_number.default, x, how, 130) for how in ("le", "ne", "gt")]
    told = b.call(aten.bitwise_and.Tensor, tests[0], tests[4])
    b.outputs += [*tests, told, b.call(aten.where.self, told, x, part)]
    b.outputs += [b.call(op, x, part) for op in (aten.maximum.default, aten.minimum.default)]
    return b.finished()


PARTS = {"layers": layers, "others": others, "choices": choices}


@pytest.mark.parametrize(
    ("part", "rounding"),
    [
        ("layers", "half_even"),
        ("layers", "half_up"),
        ("others", "half_even"),
        ("others", "half_up"),
        ("choices", "half_even"),
        ("choices", "half_up"),
    ],
)
def test_every_operator_is_the_interpreters(part: str, rounding: str) -> None:
    artifact = lower(PARTS[part](rounding), "tvm", tune=0, samples=1)
    assert artifact.fidelity["tolerance"] == artifact.fidelity["checked"][0]["error"] == 0.0
    left = {name.rstrip("0123456789") for name in artifact.manifest["build"]["unscheduled"]}
    assert left <= {"root"}  # a sum of 64 bits with a root behind has no schedule


def features() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


# Processors of x86 without what is found here, by what has to be here to run their code.
OLDER = {
    "x86-64": "sse2",
    "x86-64-v3": "avx2",
    "skylake-avx512": "avx512bw",
    "alderlake": "avx_vnni",
}


@pytest.mark.parametrize("mcpu", OLDER)
def test_processors_without_the_instruction_add_the_same(mcpu: str) -> None:
    if OLDER[mcpu] not in features():
        pytest.skip(f"this processor has no {OLDER[mcpu]}")
    artifact = lower(layers("half_even", few=True), "tvm", tune=0, mcpu=mcpu, samples=1)
    assert artifact.fidelity["checked"][0]["error"] == 0.0


# ------------------------------------------------------------------ networks


def quantized(name: str, ratio: float = 0.0, **options: Any) -> narrows.Quantized:
    found = NETWORKS[name]
    inputs = tuple(x.float() if x.is_floating_point() else x for x in found.inputs(4, 1))
    program = narrows.capture(found.build().float(), inputs)
    if ratio:
        program = narrows.apply(program, narrows.plan(program, ratio=ratio))
    return narrows.quantize(program, [inputs], check=False, **options)


def test_a_pruned_network_keeps_its_bits_wherever_it_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = lower(quantized("shuffle_block", 0.4).program, "tvm", tune=0, samples=1)
    artifact.save(tmp_path / "out")
    assert main(["check", str(tmp_path / "out")]) == 0
    assert "bit for bit" in capsys.readouterr().out
    artifact.manifest["golden"] = {batch: ["0" * 64] for batch in artifact.manifest["golden"]}
    artifact.save(tmp_path / "other")
    assert main(["check", str(tmp_path / "other")]) == 1
    assert "has other bits than it should" in capsys.readouterr().out


def test_what_follows_an_island_is_equal_to_what_the_island_gave() -> None:
    found = quantized("cumsum_space")
    assert found.plan.floats
    artifact = lower(found.program, "tvm", tune=0, samples=1)
    assert artifact.fidelity["checked"][0]["error"] == 0.0
    assert len(artifact.manifest["islands"]) == len(found.plan.floats)
    assert artifact.run(found.program.examples[0][:1]).shape[0] == 1
    assert "golden" not in artifact.manifest


def test_one_wrong_code_is_found() -> None:
    program = layers("half_even", few=True)
    wrong = layers("half_even", few=True).copy()
    name = next(n for n, w in wrong.weights.items() if w.dtype == torch.int32)
    wrong.weights[name] = wrong.weights[name] + 2**7
    with pytest.raises(LowerError, match="of the library differs from the program"):
        lower(program, "tvm", tune=0, samples=1, reference=wrong)


def test_fake_quantized_programs_are_refused() -> None:
    with pytest.raises(LowerError, match="its integers are not folded yet"):
        lower(quantized("depthwise").fake, "tvm", tune=0)


def test_what_has_no_exact_form_is_refused_by_name() -> None:
    program = quantized("layer_norm_tokens").program
    with pytest.raises(LowerError, match="cannot lower") as caught:
        lower(program, "tvm:cuda")
    assert "a layer norm of codes on a GPU" in caught.value.why
    with pytest.raises(LowerError, match="the importer of TVM has no form for the integers"):
        lower(program, "tvm", importer="tvm")


@pytest.mark.parametrize("mcpu", ["cortex-a76", "neoverse-v1"])
def test_processors_of_arm_get_the_dot_product_that_they_have(mcpu: str) -> None:
    artifact = lower(layers("half_even", few=True), "tvm:aarch64", mcpu=mcpu)
    assert not artifact.manifest["build"]["unscheduled"]
    wanted = {"cortex-a76": "dotprod", "neoverse-v1": "i8mm"}[mcpu]
    assert artifact.manifest["build"]["dot"] == wanted
