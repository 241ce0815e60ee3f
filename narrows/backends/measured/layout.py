"""`Layout`: what a runtime does with channels, as the file of a cost table says it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """What a runtime does with the layout of channels.

    Attributes:
        block: The channels of one block of the blocked layout; 1 where there is none.
        align: What a width must be a multiple of to be blocked at all.
        sets: How many blocks of outputs a kernel makes at once.
        fused: Operators that a convolution before them takes in, in either layout.
        blocked: Operators that run on blocks.
    """

    block: int = 1
    align: int = 1
    sets: int = 1
    fused: tuple[str, ...] = ()
    blocked: tuple[str, ...] = ()

    def padded(self, width: int) -> int:
        """Return ``width`` rounded up to whole blocks."""
        return -(-width // self.block) * self.block
