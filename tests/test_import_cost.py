"""`import narrows` is cheap: what it pulls in is checked, not how long it takes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "onnx", "onnxruntime", "onnxscript", "onnxsim", "tvm", "sklearn", "networkx")


def loaded_after(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter holds after ``statement``."""
    code = f"import json, sys\n{statement}\nprint(json.dumps([m for m in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return {m.split(".")[0] for m in json.loads(run.stdout.splitlines()[-1])}


def test_the_probe_sees_an_import():
    assert "networkx" in loaded_after("import networkx")


@pytest.mark.parametrize(
    "statement",
    [
        "import narrows",
        "import narrows; dir(narrows)",
        "from narrows import NarrowsError",
        "from narrows import load, Artifact",
        "import narrows.backends.artifact",
        "import narrows.cli",
    ],
)
def test_nothing_heavy_is_imported(statement: str):
    assert loaded_after(statement).isdisjoint(HEAVY)


def test_capture_does_not_import_the_backends():
    assert loaded_after("from narrows import capture").isdisjoint({"onnx", "onnxruntime", "tvm"})
