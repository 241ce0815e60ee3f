"""The examples run, where what they need is installed."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from narrows.ir.compare import relative_error

EXAMPLES = Path(__file__).parents[2] / "examples"


def loaded(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="example")


@pytest.mark.filterwarnings("ignore")  # of packages that warn of each other
@pytest.mark.parametrize("package", ["lightning", "accelerate"])
def test_gates_in_other_loops(package: str) -> None:
    pytest.importorskip(package, reason=f"the example is one for {package}")
    gated, pruned = loaded(f"gates_with_{package}")["main"]()
    assert relative_error(pruned, gated) < 1e-5


def test_partial_transfer_searches_rates(capsys: pytest.CaptureFixture[str]) -> None:
    loaded("partial_transfer")["main"]()
    assert "one rate for all" in capsys.readouterr().out


def test_the_search_finds_what_scores_best() -> None:
    search = loaded("partial_transfer")["search"]
    wanted = (0.0, 0.03, 0.01)
    rates, score = search(lambda g: -sum(abs(a - b) for a, b in zip(g, wanted, strict=True)), 3, 9)
    assert rates == wanted
    assert score == 0
