"""Networks through the ONNX backend; `lower` itself compares each with its program."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.backends import lower
from narrows.backends.artifact import Artifact, load
from narrows.errors import ArtifactError, LowerError
from narrows.frontend import capture
from narrows.ir.meta import Meta
from narrows.ir.program import Program

ROOT = Path(narrows.__file__).parents[1]


class Net(nn.Module):
    """A forward that is given as a function, with its modules and parameters by keyword."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def net(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    return Net(forward, **parts).eval()


def images(channels: int = 3, size: int = 8) -> tuple[Tensor]:
    return (torch.randn(2, channels, size, size),)


def graph_of(artifact: Artifact) -> onnx.GraphProto:
    return onnx.load(artifact.folder / "model.onnx").graph


def ops_of(artifact: Artifact) -> Counter[str]:
    return Counter(node.op_type for node in graph_of(artifact).node)


def weights_of(artifact: Artifact) -> set[str]:
    return {tensor.name for tensor in graph_of(artifact).initializer}


def classifier() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


# ------------------------------------------------------------------ networks

NETS: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "classifier": lambda: (classifier(), images()),
    "residual": lambda: (
        net(lambda s, x: (s.b(s.a(x).relu()) + x).relu(), a=conv(3, 5), b=conv(5, 3)),
        images(),
    ),
    "concat": lambda: (
        net(lambda s, x: s.c(torch.cat([s.a(x), x, s.b(x)], 1)), a=conv(3, 5), b=conv(3, 2),
            c=conv(10, 4)),
        images(),
    ),
    "depthwise": lambda: (
        nn.Sequential(conv(4, 8, groups=4), nn.ReLU6(), conv(8, 6, groups=2)).eval(),
        images(4),
    ),
    "transposed": lambda: (nn.ConvTranspose2d(3, 4, 3, 2, 1, 1).eval(), images()),
    "bare-norm": lambda: (
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3, affine=False), nn.GroupNorm(3, 3)).eval(),
        images(),
    ),
    "attention": lambda: (
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(),
        (torch.randn(2, 5, 16),),
    ),
    "embedding": lambda: (
        net(lambda s, ids: s.fc(s.e(ids)).mean(1), e=nn.Embedding(7, 6), fc=nn.Linear(6, 3)),
        (torch.randint(7, (2, 4)),),
    ),
    "unequal-pooling": lambda: (nn.AdaptiveAvgPool2d((3, 2)).eval(), images(2, 7)),
    "equal-pooling": lambda: (
        net(lambda s, x: (F.adaptive_avg_pool2d(x, 4), F.adaptive_max_pool2d(x, (2, 1)))),
        images(),
    ),
    "resize": lambda: (nn.Upsample(scale_factor=2, mode="bilinear").eval(), images()),
    "masked": lambda: (
        net(lambda s, x, m: x.masked_fill(m, -1e9).softmax(1)),
        (torch.randn(2, 4), torch.tensor([[True, False, False, True]]).expand(2, 4).clone()),
    ),
    "batch-arithmetic": lambda: (
        net(lambda s, x: x.reshape(x.shape[0] * 2, -1) + torch.arange(2 * x.shape[0])[:, None]),
        (torch.randn(2, 6),),
    ),
    "whole-numbers": lambda: (
        net(lambda s, x: (x.argmax(1), x > 0, x.topk(2))),
        (torch.randn(2, 5),),
    ),
    # The exporter has no form for this norm, and takes it apart only when told to.
    "batch-statistics": lambda: (nn.BatchNorm2d(3, track_running_stats=False).eval(), images()),
    "unused-input": lambda: (net(lambda s, x, y: x * 2), (torch.randn(2, 4), torch.randn(2, 3))),
    "recurrent": lambda: (nn.GRU(4, 5, batch_first=True).eval(), (torch.randn(2, 3, 4),)),
}  # fmt: skip


def conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


@pytest.mark.parametrize("name", NETS)
def test_the_artifact_equals_the_model_at_any_batch(name: str):
    module, inputs = NETS[name]()
    artifact = lower(capture(module, inputs), samples=1)
    assert max(check["error"] for check in artifact.fidelity["checked"]) < 1e-5
    assert "Identity" not in ops_of(artifact)
    batch = tuple(torch.cat([x] * 4)[:7] for x in inputs)
    with torch.no_grad():
        expected = module(*batch)
    actual = artifact.run(*batch)
    for got, want in zip(flat(actual), flat(expected), strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-5)


