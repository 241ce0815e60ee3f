"""The edges of the C kernels: windows that hang over every side, more channels than a chunk holds,
strides and dilations that differ by axis, several images; equal to the interpreter code by code.

Every network returns many operators' results at once, so that one compilation tries them all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import narrows
from narrows.backends.c import compiler, files, session
from narrows.backends.c.rules import average_shift
from narrows.backends.c.sketch import Sketch
from narrows.errors import ArtifactError
from narrows.ir.meta import Meta
from narrows.ir.program import Program
from tests.backends.several_forms import integers

pytestmark = pytest.mark.skipif(not compiler.find_compiler(), reason="there is no C compiler")

WIDE = 70  # channels: more than the 64 that are summed at a time


class Net(nn.Module):
    """Returns what ``results`` makes of its input; its layers have random weights."""

    def __init__(self, results: Callable[..., tuple[Tensor, ...]], **layers: nn.Module) -> None:
        super().__init__()
        self.results = results
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *x: Tensor) -> tuple[Tensor, ...]:
        return self.results(self, *x)


def quantized(net: nn.Module, *inputs: Tensor, **options: Any) -> Program:
    program = narrows.capture(net.eval(), inputs)
    integers = narrows.quantize(program, [inputs], check=False, **options)
    assert not integers.plan.floats, integers.plan.floats
    return integers.program


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let what is compiled without vectors end where it reads or writes what is not its own."""
    flags = ("-O1", "-DNARROWS_LANES=1", "-fsanitize=address,undefined", "-fno-sanitize-recover")
    if compiler.compiles(flags, tmp_path):
        monkeypatch.setattr(session, "PLAIN", flags)


def compare(program: Program, *, optimize: bool = False, draws: int = 2) -> None:
    """Compare every output with the interpreter's, on inputs that fill the range."""
    artifact = narrows.lower(program, "c", check=False, batch=2)
    runner = session.CSession(artifact.folder, artifact.manifest, optimize)
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        inputs = [
            2 * torch.randn(2, *e.shape[1:], generator=generator) if e.is_floating_point() else e
            for e in program.examples
        ]
        expected = program.run_flat(inputs)
        arrays = artifact.arrays(inputs)
        actual = artifact.gather(arrays, runner.run(arrays))
        for i, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
            differs = int((torch.from_numpy(got) != wanted).sum())
            assert not differs, f"{differs} numbers of output {i} are others"


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


# ------------------------------------------------------------------ windows


# Kernel, stride and padding; the sizes of images differ by more than any of them.
POOLINGS = [((3, 5), (2, 3), (1, 2)), ((4, 7), (3, 5), (0, 3)), ((3, 2), (2, 1), (1, 0))]


@pytest.mark.parametrize("turned", [False, True])
def test_windows_of_poolings_hang_over_every_edge(turned: bool) -> None:
    def way(values: tuple[int, ...]) -> tuple[int, ...]:
        return values[::-1] if turned else values

    def results(net: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        found = []
        for ceil in (False, True):
            for kernel, stride, padding in (map(way, how) for how in POOLINGS):
                found += [
                    F.avg_pool2d(x, kernel, stride, padding, ceil, True),
                    F.avg_pool2d(x, kernel, stride, padding, ceil, False),
                    F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil),
                    F.max_pool2d(x, way((2, 3)), stride, way((1, 1)), way((3, 2)), ceil_mode=ceil),
                ]
        return tuple(found)

    compare(quantized(Net(results), images(2, WIDE, *way((6, 11)))))


def test_maxima_look_along_three_axes() -> None:
    def results(net: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        return (
            F.max_pool3d(x, (2, 3, 2), (1, 2, 2), (1, 1, 1), (2, 1, 2)),
            F.max_pool3d(x, (3, 2, 3), (2, 1, 1), (0, 1, 1), (1, 2, 1), ceil_mode=True),
        )

    compare(quantized(Net(results), images(2, 3, 4, 5, 6)))


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "flat": (nn.Conv2d(4, 9, (3, 2), (2, 1), (2, 1), (2, 3)), (4, 11, 6)),
    "groups": (nn.Conv2d(6, 10, (2, 3), (1, 2), (1, 3), (3, 1), groups=2), (6, 6, 11)),
    "many": (nn.Conv2d(3, WIDE, 3, padding=1), (3, 5, 4)),
    "line": (nn.Conv1d(4, 6, 3, 2, 3, 2), (4, 9)),
    "deep": (nn.Conv3d(2, 5, (2, 3, 2), (2, 1, 1), (1, 2, 1), (2, 1, 3)), (2, 5, 4, 6)),
    "each": (nn.Conv2d(WIDE, WIDE, (3, 4), (1, 2), (2, 3), (2, 1), groups=WIDE), (WIDE, 6, 7)),
    "each_deep": (nn.Conv3d(3, 3, (2, 3, 5), (1, 2, 1), (1, 1, 4), (2, 1, 2), 3), (3, 4, 5, 6)),
    "up": (nn.ConvTranspose2d(4, 6, (3, 2), (2, 3), (1, 0), (1, 2), dilation=(2, 1)), (4, 4, 5)),
    "up_groups": (nn.ConvTranspose2d(4, 6, 3, (1, 2), (2, 1), 0, 2, dilation=(1, 2)), (4, 4, 5)),
    "up_deep": (nn.ConvTranspose3d(2, 3, (2, 1, 3), (2, 1, 2), (1, 0, 1)), (2, 3, 3, 4)),
}  # fmt: skip


