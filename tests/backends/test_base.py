"""Targets by name, their options, and what looking one up costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import narrows
from narrows import registry
from narrows.backends import base, lower, make_target, target_names, target_type
from narrows.backends.onnx import OnnxTarget
from narrows.backends.sessions import runtime_of
from narrows.errors import ArtifactError, LowerError, UsageError
from narrows.frontend import capture

ROOT = Path(narrows.__file__).parents[1]


def test_onnx_is_found_by_name():
    assert "onnx" in target_names()
    assert target_type("onnx") is OnnxTarget
    assert OnnxTarget.summary
    assert OnnxTarget.available() is None


def test_an_unknown_target_gets_a_suggestion():
    with pytest.raises(UsageError, match=r"(?s)no target 'onxn'.*did you mean 'onnx'\?"):
        target_type("onxn")


def test_options_are_fields():
    assert make_target("onnx", opset=21, simplify=False) == OnnxTarget(opset=21, simplify=False)
    assert make_target(OnnxTarget(opset=21), check=False) == OnnxTarget(opset=21, check=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opsett": 21}, r"(?s)onnx has no option 'opsett'.*did you mean 'opset'\?"),
        ({"opset": "21"}, r"option 'opset' of onnx takes int, got '21'"),
        ({"opset": True}, r"option 'opset' of onnx takes int, got True"),
        ({"check": 1}, r"option 'check' of onnx takes bool, got 1"),
        ({"opset": 11}, r"onnx takes an opset from 18 to 25, got 11"),
        ({"opset": 99}, r"onnx takes an opset from 18 to 25, got 99"),
        ({"samples": 0}, r"onnx takes 1 sample or more, got 0"),
        ({"inline_limit": 1 << 40}, r"onnx takes an inline_limit up to 2,000,000,000"),
    ],
)
def test_a_wrong_option_is_told(options: dict[str, object], message: str):
    with pytest.raises(UsageError, match=message):
        make_target("onnx", **options)


def test_a_target_that_is_not_available_says_why(monkeypatch: pytest.MonkeyPatch):
    program = capture(nn.ReLU().eval(), (torch.randn(2, 3),))
    monkeypatch.setattr(OnnxTarget, "available", classmethod(lambda cls: "it needs onnxsim"))
    with pytest.raises(LowerError, match=r"(?s)onnx is not available.*it needs onnxsim"):
        lower(program)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if "sim" in name else name)
    assert OnnxTarget.available() == "it needs onnxsim: pip install onnxsim"


def test_looking_a_target_up_imports_neither_torch_nor_onnx():
    code = (
        "import sys\n"
        "from narrows.backends import make_target\n"
        "make_target('onnx', opset=21)\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'onnxsim', 'onnxscript'}\n"
        "sys.exit(','.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stderr) == (0, "")


def test_every_registered_target_exists():
    for name in base.TARGETS.builtin:
        assert target_type(name).name == name


class Entry:
    def __init__(self, name: str, value: str) -> None:
        self.name, self.value = name, value


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what adds an entry point for every group."""

    def add(name: str, value: str) -> None:
        monkeypatch.setattr(registry, "installed", lambda group: [Entry(name, value)])

    return add


def test_two_providers_of_one_name_are_an_error_that_names_both(enter: Any):
    enter("onnx", "other.package:X")
    with pytest.raises(LowerError, match=r"(?s)provide the target 'onnx'.*other\.package:X"):
        target_type("onnx")
    with pytest.raises(
        ArtifactError, match=r"(?s)provide the runtime of the target 'onnx'.*uninst"
    ):
        runtime_of("onnx")


def test_a_target_under_a_false_name_is_refused(enter: Any):
    enter("other", "narrows.backends.onnx:OnnxTarget")
    with pytest.raises(LowerError, match=r"target 'other' of .* calls itself 'onnx'"):
        target_type("other")


class Namesake:
    name = "namesake"


def test_a_target_that_is_none_is_refused(enter: Any, tmp_path: Path, monkeypatch: Any):
    enter("namesake", f"{__name__}:Namesake")
    with pytest.raises(LowerError, match=r"target 'namesake' of .*:Namesake is no Target"):
        target_type("namesake")
    (tmp_path / "raises_when_imported.py").write_text("raise ValueError('not here')")
    monkeypatch.syspath_prepend(tmp_path)
    enter("namesake", "raises_when_imported:X")
    with pytest.raises(LowerError, match=r"cannot import the target 'namesake' .*: not here"):
        target_type("namesake")


def test_a_runtime_that_is_wrong_or_not_there_is_told(enter: Any):
    enter("other", "narrows.backends.onnx:OnnxTarget")
    with pytest.raises(ArtifactError, match=r"(?s)'other' of narrows.*is no Runtime.*type ABCMeta"):
        runtime_of("other")
    with pytest.raises(ArtifactError, match=r"(?s)cannot run .* 'lost'.*runs: c, onnx, openvino"):
        runtime_of("lost")
    enter("lost", "no_such_module:X")
    with pytest.raises(ArtifactError, match="import the runtime of the target 'lost' from no_such"):
        runtime_of("lost")