def flat(value: Any) -> list[Any]:
    return [v for part in value for v in flat(part)] if isinstance(value, tuple) else [value]


# ------------------------------------------------------------------ clean-ups


def test_means_over_all_positions_are_global_average_pooling():
    module = net(
        lambda s, x: (
            F.adaptive_avg_pool2d(x, 1),
            F.adaptive_avg_pool2d(x + 1, (1, 1)).flatten(1),
            (x + 2).mean([2, 3]),
            (x + 3).mean((-1, -2), keepdim=True),
            F.adaptive_avg_pool1d((x + 4).flatten(2), 1),
        )
    )
    program = capture(module, images())
    for simplify in (True, False):
        ops = ops_of(lower(program, simplify=simplify, samples=1))
        assert ops["GlobalAveragePool"] == 5
        assert ops["ReduceMean"] == 0


def test_another_mean_stays_a_mean():
    module = net(lambda s, x: tuple(x.mean(axes) for axes in ([1], [2], [1, 2, 3], [0, 2, 3])))
    program = capture(module, images(), dynamic_batch=False)
    ops = ops_of(lower(program, samples=1))
    assert ops == {"ReduceMean": 4}


def test_the_mean_of_a_matrix_over_all_it_has_stays_a_mean():
    program = capture(net(lambda s, x: x.mean(())), (torch.randn(2, 4),), dynamic_batch=False)
    assert ops_of(lower(program, samples=1)) == {"ReduceMean": 1}


def test_pooling_of_a_tensor_without_features_stays_a_mean():
    program = capture(net(lambda s, x: x.mean(1)), (torch.randn(2, 4),))
    assert ops_of(lower(program, samples=1)) == {"ReduceMean": 1}


def test_weights_and_nodes_keep_their_names():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Linear(64, 5))
    artifact = lower(capture(module.eval(), images()))
    assert weights_of(artifact) >= {"0.weight", "0.bias", "2.weight.T", "2.bias"}
    graph = graph_of(artifact)
    names = {node.name for node in graph.node}
    assert {"_0", "_2"} <= names
    assert all(node.name == node.output[0] for node in graph.node)


def test_nothing_of_the_exporter_stays_in_the_file():
    artifact = lower(capture(classifier(), images(), name="digits"))
    model = onnx.load(artifact.folder / "model.onnx")
    assert (model.producer_name, model.producer_version) == ("narrows", narrows.__version__)
    assert model.graph.name == "digits"
    assert __file__.encode() not in (artifact.folder / "model.onnx").read_bytes()
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_an_input_and_a_weight_may_have_one_name():
    scale = nn.Parameter(torch.randn(4))
    module = net(lambda s, x: x * s.input_1 + s.add, input_1=scale, add=nn.Parameter(scale + 1))
    program = capture(nn.Sequential(module).eval(), (torch.randn(2, 4),)).copy()
    holder = program.placeholders[0]
    weights = {name.removeprefix("0."): t for name, t in program.weights.items()}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            node.target = str(node.target).removeprefix("0.")
    artifact = lower(program.replace(weights=weights, buffers=frozenset()).seal())
    assert holder.name in weights
    assert artifact.inputs[0].name == holder.name


def test_lowering_twice_gives_the_same_bytes():
    program = capture(classifier(), images())
    first, second = lower(program, samples=1), lower(program, check=False)
    assert first.manifest["files"] == second.manifest["files"]


@pytest.mark.parametrize("opset", [18, 23])
def test_the_opset_can_be_chosen(opset: int):
    artifact = lower(capture(classifier(), images()), opset=opset, samples=1)
    imports = onnx.load(artifact.folder / "model.onnx").opset_import
    assert [(i.domain, i.version) for i in imports] == [("", opset)]


# ------------------------------------------------------------------ inputs and outputs


def test_outputs_that_are_inputs_weights_numbers_or_the_same():
    weight = nn.Parameter(torch.arange(3.0))
    module = net(
        lambda s, x: (x, s.w, x.shape[0], s.drop(x), x * 2, s.w, None, 7),
        w=weight, drop=nn.Dropout(),
    )  # fmt: skip
    artifact = lower(capture(module, (torch.randn(2, 4),)), samples=1)
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    got = artifact.run(x)
    for value, want in zip(got[:6], (x, [0, 1, 2], 3, x, 2 * x, [0, 1, 2]), strict=True):
        assert np.array_equal(value, want)
    assert got[6:] == (None, 7)
    assert isinstance(got[2], int)


