"""Networks through the TVM backend; `lower` itself compares each with its program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

import narrows
from narrows.backends import lower, make_target
from narrows.backends.artifact import load
from narrows.backends.tvm import compiler, versions
from narrows.backends.tvm.describe import describe
from narrows.backends.tvm.devices import DEVICES
from narrows.errors import ArtifactError, LowerError, UsageError
from narrows.frontend import capture
from tests.backends.marks import NEEDS_TVM

pytestmark = [NEEDS_TVM, pytest.mark.usefixtures("own_cache")]

ROOT = Path(narrows.__file__).parents[1]


class Net(nn.Module):
    """A forward that is given as a function, with its modules by keyword."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def images(channels: int = 3, size: int = 9) -> tuple[Tensor]:
    return (torch.randn(2, channels, size, size),)


def tokens(count: int = 11, width: int = 24) -> tuple[Tensor]:
    return (torch.randn(2, count, width),)


def gated(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    gate = torch.sigmoid(net.c(F.silu(net.b(x.mean((2, 3), keepdim=True)))))
    return net.d(x * gate)


def shuffled(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    first, second = x.chunk(2, 1)
    y = torch.cat([first, net.b(second)], 1)
    n, c, h, w = y.shape
    return net.c(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def patched(net: Any, x: Tensor) -> Tensor:
    y = net.a(x).flatten(2).transpose(1, 2)
    return net.b(y).mean(1)


# One small network per family of kernels and way of storing.
NETS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "classifier": lambda: (
        nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1), conv(8, 37),
                      nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(37, 5)),
        images(),
    ),
    "residual": lambda: (
        Net(lambda s, x: (s.b(s.a(x).relu()) + s.c(x)).relu(), a=conv(3, 21), b=conv(21, 40),
            c=conv(3, 40, 1)),
        images(),
    ),
    "depthwise": lambda: (
        nn.Sequential(conv(4, 24, 1), nn.ReLU6(), conv(24, 24, 5, groups=24, stride=2),
                      nn.Hardswish(), conv(24, 10, 1)),
        images(4, 10),
    ),
    "grouped": lambda: (
        nn.Sequential(conv(12, 24, groups=3), nn.ELU(), conv(24, 36, groups=12), nn.Mish()),
        images(12),
    ),
    "gated": lambda: (
        Net(gated, a=conv(3, 20), b=conv(20, 5, 1), c=conv(5, 20, 1), d=conv(20, 7)),
        images(),
    ),
    "concat-before-norm": lambda: (
        Net(lambda s, x: s.c(torch.cat([s.a(x), x, s.b(x)], 1)), a=conv(3, 5), b=conv(3, 19),
            c=nn.Sequential(nn.BatchNorm2d(27), nn.ReLU(), conv(27, 9, 1))),
        images(),
    ),
    "shuffled": lambda: (Net(shuffled, a=conv(3, 20), b=conv(10, 10), c=conv(20, 6)), images()),
    "ragged-concat": lambda: (
        Net(lambda s, x: s.b(torch.cat([s.a(x), x], 1)), a=conv(3, 7),
            b=conv(10, 10, groups=10)),
        images(),
    ),
    "transposed": lambda: (
        nn.Sequential(nn.ConvTranspose2d(3, 18, 3, 2, 1, 1), nn.GroupNorm(3, 18), conv(18, 4)),
        images(),
    ),
    "resized": lambda: (
        nn.Sequential(conv(3, 17), nn.Upsample(scale_factor=2, mode="bilinear"), conv(17, 5),
                      nn.Upsample(scale_factor=1.5), nn.PixelShuffle(1)),
        images(),
    ),
    "transformer": lambda: (nn.TransformerEncoderLayer(24, 3, 48, batch_first=True), tokens()),
    "patches": lambda: (
        Net(patched, a=nn.Conv2d(3, 24, 4, 4),
            b=nn.TransformerEncoderLayer(24, 2, 30, activation="gelu", batch_first=True,
                                         norm_first=True)),
        images(size=20),
    ),
    "signal": lambda: (
        nn.Sequential(nn.Conv1d(3, 20, 5, 2), nn.GELU(), nn.AvgPool1d(3, 2, 1),
                      nn.Conv1d(20, 6, 1)),
        (torch.randn(2, 3, 40),),
    ),
    "volume": lambda: (
        nn.Sequential(nn.Conv3d(3, 9, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2),
                      nn.Conv3d(9, 4, 1)),
        (torch.randn(2, 3, 6, 6, 6),),
    ),
    "embedding": lambda: (
        Net(lambda s, i: s.b(s.a(i)).softmax(-1), a=nn.Embedding(7, 20), b=nn.Linear(20, 5)),
        (torch.randint(7, (2, 4)),),
    ),
    "lookups": lambda: (
        Net(lambda s, x, i: s.a(x).index_select(1, i).relu(), a=nn.Linear(3, 12)),
        (torch.randn(2, 13, 3), torch.randint(13, (5,))),
    ),
    "several-outputs": lambda: (
        Net(lambda s, x: {"y": s.a(x), "x": x, "size": x.shape[2], "top": s.a(x).amax(1)},
            a=conv(3, 8)),
        images(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_the_artifact_equals_the_model(name: str, tmp_path: Path):
    module, inputs = NETS[name]()
    module.eval()
    artifact = lower(capture(module, inputs), "tvm", tune=0, batch=2)
    assert artifact.fidelity["checked"][0]["error"] < 1e-5
    assert not artifact.manifest["build"]["unscheduled"]
    artifact.save(tmp_path / "out")
    actual = leaves(load(tmp_path / "out").run(*inputs))
    with torch.no_grad():
        expected = leaves(module(*inputs))
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, np.asarray(want), rtol=1e-4, atol=1e-5)


def leaves(value: Any) -> list[Any]:
    return pytree.tree_leaves(value)


def small() -> Any:
    module, inputs = NETS["classifier"]()
    return capture(module.eval(), inputs)


def test_the_batch_is_the_one_asked_for():
    artifact = lower(small(), "tvm", tune=0, batch=3)
    assert artifact.inputs[0].shape == (3, 3, 9, 9)
    assert artifact.run(torch.zeros(3, 3, 9, 9)).shape == (3, 5)
    with pytest.raises(ArtifactError, match=r"the model takes \[3,3,9,9\]"):
        artifact.run(torch.zeros(1, 3, 9, 9))


@pytest.mark.parametrize("threads", [1, 2])
def test_it_runs_without_torch(threads: int, tmp_path: Path):
    lower(small(), "tvm", tune=0).save(tmp_path / "out")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np, narrows\n"
        f"artifact = narrows.load({str(tmp_path / 'out')!r}, trust=True)\n"
        f"print(artifact.run(np.zeros((1, 3, 9, 9), 'float32'), threads={threads}).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout.strip() == "(1, 5)", done.stderr


def test_the_importer_of_tvm_is_a_way_out():
    artifact = lower(small(), "tvm", tune=0, importer="tvm")
    assert artifact.fidelity["checked"][0]["error"] < 1e-5


# ------------------------------------------------------------------ devices

MACHINES = {"aarch64": 183, "riscv64": 243}  # ELF's numbers


@pytest.mark.parametrize("device", MACHINES)
def test_other_processors_get_objects_or_a_library(device: str):
    artifact = lower(small(), f"tvm:{device}")
    for name in artifact.manifest["files"]:
        head = (artifact.folder / name).read_bytes()[:20]
        assert head[:4] == b"\x7fELF"
        assert int.from_bytes(head[18:20], "little") == MACHINES[device]
    assert artifact.fidelity == {}
    with pytest.raises(ArtifactError):
        artifact.run(torch.zeros(1, 3, 9, 9))


@pytest.mark.parametrize("device", ["cuda", "opencl", "webgpu"])
def test_gpus_get_source_without_being_there(device: str):
    artifact = lower(small(), f"tvm:{device}")
    source = artifact.folder / f"model_0.{DEVICES[device].source}"
    text = source.read_text()
    assert {"cuda": "__global__", "opencl": "__kernel", "webgpu": "@compute"}[device] in text


def test_another_processor_of_this_kind_can_be_named():
    program = small()
    machine = DEVICES["llvm"]
    assert machine.runs_here
    artifact = lower(program, "tvm", tune=0, mcpu="x86-64")
    assert '"mcpu":"x86-64"' in artifact.manifest["build"]["target"]


# ------------------------------------------------------------------ errors


def test_missing_rules_are_told_all_at_once():
    module = Net(lambda s, x: torch.special.i0(torch.erfinv(s.a(x).tanh() * 0.5)), a=conv(3, 4))
    with pytest.raises(LowerError) as caught:
        lower(capture(module.eval(), images()), "tvm", tune=0)
    text = str(caught.value)
    assert "no rule for 2 operators" in text
    assert "erfinv.default" in text
    assert "special_i0.default" in text
    assert "test_tvm.py" in text


def test_what_a_rule_cannot_express_is_told_with_its_place():
    norm = nn.BatchNorm2d(3, track_running_stats=False).eval()
    with pytest.raises(LowerError, match="statistics of its batch") as caught:
        lower(capture(norm, images()), "tvm", tune=0)
    assert "cannot lower" in caught.value.what


def test_a_dtype_without_a_form_is_refused():
    program = capture(nn.Linear(4, 3).eval(), (torch.randn(2, 4),)).to(torch.bfloat16)
    with pytest.raises(LowerError, match="no form for bfloat16"):
        describe(program, list(program.examples), list(program.output.all_input_nodes))


def test_a_crash_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    worker = tmp_path / "crashing_worker.py"
    worker.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(compiler, "WORKER", "crashing_worker")
    with pytest.raises(LowerError, match="SIGSEGV"):
        lower(small(), "tvm", tune=0)


def test_an_interrupt_ends_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    worker = tmp_path / "sleeping_worker.py"
    worker.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(compiler, "WORKER", "sleeping_worker")
    found: list[int] = []

    def interrupt(line: str) -> None:
        found.append(int(line))
        raise KeyboardInterrupt

    monkeypatch.setattr("narrows.backends.tvm.target._tell", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lower(small(), "tvm", tune=0)
    with pytest.raises(ProcessLookupError):
        os.kill(found[0], signal.SIGTERM)


def test_a_library_that_is_wrong_is_found():
    program = small()
    other = capture(NETS["classifier"]()[0].eval(), images())
    with pytest.raises(LowerError, match="differs from the program"):
        lower(program, "tvm", tune=0, reference=other)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ({}, "it needs apache-tvm and apache-tvm-ffi: pip install"),
        ({"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.15"}, "0.1.15 is installed"),
    ],
)
def test_a_version_that_does_not_fit_is_told(
    found: dict[str, str], wanted: str, monkeypatch: pytest.MonkeyPatch
):
    program = small()
    artifact = lower(program, "tvm", tune=0)
    monkeypatch.setattr(versions, "installed", lambda name: found.get(name, ""))
    with pytest.raises(LowerError, match="is not available") as caught:
        lower(program, "tvm", tune=0)
    assert wanted in caught.value.why
    with pytest.raises(ArtifactError) as caught_:
        artifact.run(torch.zeros(1, 3, 9, 9))
    assert "pip install apache-tvm==" in caught_.value.hint


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("tvm:arm", {}, "no device 'arm'"),
        ("tvm:llvm", {"device": "cuda"}, "names a device, and so does"),
        ("onnx:cuda", {}, "no option 'device'"),
        ("tvm", {"importer": "torch"}, "takes the importer"),
        ("tvm", {"batch": 0}, "a batch of 1 or more"),
        ("tvm", {"tune": -1}, "a tune of 0 or more"),
        ("tvm", {"tune": "soon"}, "tune='soon' is no time"),
        ("tvm", {"tune": 1.5}, "takes int or str, got 1.5"),
        ("tvm", {"tune": True}, "takes int or str, got True"),
        ("tvm", {"search": "meta-schedule"}, "takes the search rules or metaschedule"),
        ("tvm", {"search": "metaschedule", "tune": 0}, "would have no effect"),
        ("tvm:aarch64", {"search": "metaschedule"}, "code for aarch64 runs elsewhere"),
    ],
)
def test_wrong_options_are_refused(target: str, options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        make_target(target, **options)


def test_an_unknown_processor_is_refused():
    with pytest.raises(LowerError, match="cannot compile for llvm") as caught:
        lower(small(), "tvm", tune=0, mcpu="i1486")
    assert "i1486" in caught.value.why
