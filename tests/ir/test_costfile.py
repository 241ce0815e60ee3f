"""Cost tables as files: what is refused."""

from __future__ import annotations

import json

import pytest

from narrows.backends.onnx.costs import TABLES
from narrows.errors import UsageError
from narrows.ir.costfile import decode, encode


@pytest.mark.parametrize("size", ["block", "align", "sets"])
def test_layouts_of_nothing_are_refused(size: str) -> None:
    data = json.loads(json.dumps(encode(TABLES.shipped())))
    assert decode(data)["layout"] == TABLES.shipped().layout
    data["layout"][size] = 0
    with pytest.raises(UsageError, match=r"blocks, widths and sets are 1 or more"):
        decode(data)