def test_a_program_that_computes_nothing_is_refused():
    program = capture(net(lambda s, x: (x,)), (torch.randn(2, 3),), name="nothing")
    with pytest.raises(LowerError, match="nothing computes nothing"):
        lower(program)


def test_a_note_tells_of_a_structure_that_degrades():
    program = capture(net(lambda s, x: OrderedDict(y=x * 2)), (torch.randn(2, 3),))
    artifact = lower(program, samples=1)
    assert [(n["reason"], n["where"], n["message"]) for n in artifact.notes] == [
        ("structure", "outputs", "OrderedDict runs as a plain dict")
    ]
    assert list(artifact.run(np.ones((1, 3), np.float32))) == ["y"]


# ------------------------------------------------------------------ external data


def test_weights_beyond_the_limit_go_to_a_file_of_their_own(tmp_path: Path):
    module = classifier()
    artifact = lower(capture(module, images()), inline_limit=200, samples=1)
    assert set(artifact.manifest["files"]) == {"model.onnx", "model.onnx.data"}
    again = load(artifact.save(tmp_path / "out"))
    x = images()[0]
    with torch.no_grad():
        np.testing.assert_allclose(again.run(x), module(x).numpy(), rtol=1e-4, atol=1e-6)
    data = bytearray((tmp_path / "out" / "model.onnx.data").read_bytes())
    data[0] ^= 1
    (tmp_path / "out" / "model.onnx.data").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model.onnx.data is corrupt"):
        load(tmp_path / "out")


# ------------------------------------------------------------------ refusing


def test_an_operator_without_an_onnx_form_is_named_with_its_line():
    def forward(s: Net, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x * 2)

    with pytest.raises(LowerError) as caught:
        lower(capture(net(forward), (torch.rand(2, 3),)))
    assert caught.value.what == "ONNX has no form for special_bessel_j0.default"
    assert "test_onnx.py:" in caught.value.where
    assert "torch.special.bessel_j0(x * 2)" in caught.value.where


def test_an_operator_whose_parts_have_no_onnx_form_is_named():
    with pytest.raises(LowerError, match=r"(?s)no form for cdist\.default.*at cdist"):
        lower(capture(net(lambda s, x: torch.cdist(x, x + 1)), (torch.rand(2, 3),)))


def test_an_operator_that_fixes_the_batch_is_named():
    program = capture(
        net(lambda s, x: x.reshape(2, 12).relu()), (torch.rand(2, 3, 4),), dynamic_batch=False
    ).copy()
    Meta(program.placeholders[0]).dynamic = (0,)
    with pytest.raises(LowerError, match=r"(?s)reshape\.default.*at reshape.*dynamic_batch=False"):
        lower(program.replace(dynamic_batch=True).seal())


def test_a_type_without_kernels_is_refused_with_a_remedy():
    program = capture(nn.Conv2d(3, 4, 1).double().eval(), (images()[0].double(),))
    with pytest.raises(LowerError, match=r"(?s)cannot run.*NOT_IMPLEMENTED.*program\.to\(torch"):
        lower(program)
    artifact = lower(program.to(torch.float32), samples=1)
    assert artifact.inputs[0].dtype == "float32"


# ------------------------------------------------------------------ noise

NOISY = """
import warnings
warnings.simplefilter("always")
import torch
from narrows.backends import lower
from narrows.frontend import capture
from tests.networks import NETWORKS

network = NETWORKS["causal_chunks"]
program = capture(network.build(), network.inputs()).to(torch.float32)
print("before", flush=True)
lower(program, opset=18)
print("after")
"""


