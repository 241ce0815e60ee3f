"""The torch backend; `lower` itself compares each file with its program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from narrows.backends import lower, make_target
from narrows.backends.artifact import load
from narrows.backends.torch import target
from narrows.errors import LowerError, UsageError
from narrows.frontend import capture


class Net(nn.Module):
    """Inputs by position and by name, several outputs, one of them a number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, *, y: Tensor) -> dict[str, Any]:
        return {"sum": self.linear(x) + y, "three": 3, "x": x}


def program() -> Any:
    return capture(Net().eval(), (torch.randn(2, 4),), kwargs={"y": torch.randn(2, 3)})


def test_the_file_runs_at_any_batch(tmp_path: Path):
    made = program()
    artifact = lower(made, "torch")
    artifact.save(tmp_path / "out")
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    found = load(tmp_path / "out").run(x, y=y, threads=1)
    assert found["three"] == 3
    np.testing.assert_allclose(found["sum"], made(x, y=y)["sum"], rtol=1e-5)
    np.testing.assert_array_equal(found["x"], x)
    assert [c["batch"] for c in artifact.fidelity["checked"]] == [1, 3, 2]


def test_torch_loads_the_file_itself(tmp_path: Path):
    lower(program(), "torch").save(tmp_path / "out")
    module = torch.export.load(tmp_path / "out" / "model.pt2").module()
    assert module(torch.zeros(7, 4), y=torch.zeros(7, 3))["sum"].shape == (7, 3)


@pytest.mark.skipif(not target.find_compiler(), reason="there is no C++ compiler")
def test_a_package_is_compiled_ahead_of_time(tmp_path: Path):
    made = program()
    lower(made, "torch", form="aot").save(tmp_path / "out")
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    found = load(tmp_path / "out").run(x, y=y)
    np.testing.assert_allclose(found["sum"], made(x, y=y)["sum"], rtol=1e-5)


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(target, "COMPILERS", ("no-such-compiler",))
    with pytest.raises(LowerError, match="no C\\+\\+ compiler"):
        lower(program(), "torch", form="aot")


def test_what_torch_cannot_export_is_told(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no way\nand more")

    made = program()
    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(LowerError, match="torch cannot export the program") as caught:
        lower(made, "torch")
    assert caught.value.why == "RuntimeError: no way"


def test_a_wrong_file_is_found():
    with pytest.raises(LowerError, match="differs from the program"):
        lower(program(), "torch", reference=program())


@pytest.mark.parametrize("options", [{"form": "pt"}, {"samples": 0}])
def test_wrong_options_are_refused(options: dict[str, Any]):
    with pytest.raises(UsageError):
        make_target("torch", **options)
