"""Cost tables: what is refused of a file, and what a layout without blocks means."""

from __future__ import annotations

import dataclasses
import json

import pytest

from narrows.backends.measured.file import decode, encode
from narrows.backends.onnx.costs import TABLES
from narrows.errors import UsageError
from narrows.ir.work import Work


@pytest.mark.parametrize("size", ["block", "align", "sets"])
def test_layouts_of_nothing_are_refused(size: str) -> None:
    data = json.loads(json.dumps(encode(TABLES.shipped())))
    assert decode(data)["layout"] == TABLES.shipped().layout
    data["layout"][size] = 0
    with pytest.raises(UsageError, match=r"blocks, widths and sets are 1 or more"):
        decode(data)


@pytest.mark.parametrize("kind", ["conv", "depthwise", "grouped", "pool"])
def test_a_runtime_without_blocks_computes_all_in_the_plain_layout(kind: str) -> None:
    table = TABLES.shipped()
    work = Work(kind, inputs=64, outputs=64, groups=2, kernel=(3, 3), space=(8, 8))
    plain = dataclasses.replace(table, layout=dataclasses.replace(table.layout, block=1, align=1))
    assert (table.form(work), plain.form(work)) == ("blocked", "plain")
