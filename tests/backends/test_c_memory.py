"""The arena's planner: nothing overlaps, and little is wasted."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

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


def test_nothing_takes_no_memory() -> None:
    assert place([]).size == 0
