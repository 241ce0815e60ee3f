"""The arena's planner: nothing overlaps, and little is wasted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrows.backends.c import memory
from narrows.backends.c.memory import ALIGNMENT, Block, place

spans = st.tuples(st.integers(1, 400), st.integers(0, 30), st.integers(0, 6))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(spans, min_size=1, max_size=24))
def test_blocks_that_are_live_together_do_not_overlap(drawn: list[tuple[int, int, int]]) -> None:
    blocks = [Block(str(i), size, first, first + length)
              for i, (size, first, length) in enumerate(drawn)]  # fmt: skip
    placed = place(blocks)
    ends = [o + b.size for o, b in zip(placed.offsets, blocks, strict=True)]
    assert max(ends) <= placed.size
    for i, a in enumerate(blocks):
        assert placed.offsets[i] % ALIGNMENT == 0
        for j, b in enumerate(blocks[:i]):
            apart = ends[i] <= placed.offsets[j] or ends[j] <= placed.offsets[i]
            assert apart or not a.meets(b)
    assert placed.bound == sum(b.size for b in placed.peak) <= placed.size
    assert placed == place(blocks)


def test_the_bound_is_met_where_greedy_by_size_misses_it() -> None:
    chain = [Block(f"c{i}", 100 + 10 * (i % 7), i, i + 1) for i in range(40)]
    skips = [Block(f"s{i}", 64, i, i + 9) for i in range(0, 40, 5)]
    placed = place([*chain, *skips])
    assert placed.size <= 1.1 * placed.bound


# Blocks (size, first, last) that only one order places within the bound at the first go.
ORDERS = {
    "the largest first": ((48, 0, 4), (48, 4, 8), (48, 2, 3), (64, 3, 7), (80, 5, 7)),
    "the largest for the longest": ((32, 3, 4), (48, 0, 3), (48, 5, 8), (80, 1, 2), (96, 4, 5)),
    "the longest first": ((80, 1, 4), (80, 1, 5), (32, 5, 9), (48, 2, 6), (64, 5, 6)),
    "the earliest first": (
        (96, 2, 5), (48, 1, 1), (64, 1, 2), (80, 1, 3), (80, 2, 5), (96, 5, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
def test_several_orders_are_tried(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "TRIES", 0)
    placed = place([Block("", *numbers) for numbers in ORDERS[order]])
    assert placed.size == placed.bound


def test_more_orders_are_tried_where_none_of_them_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = ((96, 2, 5), (32, 1, 4), (96, 1, 3), (48, 3, 4), (80, 4, 5), (96, 5, 8), (96, 3, 7),
             (80, 3, 6))  # fmt: skip
    blocks = [Block("", *numbers) for numbers in spans]
    assert place(blocks).size == place(blocks).bound
    monkeypatch.setattr(memory, "TRIES", 0)
    assert place(blocks).size > place(blocks).bound


def test_nothing_takes_no_memory() -> None:
    assert place([]).size == 0
