"""docs/adding-a-target.md, followed as a stranger would: one package and its entry points."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import narrows

ROOT = Path(narrows.__file__).parents[1]
PAGE = (ROOT / "docs" / "adding-a-target.md").read_text(encoding="utf-8")
FILE = re.compile(r"^`(\w+/\w+\.py)`.*?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
TOML = re.compile(r"^```toml\n(.*?)^```", re.MULTILINE | re.DOTALL)

NETS = """
import torch
from torch import nn

def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))

def other():
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh())
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the package installed, as pip leaves it."""
    folder = tmp_path_factory.mktemp("site")
    for name, source in FILE.findall(PAGE):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")
    groups = tomllib.loads(TOML.findall(PAGE)[0])["project"]["entry-points"]
    info = folder / "numpy_target-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy-target\nVersion: 1.0\n")
    lines = [f"[{g}]\n" + "\n".join(f"{k} = {v}" for k, v in e.items()) for g, e in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (folder / "nets.py").write_text(NETS)
    return folder


def narrows_in(site: Path, *words: str, code: int = 0) -> str:
    """Run a command where the package is installed; return what it printed."""
    path = os.pathsep.join([str(site), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "narrows", *words],
        capture_output=True,
        text=True,
        cwd=site,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_the_target_is_listed_and_has_its_flag(site: Path):
    listed = json.loads(narrows_in(site, "targets", "--json"))
    assert {"numpy", "onnx"} <= {row["name"] for row in listed}
    told = " ".join(narrows_in(site, "compile", "--help").split())
    assert "--indent N how far the list of steps is indented (1; numpy)" in told


def test_a_model_compiles_and_its_session_runs(site: Path):
    words = ("compile", "nets.py:mlp", "-i", "f32[2,8]", "-t", "numpy{samples=1}", "--indent", "3")
    narrows_in(site, *words, "-o", "out")
    manifest = json.loads((site / "out" / "manifest.json").read_text())
    assert manifest["options"] == {"samples": 1, "indent": 3}
    assert [case["batch"] for case in manifest["fidelity"]["checked"]] == [1, 3]
    assert "ok: hashes, batches of 1 and 3" in narrows_in(site, "check", "out")
    steps = (site / "out" / "steps.json").read_text()
    assert steps.startswith("[\n   [")
    with np.load(site / "out" / "weights.npz") as weights:
        assert weights["0.weight"].shape == (6, 8)


def test_what_it_cannot_lower_is_told_with_its_place(site: Path):
    words = ("compile", "nets.py:other", "-i", "f32[2,8]", "-t", "numpy", "-o", "not")
    told = narrows_in(site, *words, code=1)
    assert "the numpy target cannot lower aten.tanh.default" in told
    assert not (site / "not").exists()


def test_a_broken_target_is_an_error_where_it_is_named_and_nowhere_else(site: Path, tmp_path: Path):
    info = tmp_path / "lost-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lost\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[narrows.targets]\nlost = no_such_module:X\n")
    told = narrows_in(tmp_path, "targets", code=1)
    assert told.startswith("cannot import the target 'lost' from no_such_module:X: No module named")
    words = ("compile", str(site / "nets.py:mlp"), "-i", "f32[2,8]", "-o", "out", "-t", "lost")
    assert "cannot import the target 'lost'" in narrows_in(tmp_path, *words, code=1)
    narrows_in(tmp_path, "compile", "--help")
