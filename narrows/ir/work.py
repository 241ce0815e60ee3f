"""`Work`: what one operator has to do, as the sizes that its time depends on.

A work says nothing of a machine: a target's `narrows.ir.costs.Costs` turn it into seconds, and its
multiply-accumulates are arithmetic. Rows of the op table describe their operators so
(`narrows.ir.ops.works`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

CONVOLUTIONS = ("conv", "depthwise", "grouped")
# Kinds whose time is known at other widths: at two of them, or at one that is read and made.
TWO_WIDTHS = (*CONVOLUTIONS, "conv_transpose", "linear")
ONE_WIDTH = ("pool", "pointwise", "scale", "concat", "reduce", "norm")
SUMMING = (*CONVOLUTIONS, "conv_transpose", "linear", "matmul", "attention")


@dataclass(frozen=True)
class Work:
    """One operator at one set of sizes; equal works take equal time.

    Attributes:
        kind: ``conv`` (one group), ``depthwise`` (one input channel a group), ``grouped``,
            ``conv_transpose``, ``linear``, ``matmul``, ``attention``, ``scale``, ``norm``,
            ``softmax``, ``pointwise``, ``pool``, ``reduce``, ``gather``, ``pick`` (a gather of
            channels that lie innermost, so element by element), ``slice``, ``concat``, ``copy``
            (elements moved) or ``view`` (none moved).
        op: The operator as ATen spells it, without the overload.
        batch: How many examples; for products of matrices, how many products.
        inputs: The channels that are read; for products and attention the depth of a sum.
        outputs: The channels that are made.
        groups: Into how many independent parts a convolution's channels fall.
        kernel: The window of a convolution or pooling; for attention the number of keys.
        stride: Its step.
        space: The positions of the result: height and width, tokens, rows.
        source: The positions of what is read, where that is another number.
        itemsize: The bytes of one element.
    """

    kind: str
    op: str = ""
    batch: int = 1
    inputs: int = 1
    outputs: int = 1
    groups: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    space: tuple[int, ...] = ()
    source: tuple[int, ...] = ()
    itemsize: int = 4

    @property
    def positions(self) -> int:
        """The positions of the result, of one example."""
        return math.prod(self.space)

    @property
    def taps(self) -> int:
        """The elements of the window."""
        return math.prod(self.kernel)

    @property
    def elements(self) -> int:
        """The elements of the result."""
        return self.batch * self.positions * self.outputs

    @property
    def macs(self) -> int:
        """The multiply-accumulates; 0 for what sums over no weight and no other activation."""
        if self.kind in CONVOLUTIONS:
            return self.elements * (self.inputs // self.groups) * self.taps
        if self.kind == "conv_transpose":
            read = self.batch * math.prod(self.source) * self.inputs
            return read * (self.outputs // self.groups) * self.taps
        if self.kind in ("linear", "matmul"):
            return self.elements * self.inputs
        if self.kind == "attention":
            return self.batch * self.positions * self.taps * (self.inputs + self.outputs)
        return 0

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019  (a work is a value, and small)
    def resized(
        self, *, inputs: int | None = None, outputs: int | None = None, batch: int | None = None
    ) -> Work:
        """Return the same operator at other widths, or for another batch.

        What keeps channels (a depthwise convolution, anything that sums over nothing) has as many
        of them as come in: one of ``inputs`` and ``outputs`` sets both. A grouped convolution keeps
        the width of its groups as long as they come out whole, else their number.
        """
        if batch is not None and self.kind in ("matmul", "attention"):
            raise ValueError("the batch of a product is not that of the model")
        new_in = self.inputs if inputs is None else inputs
        new_out = self.outputs if outputs is None else outputs
        groups = self.groups
        if self.kind not in SUMMING or self.kind == "depthwise":
            ratio = self.outputs // self.inputs if self.kind == "depthwise" else 1
            if inputs is None and outputs is not None:
                new_in = outputs // ratio
            new_out = new_in * ratio
            groups = new_in if self.kind == "depthwise" else 1
        elif groups > 1:
            groups = _groups(self, new_in, new_out)
        return dataclasses.replace(
            self,
            inputs=new_in,
            outputs=new_out,
            groups=groups,
            batch=self.batch if batch is None else batch,
        )


def _groups(work: Work, inputs: int, outputs: int) -> int:
    """Return how many groups a grouped convolution has at other widths."""
    per_in, per_out = work.inputs // work.groups, work.outputs // work.groups
    whole = inputs % per_in == 0 and outputs % per_out == 0
    if whole and inputs // per_in == outputs // per_out:
        return inputs // per_in
    return math.gcd(work.groups, math.gcd(inputs, outputs))
