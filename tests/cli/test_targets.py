"""``narrows targets``, and targets that name a device."""

from __future__ import annotations

import json

import pytest

from narrows.backends.tvm import versions
from narrows.cli.commands import parse_target
from narrows.errors import UsageError


def test_every_target_and_device_has_a_row(run):
    code, out, _ = run("targets")
    assert code == 0
    lines = out.splitlines()
    names = {line.split()[0] for line in lines[1:]}
    assert {"onnx", "torch", "torch{form=aot}", "tvm:llvm", "tvm:aarch64", "tvm:cuda"} <= names
    rows = json.loads(run("targets", "--json")[1])
    assert all(row["needs"] and row["supports"] and row["checked"] for row in rows)


def test_what_is_missing_is_told(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(versions, "installed", lambda name: "")
    code, out, _ = run("targets")
    assert code == 0
    assert "tvm:llvm: it needs apache-tvm and apache-tvm-ffi: pip install" in out
    rows = {row["name"]: row for row in json.loads(run("targets", "--json")[1])}
    assert not rows["tvm:llvm"]["usable"]
    assert rows["onnx"]["usable"]


def test_a_target_may_name_its_device_and_tuning():
    assert parse_target("tvm", tune="600s", search=None) == ("tvm", {"tune": "600s"})
    assert parse_target("tvm", tune="600") == ("tvm", {"tune": 600})
    assert parse_target("tvm:aarch64{batch=4}", tune=0) == ("tvm:aarch64", {"batch": 4, "tune": 0})
    with pytest.raises(UsageError, match="onnx has no option 'tune'"):
        parse_target("onnx", tune=0)