def test_lowering_prints_nothing():
    # onnxsim warns of this network in native code, torch.onnx of others in Python.
    result = subprocess.run([sys.executable, "-c", NOISY], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "before\nafter\n"
    lines = result.stderr.splitlines()
    assert not [line for line in lines if "onnx" in line.lower() or "WARNING" in line]


def test_a_failure_leaves_loggers_and_warnings_as_they_were():
    import logging
    import warnings

    logger = logging.getLogger("torch.onnx")
    before = (logger.level, list(warnings.filters), sys.stdout, sys.stderr)
    with pytest.raises(LowerError):
        lower(capture(net(lambda s, x: torch.cdist(x, x + 1)), (torch.rand(2, 3),)))
    assert (logger.level, list(warnings.filters), sys.stdout, sys.stderr) == before


def test_the_program_is_left_as_it_was():
    program: Program = capture(classifier(), images())
    before, keys = str(program.graph), [sorted(n.meta) for n in program.nodes]
    weights = dict(program.weights)
    lower(program, samples=1)
    assert str(program.graph) == before
    assert [sorted(n.meta) for n in program.nodes] == keys
    assert all(program.weights[name] is tensor for name, tensor in weights.items())


# ------------------------------------------------------------------ spellings that ONNX lacks


def test_an_image_of_bytes_is_lowered_with_the_names_of_its_nodes():
    """Taking `to` apart renames every node; one of the new names was that of another's output."""

    def forward(self: Net, image: Tensor) -> tuple[Tensor, Tensor]:
        x = image.permute(0, 3, 1, 2).to(self.mean.dtype) / 255.0 - self.mean
        return self.head(self.conv(x).relu().mean([-2, -1])), image.float().mean()

    mean = nn.Parameter(torch.rand(1, 3, 1, 1), requires_grad=False)
    net = Net(forward, mean=mean, conv=nn.Conv2d(3, 6, 3), head=nn.Linear(6, 2)).eval()
    image = torch.randint(0, 256, (2, 6, 6, 3), dtype=torch.uint8)
    program = capture(net, (image,))
    artifact = lower(program)
    assert artifact.inputs[0].dtype == "uint8"
    made = {n for node in graph_of(artifact).node for n in node.output}
    assert {"permute", "conv", "relu", "head"} <= made


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(
    "how",
    [
        {"kernel_size": 3, "divisor_override": 5},
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True, "divisor_override": 4},
        {"kernel_size": 2, "stride": 3, "ceil_mode": True, "divisor_override": 3},
    ],
    ids=["plain", "padded", "beyond the end"],
)
def test_an_average_with_a_divisor_of_its_own(rank: int, how: dict[str, Any]):
    pool = (F.avg_pool2d, F.avg_pool3d)[rank - 2]
    for size in (7, 8):
        x = torch.randn(2, 3, *[size] * rank)
        lower(capture(Net(lambda self, x: pool(x, **how)).eval(), (x,)), samples=1)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_windows_that_would_begin_behind_the_end(rank: int):
    """torch has none of them, ONNX has: along all axes, and beside one that ends in a part."""

    def pooled(x: Tensor, kind: str, kernel: Any, stride: Any, **counts: Any) -> Tensor:
        return getattr(F, f"{kind}_pool{rank}d")(x, kernel, stride, 1, ceil_mode=True, **counts)

    def forward(self: Any, x: Tensor) -> list[Tensor]:
        both = [2] * (rank - 1) + [3], [3] * (rank - 1) + [2]
        means = [pooled(x, "avg", *how, count_include_pad=c)
                 for how in ((2, 3), both) for c in (True, False)]  # fmt: skip
        return [*means, pooled(x, "max", 2, 3), pooled(x, "max", *both)]

    x = torch.randn(2, 3, *[10] * rank)
    lower(capture(Net(forward).eval(), (x,)), samples=1)


@pytest.mark.parametrize("target", ["onnx", "torch"])
def test_bfloat16_is_lowered_as_float32(target: str):
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(96, 4))
    x = torch.randn(2, 3, 6, 6).bfloat16()
    program = capture(net.eval().bfloat16(), (x,))
    artifact = narrows.lower(narrows.apply(program, {"ratio": 0.5}), target)
    assert artifact.inputs[0].dtype == "float32"
    assert "bfloat16 is lowered as float32" in str(artifact.notes)
    wide = narrows.apply(program, {"ratio": 0.5}).to(torch.float32)(x.float())
    np.testing.assert_allclose(artifact.run(x), wide, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(artifact.run(x.float()), artifact.run(x))


def test_bfloat16_beside_another_narrow_type_is_refused():
    net = Net(lambda self, x: self.layer(x).half() * 2, layer=nn.Linear(4, 4).bfloat16()).eval()
    program = capture(net, (torch.randn(2, 4).bfloat16(),))
    with pytest.raises(LowerError, match="computes in bfloat16 and in another type"):
        lower(program)
