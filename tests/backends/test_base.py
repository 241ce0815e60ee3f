"""Targets by name, their options, and what looking one up costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import narrows
from narrows.backends import base, lower, make_target, target_names, target_type
from narrows.backends.onnx import OnnxTarget
from narrows.errors import LowerError, UsageError
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
