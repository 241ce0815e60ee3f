"""`Contraction`: one sum over channels with a weight, spelled out, and which channels it uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, fx

from narrows.ir.labels import Bools, Ints, some
from narrows.ir.ops.constants import as_array


@dataclass(eq=False)
class Contraction:
    """One contraction, spelled out.

    Attributes:
        x: The activation.
        weight: The weight's node; ``bias``: the bias's node or ``None``.
        data: The weight tensor; ``bias_data``: the bias tensor or ``None``.
        x_axis: The axis of ``x`` that is summed over; ``y_axis``: the axis of the result it makes.
        out_axis: The weight axis of the result's channels; ``in_axis``: of the input's.
        groups: How many independent parts the channels fall into.
        transposed: Whether the weight is laid out as ``[in, out/groups, ...]``.
        uniform: Whether a constant input channel adds the same constant at every position, to be
            folded into a bias that no other use of the weight needs otherwise.
        names: The arguments that hold the activation, the weight and the bias.
        heard: Which input channels count, ``[groups, inputs per group]``; ``None`` for all.
        fold: Which input channels are constants whose contribution is one number, ``[inputs]``; the
            analysis says so once it knows the activation.
    """

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    data: Tensor
    bias_data: Tensor | None
    x_axis: int
    y_axis: int
    out_axis: int
    in_axis: int
    groups: int
    transposed: bool
    uniform: bool
    names: tuple[str, str, str] = ("input", "weight", "bias")
    heard: Bools | None = None
    fold: Bools = field(default_factory=lambda: np.zeros(0, dtype=bool))

    @property
    def outputs(self) -> int:
        """The number of output channels."""
        width = self.data.shape[self.out_axis]
        return width * self.groups if self.transposed else width

    @property
    def inputs(self) -> int:
        """The number of input channels."""
        width = self.data.shape[self.in_axis]
        return width if self.transposed else width * self.groups

    @cached_property
    def blocks(self) -> Tensor:
        """The weight as ``[groups, outputs per group, inputs per group, kernel]``."""
        g = self.groups
        w = self.data.movedim((self.out_axis, self.in_axis), (0, 1))
        if self.transposed:  # [out/g, in, k] -> in is group-major
            w = w.reshape(w.shape[0], g, w.shape[1] // g, -1)
            return w.permute(1, 0, 2, 3)
        return w.reshape(g, w.shape[0] // g, w.shape[1], -1)

    def sums(self) -> Tensor:
        """The weight summed over the kernel, float64: ``[groups, outputs, inputs]``."""
        return self.blocks.double().sum(-1)


def used_columns(c: Contraction, rows: Bools) -> Bools:
    """Return which inputs have a non-zero weight in a row that counts: ``[groups, inputs]``."""
    data: Any = as_array(c.blocks)
    if len(data) > 1:
        used = (data.any(-1) & rows[..., None]).any(1)
        return used if c.heard is None else used & c.heard
    return _settled(data[0], np.flatnonzero(rows[0]), None if c.heard is None else c.heard[0])[None]


def used_rows(c: Contraction, columns: Bools) -> Bools:
    """Return which outputs have a non-zero weight in a column that counts: ``[groups,
    outputs]``."""
    data: Any = as_array(c.blocks)
    if c.heard is not None:
        columns = columns & c.heard
    if len(data) > 1:
        return (data.any(-1) & columns[:, None, :]).any(2)
    return _settled(data[0].swapaxes(0, 1), np.flatnonzero(columns[0]))[None]


def _settled(data: Any, rows: Ints, among: Bools | None = None) -> Bools:
    """Return which entries of axis 1, of those in ``among``, have a non-zero in one of ``rows``.

    A few rows settle almost every entry of a dense weight; one pass over the whole weight finds
    those that are zero throughout; the rare rest is looked at closely.
    """
    found = data[rows[:8]].any((0, 2))
    if among is not None:
        found &= among
    open_ = ~found if among is None else among & ~found
    if not some(open_) or len(rows) <= 8:
        return found
    which = np.flatnonzero(open_)
    if len(which) * 4 > len(found):  # one pass over all of it is quicker than picking
        open_ &= data.any(0).any(-1)
        if not open_.any() or len(rows) == len(data):
            return found | open_
        which = np.flatnonzero(open_)
    found[which] = data[np.ix_(rows, which)].any((0, 2))
    return found
