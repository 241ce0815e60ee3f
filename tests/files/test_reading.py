"""What a file from outside may be."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest

import narrows
from narrows.backends.onnx.staircase import StairTable
from narrows.errors import ArtifactError, PlanError, UsageError
from narrows.files.reading import DEPTH, fit, parse_json, read_json
from narrows.ir.dump import Dump
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.quant.plan import QuantPlan


class Inner(msgspec.Struct):
    size: int


class Outer(msgspec.Struct):
    files: dict[str, Inner]


def test_values_that_fit_and_values_that_do_not():
    assert fit({"files": {"a": {"size": 3, "new": 1}}}, Outer).files["a"].size == 3
    with pytest.raises(ValueError, match=r"^files\[...\].size: expected int, got str$"):
        fit({"files": {"a": {"size": "3"}}}, Outer)
    with pytest.raises(ValueError, match=r"^expected object, got array$"):
        fit([], Outer)


@pytest.mark.parametrize("text", ['"[[[["', '{"a": "\\"[["}', "[" * DEPTH + "]" * DEPTH])
def test_brackets_count_where_they_nest(text: str):
    assert json.dumps(parse_json(text)) == json.dumps(json.loads(text))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 1000, "[" * (DEPTH + 1) + "]" * (DEPTH + 1)]
)
def test_deep_nesting_is_refused(text: str):
    with pytest.raises(ValueError, match="nests more than"):
        parse_json(text)


@pytest.mark.parametrize("text", ["", "{", '"', "nul", "]", '"\\', "1" * 5000])
def test_what_is_not_json_is_refused(text: str):
    with pytest.raises(ValueError):  # noqa: PT011 (whatever it says)
        parse_json(text)


def test_a_large_file_is_not_read(tmp_path: Path):
    with open(tmp_path / "a", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        read_json(tmp_path / "a", 1000)


READERS = {
    "artifact": (lambda p: narrows.load(p.parent), "manifest.json", ArtifactError),
    "channel plan": (ChannelPlan.load, "p.json", PlanError),
    "quantization plan": (QuantPlan.load, "p.json", PlanError),
    "cost table": (StairTable.load, "p.json", UsageError),
    "dump": (lambda p: Dump.open(p.parent), "index.json", ArtifactError),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    "text", ["[" * 5000, "", "[]", "null", '{"format": 1, "version": null}', "\ud800", "{" * 150]
)
def test_every_reader_refuses_in_its_own_class(tmp_path: Path, kind: str, text: str):
    read, name, error = READERS[kind]
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(error):
        read(tmp_path / name)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("path", [None, 3, b"a", "a\0b", "x" * 5000, "", "/dev/null/x"])
def test_every_reader_refuses_what_is_no_path(kind: str, path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load = {"artifact": narrows.load, "dump": Dump.open}.get(kind, READERS[kind][0])
    with pytest.raises(READERS[kind][2]):
        load(path)


def test_endless_files_are_refused(tmp_path: Path):
    (tmp_path / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(ArtifactError, match="more than"):
        narrows.load(tmp_path)
    assert os.path.islink(tmp_path / "manifest.json")
