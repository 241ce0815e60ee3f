"""What the rewriter passes around: a tensor of the new program, and the news that one is ragged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.labels import Bools, Value, even_out


@dataclass(eq=False)
class Held:
    """A tensor of the new program.

    Attributes:
        node: The node in the new graph.
        places: The original place at each position (see `Value.places`): labelled axes as wide as
            the tensor, the others of size 1. No place stands twice. Along axes without labels the
            tensor is as it was.
        shape: The shape at the example's sizes.
    """

    node: fx.Node
    places: Tensor
    shape: tuple[int, ...]


class RaggedError(Exception):
    """The needed channels of ``node`` do not fill a rectangular tensor.

    Attributes:
        node: The node.
        mask: The labels that were to be kept; ``None`` if only all of them will do.
    """

    def __init__(self, node: fx.Node, mask: Bools | None) -> None:
        super().__init__(node.name)
        self.node, self.mask = node, mask


def evened(value: Value, mask: Bools) -> Bools:
    """Return the labels to keep so that what is left of ``value`` is rectangular."""
    grid = even_out(torch.from_numpy(mask)[value.tensor])
    wider = mask.copy()
    wider[np.unique(value.tensor[grid].numpy())] = True
    return wider
