"""The arena: where every intermediate tensor lies, so that those needed at once do not overlap.

A tensor is live from the step that writes it to the last step that reads it. The sum of what is
live at the worst step is a lower bound for any plan in this order of steps. `place` fills the arena
largest block first, each into the tightest gap; then it tries other orders until it meets the bound
or has tried enough.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 4  # what lies in the arena are bytes; a multiple of the word is read faster
TRIES = 300


@dataclass(frozen=True)
class Block:
    """A piece of the arena.

    Attributes:
        name: What it holds, for people.
        size: Its bytes.
        first: The step that writes it.
        last: The last step that reads it.
    """

    name: str
    size: int
    first: int
    last: int

    def meets(self, other: Block) -> bool:
        """Whether both are needed at one time."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Placement:
    """Where blocks lie.

    Attributes:
        offsets: The offset of every block.
        size: The bytes of the arena.
        bound: The bytes that are live at once, which no arena can be smaller than.
        peak: The blocks that are live then, largest first.
    """

    offsets: tuple[int, ...]
    size: int
    bound: int
    peak: tuple[Block, ...]


def place(blocks: Sequence[Block]) -> Placement:
    """Return a placement of blocks; it is the same on every run."""
    bound, peak = _peak(blocks)
    if not blocks:
        return Placement((), 0, 0, ())
    reach = _aligned_bound(blocks)
    meeting = [[j for j, b in enumerate(blocks) if j != i and a.meets(b)]
               for i, a in enumerate(blocks)]  # fmt: skip
    keys = (
        lambda i: (-blocks[i].size, blocks[i].first),
        lambda i: (-blocks[i].size * (blocks[i].last - blocks[i].first + 1), blocks[i].first),
        lambda i: (blocks[i].first - blocks[i].last, -blocks[i].size),
        lambda i: (blocks[i].first, -blocks[i].size),
    )
    orders = [sorted(range(len(blocks)), key=key) for key in keys]
    tried = [(*_fill(blocks, order, meeting), order) for order in orders]
    size, offsets, order = min(tried, key=lambda t: t[0])
    generator = random.Random(0)
    for _ in range(TRIES if len(blocks) > 2 else 0):
        if size <= reach:
            break
        # What reaches highest goes earlier: it was placed when the low gaps were taken.
        changed = list(order)
        high = max(changed, key=lambda i: offsets[i] + blocks[i].size)
        pick = high if generator.random() < 0.5 else generator.choice(changed)
        changed.remove(pick)
        changed.insert(generator.randrange(len(changed)), pick)
        found, places = _fill(blocks, changed, meeting)
        if found <= size:
            size, offsets, order = found, places, changed
    return Placement(tuple(offsets), size, bound, peak)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _peak(blocks: Sequence[Block]) -> tuple[int, tuple[Block, ...]]:
    best: tuple[int, tuple[Block, ...]] = (0, ())
    for step in {b.first for b in blocks}:
        live = [b for b in blocks if b.first <= step <= b.last]
        total = sum(b.size for b in live)
        if total > best[0]:
            best = total, tuple(sorted(live, key=lambda b: -b.size))
    return best


def _aligned_bound(blocks: Sequence[Block]) -> int:
    return max(
        sum(_aligned(b.size) for b in blocks if b.first <= step <= b.last)
        for step in {b.first for b in blocks}
    )


def _fill(
    blocks: Sequence[Block], order: Sequence[int], meeting: Sequence[Sequence[int]]
) -> tuple[int, list[int]]:
    """Return the size and the offsets when blocks are placed in this order, best fit."""
    offsets, size = [-1] * len(blocks), 0
    for i in order:
        taken = sorted(
            (offsets[j], offsets[j] + _aligned(blocks[j].size)) for j in meeting[i]
            if offsets[j] >= 0
        )  # fmt: skip
        need, end = _aligned(blocks[i].size), 0
        best: tuple[int, int] | None = None
        for start, stop in taken:
            gap = start - end
            if gap >= need and (best is None or gap < best[0]):
                best = gap, end
            end = max(end, stop)
        offsets[i] = end if best is None else best[1]
        size = max(size, offsets[i] + need)
    return size, offsets
