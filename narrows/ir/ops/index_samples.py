"""Example calls of operators that go where an index says, rank elements or lay windows out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from narrows.ir.ops.sample import INT, Given, Made, Sample, Weight, image, tokens


def _call(names: str, *args: Any, note: str = "", **kwargs: Any) -> tuple[str, Sample]:
    """Return the overloads that a call is an example of, and the call."""
    return names, Sample(args, kwargs, note)


def index_samples() -> Iterator[tuple[str, Sample]]:
    """Yield the calls, each with the overloads it is for."""
    tall: dict[str, Any] = {"low": 0.0, "high": 4.99, "dtype": INT}
    short: dict[str, Any] = {**tall, "high": 3.99}
    own, row = Made((2, 3, 6), (2,), **tall), Given((2, 5, 6), **tall)
    along, two = Given((3,), **tall), Given((2, 3), 0.0, 1.99, dtype=INT)
    yield _call("gather", tokens(), 1, own, note="each channel by its own")
    yield _call("gather", tokens(), 1, Given((2, 3, 6), **tall), note="by an input")
    yield _call("gather", tokens(), 2, Made((2, 5, 3), (2,), **tall), note="channels by number")
    yield _call("gather", image(), 3, Weight((2, 6, 4, 2), **short), note="by a constant")
    yield _call("gather", image(), 2, Made((2, 3, 2, 4), **short), note="some of the channels")
    yield _call("take_along_dim", tokens(), own, 1)
    yield _call("scatter.src scatter_add", tokens(), 1, row, tokens())
    yield _call("scatter.value", tokens(), 1, row, 0.3)
    yield _call("index.Tensor", tokens(), [None, along])
    yield _call(
        "index.Tensor",
        tokens(),
        [two, Given((2, 3), **tall)],
    )
    yield _call("index.Tensor", tokens(), [None, None, along], note="channels")
    yield _call("grid_sampler", image(), Given((2, 3, 3, 2)), 0, 0, True)
    yield _call("grid_sampler", image(), Made((2, 3, 3, 2), (3,)), 1, 1, False, note="computed")
    yield _call("topk", tokens(), 3, 1)
    yield _call("topk", tokens(), 3, note="over the channels")
    yield _call("sort", image(), 2, True)
    yield _call("sort.stable argsort.stable", image(), stable=True, dim=3)
    yield _call("max.dim min.dim median.dim", tokens(), 1)
    yield _call("max.dim", image(), 2, True)
    yield _call("max.dim", image(), 1, note="over the channels")
    yield _call("kthvalue", tokens(), 2, 1)
    yield _call("cummax cummin", image(), 3)
    yield _call("argsort", image(), 3)
    yield _call("argsort", image(), 1, note="over the channels")
    yield _call("argmax argmin", tokens(), 1)
    yield _call("argmax argmin", image(), 3, True)
    yield _call("argmax", image(), 1, note="over the channels")
    yield _call("im2col", image(), [2, 2], [1, 1], [0, 0], [2, 2])
    yield _call("im2col", image(), [3, 3], [1, 1], [1, 1], [1, 1], note="with a border")
    yield _call("im2col", Made((6, 4, 4), (0,)), [2, 2], [1, 1], [0, 0], [1, 1], note="one image")
    yield _call("im2col", Made((2, 2, 4, 4), (2,)), [2, 2], [1, 1], [0, 0], [1, 1], note="rows")
    yield _call("col2im", Made((2, 24, 4)), [4, 4], [2, 2], [1, 1], [0, 0], [2, 2])
    yield _call("col2im", Made((2, 24, 9)), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1], note="overlaps")