@pytest.mark.parametrize("optimize", [False, True])
def test_windows_of_convolutions_hang_over_every_edge(optimize: bool) -> None:
    torch.manual_seed(0)
    names = list(CONVOLUTIONS)

    def results(net: nn.Module, *x: Tensor) -> tuple[Tensor, ...]:
        signed = [getattr(net, n)(t) for n, t in zip(names, x, strict=True)]
        return *signed, *(getattr(net, n)(t.relu()) for n, t in zip(names, x, strict=True))

    layers = {name: layer for name, (layer, _) in CONVOLUTIONS.items()}
    inputs = [images(2, *shape) for _, shape in CONVOLUTIONS.values()]
    compare(quantized(Net(results, **layers), *inputs), optimize=optimize)


# ------------------------------------------------------------------ rows


@pytest.mark.parametrize("rounding", ["half_even", "half_up"])
def test_rows_of_any_length_are_summed(rounding: str) -> None:
    torch.manual_seed(0)
    wide = nn.Linear(33, WIDE)
    layers = {"wide": wide, "narrow": nn.Linear(33, 5), "single": nn.Linear(33, 1, bias=False)}

    def results(net: Any, x: Tensor) -> tuple[Tensor, ...]:
        made = net.wide(x)
        return (
            made, net.narrow(x), net.single(x), x @ made, x.transpose(1, 2) @ x, made.softmax(-1),
            made.softmax(1), x.mean(-1), x.mean(1), made.mean((1, 2), keepdim=True), made.amax(-1),
            made.amin(1), made.amax((1, 2)), x.amin(-1, keepdim=True),
        )  # fmt: skip

    compare(quantized(Net(results, **layers), images(2, 33, 33), rounding=rounding))


def test_operands_of_every_arrangement_meet() -> None:
    def results(net: Any, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        found = []
        for a, b in ((x, y), (x, z), (x.transpose(1, 2), y.transpose(1, 2).contiguous())):
            found += [a + b, a - b, b - a, a * b, a - 4 * b]
        turned = x.transpose(1, 2)
        return (
            *found, torch.cat([x, 8 * y], 1), torch.cat([x, y * y], 2), turned.sigmoid() - 0.5,
            F.pad(x, (1, 2, 0, 3)), F.pad(x, (-1, 2, 1, -1)), turned.clamp(-0.5, 0.75),
            x[:, ::2, 1::3] * 0.5, x.flip(1) + y,
        )  # fmt: skip

    shapes = (2, 6, 7), (2, 6, 7), (2, 6, 1)
    inputs = [images(*shape) for shape in shapes]
    compare(quantized(Net(results), *inputs))


def test_an_index_is_within_its_table() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[0, 10], [3, 10]])
    program = quantized(Net(lambda net, x: (net.table(x),), table=nn.Embedding(11, 5)), ids)
    compare(program, draws=1)
    opened = narrows.lower(program, "c", check=False, batch=2).open(optimize=False)
    (name,) = (n.name for n in program.placeholders)
    for index in (11, -1, 2**32):
        with pytest.raises(ArtifactError, match=r"(?s)refuses its input.*index is out of range"):
            opened.run({name: np.array([[0, 1], [2, index]])})


@pytest.mark.parametrize("name", ["borders", "quotients", "choices"])
def test_operators_do_nothing_undefined(name: str) -> None:
    compare(integers(name))


# ------------------------------------------------------------------ numbers of the code


def test_a_self_test_holds_a_vector_however_large_it_is() -> None:
    def count(*sizes: int) -> int:
        ports: Any = [SimpleNamespace(size=s) for s in sizes]
        drawn: Any = SimpleNamespace(inputs=ports[:1], outputs=ports[1:])
        return files.vector_count(drawn)

    assert count(files.VECTOR_CODES, 1) == 1
    assert count(0) == count(1, 1) == files.MOST_VECTORS


def test_rounding_counts_among_what_leaves_32_bits() -> None:
    wide: list[str] = []
    sketch: Any = SimpleNamespace(widen=wide.append)
    node: Any = "n"
    assert Sketch.shift(sketch, node, 5, 2**31 - 17) == 5
    assert wide == []
    assert Sketch.shift(sketch, node, 5, 2**31 - 16) == 5
    assert wide == ["n"]


def test_an_average_of_wide_codes_is_shifted_as_far_as_those_reach() -> None:
    graph, made = fx.Graph(), []
    for kind in (torch.int16, torch.uint8):
        x = graph.placeholder(f"x{len(made)}")
        Meta(x).dtype = kind
        made.append(graph.call_function(torch.neg, (x,)))
        Meta(made[-1]).dtype = torch.uint8
    sketch: Any = None  # only asked to refuse
    assert average_shift(sketch, made[0], 16, 1, 1) == 16
    assert average_shift(sketch, made[1], 16, 1, 1) == 11
