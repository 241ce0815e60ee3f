"""`EagerTable`: a cost table of eager PyTorch, which has faster kernels for some spellings.

PyTorch picks its kernel by how an operator is called. It multiplies matrices for a 1x1 convolution
on one thread, unless it is dilated, which means nothing for a window of one; then oneDNN computes
it. And its poolings run over registers of channels only where the channels lie innermost. The table
has grids of such spellings under the name of the usual one, with the spelling before it.
`narrows.passes.choose_kernels` writes them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from narrows.backends.measured.sizes import sizes_of, window, windowed_grid
from narrows.backends.measured.table import CostTable
from narrows.ir.costs import CHANNELS_LAST, DILATED, SPELLINGS
from narrows.ir.work import CONVOLUTIONS, Work

# What oneDNN prepares per call is at hand when one convolution runs again and again, as in a probe,
# and less so among other layers: it must be faster by that much alone to be taken.
AMONG_OTHERS = 1.25


@dataclass(frozen=True)
class EagerTable(CostTable):
    """What operators cost in eager PyTorch, each in its fastest spelling."""

    @property
    def has_spellings(self) -> bool:
        """Whether other spellings of an operator were measured."""
        return any(name.startswith(SPELLINGS) for name in self.grids)

    def spelling(self, work: Work) -> str:
        """Return how a work is spelled for the fastest kernel; empty for the usual spelling."""
        name = f"{work.kind} {work.op} {window(work)}"
        if work.kind in CONVOLUTIONS:
            work = dataclasses.replace(work, batch=1)  # each example is computed by itself
            name = windowed_grid("plain", work)
        return self._fastest(name, work)[0] if name in self.grids else ""

    def _microseconds(self, name: str, work: Work) -> float:
        return self._fastest(name, work)[1]

    def _fastest(self, name: str, work: Work) -> tuple[str, float]:
        """Return the spelling that takes least, empty for the usual one, and its microseconds.

        Args:
            name: The grid of the usual spelling.
            work: The work. A dilated convolution counts at widths that are aligned.
        """
        sizes = sizes_of(work)
        usual = ("", self.grids[name].at(sizes))
        spelling = DILATED if work.kind in CONVOLUTIONS else CHANNELS_LAST
        other = self.grids.get(f"{spelling} {name}")
        if other is None:
            return usual
        us = other.at(sizes)
        if spelling == DILATED:
            if work.inputs % self.layout.align or work.outputs % self.layout.align:
                return usual
            us *= AMONG_OTHERS
        return min(usual, (spelling, us), key=lambda found: found[1])
