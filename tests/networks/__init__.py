"""One-feature networks, random masks for any program, and a masked reference without narrows.

Start at `NETWORKS`; each family of networks has a file of its own.
"""

from . import attention, branches, layout, norms, operators, picking, placement
from .masks import (
    KINDS,
    Contraction,
    Masks,
    contraction,
    contractions,
    draw_masks,
    random_masks,
)
from .registry import NETWORKS, Ids, Network, randomise

__all__ = [
    "KINDS",
    "NETWORKS",
    "Contraction",
    "Ids",
    "Masks",
    "Network",
    "contraction",
    "contractions",
    "draw_masks",
    "random_masks",
    "randomise",
]
del attention, branches, layout, norms, operators, picking, placement
