"""A folder with models, a way to run commands, and one artifact with its dump."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from narrows.cli import main

NETS = """
import torch
from torch import nn

WIDTH = 4


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.last = nn.Conv2d(WIDTH, 2, 1)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.conv(x))))


def small():
    torch.manual_seed(0)
    return Small()


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 8, 3))


class Named(nn.Module):
    def forward(self, tokens, mask):
        return tokens * mask


class Odd(nn.Module):
    def forward(self, x):
        return torch.special.i1e(torch.relu(x))


class Running(nn.Module):
    def forward(self, x):
        return x.cumsum(2)


class Summed(Small):
    def __init__(self):
        super().__init__()
        self.norm = Running()


def summed():
    torch.manual_seed(0)
    return Summed()


ready = small()


def broken():
    raise ValueError("no data")


def text():
    return "a model"


def needy(width):
    return Small()
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Work in a new folder that holds the models, and forget their import at the end."""
    (tmp_path / "cli_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "cli_nets.py"
    sys.modules.pop("cli_nets", None)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run a command line and return its exit code, standard output and standard error."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(w) for w in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


INPUT = ("-i", "f32[2,3,8,8]")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an artifact ``out`` and its dump, compiled once."""
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "cli_nets.py").write_text(NETS)
    model = f"{folder / 'cli_nets.py'}:small"
    code = main(["compile", model, *INPUT, "-o", str(folder / "out"), "--dump"])
    assert code == 0
    return folder
