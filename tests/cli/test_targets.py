"""``narrows targets``, and targets that name a device."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import pytest

from narrows.backends.tvm import TvmTarget, devices, target, versions
from narrows.cli.emitted import parse_target
from narrows.cli.parser import parse
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


def test_cuda_is_not_usable_without_a_gpu(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(target, "has_gpu", lambda: False)
    rows = {row["name"]: row for row in json.loads(run("targets", "--json")[1])}
    assert not any(rows[name]["usable"] for name in ("tvm:cuda", "tvm:aarch64", "tvm:opencl"))
    out = run("targets")[1]
    (row,) = (line for line in out.splitlines() if line.startswith("tvm:cuda  "))
    assert "  yes  " not in row
    if rows["tvm:cuda"]["lowers"]:
        assert "to lower, not to run" in row
        assert "tvm:cuda: compiled here, not run: there is no NVIDIA GPU" in out


def test_a_gpu_is_asked_of_its_driver(monkeypatch: pytest.MonkeyPatch):
    def none(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", none)
    assert not devices.has_gpu()

    class Driver:
        found = 1

        def cuInit(self, flags: int) -> int:  # noqa: N802
            return 0

        def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
            count._obj.value = self.found
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert devices.has_gpu()
    Driver.found = 0
    assert not devices.has_gpu()


@pytest.mark.parametrize("command", ["compile", "quantize", "quantize-weights"])
def test_a_target_may_name_its_device_and_tuning(command: str):
    def emitted(*words: str) -> Any:
        arguments = parse([command, "x:y", "-o", "out", *words])
        return parse_target(arguments.target, arguments)

    assert emitted("-t", "tvm") == TvmTarget()
    assert emitted("-t", "tvm", "--tune", "600s") == TvmTarget(tune="600s")
    assert emitted("-t", "tvm", "--tune", "600") == TvmTarget(tune=600)
    made = emitted("-t", "tvm:aarch64{batch=4}", "--no-tune")
    assert made == TvmTarget(device="aarch64", batch=4, tune=0)
    with pytest.raises(UsageError, match="onnx has no option 'tune'"):
        emitted("--no-tune")
