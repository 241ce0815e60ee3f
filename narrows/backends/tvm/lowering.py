"""`Lowering`: what a rule works with.

It emits expressions, and gives values in the order and width that a kernel wants.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import relax

from narrows.backends.tvm.devices import Machine
from narrows.backends.tvm.kernels import ALIKE
from narrows.backends.tvm.values import Value, regrouped


class RuleError(Exception):
    """A rule cannot express one call.

    Attributes:
        node: The node's name.
        why: What the rule has no form for.
    """

    def __init__(self, node: str, why: str) -> None:
        self.node, self.why = node, why
        super().__init__(f"{node}: {why}")


class Lowering:
    """Emits into a module; the rules call its methods.

    Attributes:
        machine: What the kernels are made for.
        builder: The Relax block builder.
        name: The node that is being lowered.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.builder = relax.BlockBuilder()
        self.name = ""

    def refuse(self, why: str) -> RuleError:
        """Return the error for a call that a rule has no form for."""
        return RuleError(self.name, why)

    # ------------------------------------------------------------------ emitting

    def emit(self, expr: Any) -> Any:
        """Append an expression, named after the node."""
        return self.builder.emit(expr)

    def kernel(
        self, function: Callable[..., Any], *operands: Any, name: str, alike: bool = False
    ) -> Any:
        """Append a kernel that ``function`` computes from tensor expressions of ``operands``.

        Args:
            function: Takes and returns tensor expressions.
            operands: Relax expressions.
            name: The kernel's name.
            alike: Whether it works element by element on a tensor of the result's shape, of another
                dtype maybe (`narrows.backends.tvm.kernels.ALIKE`).
        """
        attrs = {ALIKE: 1} if alike else None
        return self.builder.emit_te(
            function, *operands, primfunc_name_hint=name, primfunc_attrs=attrs
        )

    def made(
        self,
        expr: Any,
        shape: Sequence[int],
        dtype: str,
        order: Sequence[int] | None = None,
        width: int | None = None,
    ) -> Value:
        """Return the value of an expression; stored as the program sees it unless said."""
        shape = tuple(shape)
        order = tuple(range(len(shape))) if order is None else tuple(order)
        if width is None:
            width = shape[order[-1]] if shape else 1
        return Value(shape, dtype, order, width, expr)

    def like(self, value: Value, expr: Any, dtype: str | None = None) -> Value:
        """Return the value of an expression that is stored like another, in another dtype maybe."""
        dtype = value.dtype if dtype is None else dtype
        return dataclasses.replace(value, expr=expr, array=None, dtype=dtype)

    def scalar(self, number: Any, dtype: str) -> Any:
        """Return a constant of one number; the dtype is never left to TVM."""
        return relax.const(np.asarray(number, dtype), dtype)

    # ------------------------------------------------------------------ storing

    def expr(self, value: Value) -> Any:
        """Return the expression of a value as it is stored."""
        if value.array is None:
            return value.expr
        array = value.array.transpose(value.order)
        if value.padded:
            more = [(0, 0)] * (value.rank - 1) + [(0, value.width - array.shape[-1])]
            # Padding is never read, but 1 divides and has a logarithm.
            array = np.pad(array, more, constant_values=1)
        return relax.const(np.array(array, order="C"), value.dtype)

    def exact(self, value: Value) -> Value:
        """Return the value without padding."""
        if not value.padded:
            return value
        last, size = value.rank - 1, value.shape[value.order[-1]]
        if value.array is not None:
            return dataclasses.replace(value, width=size)
        expr = self.emit(relax.op.strided_slice(value.expr, [last], [0], [size]))
        return dataclasses.replace(value, expr=expr, width=size)

    def ordered(self, value: Value, order: Sequence[int]) -> Value:
        """Return the value stored in another order of axes."""
        order = tuple(order)
        if value.order == order:
            return value
        width = value.shape[order[-1]]
        if value.array is not None:
            return dataclasses.replace(value, order=order, width=width)
        old = [a for a in value.order if value.shape[a] != 1]
        new = [a for a in order if value.shape[a] != 1]
        if old == new:  # only axes of size 1 change places
            if value.padded and (value.order[-1] != order[-1]):
                value = self.exact(value)
            width = value.width if value.padded else width
            shape = (*(value.shape[a] for a in order[:-1]), width)
            expr = self.emit(relax.op.reshape(value.expr, shape))
            return dataclasses.replace(value, expr=expr, order=order, width=width)
        value = self.exact(value)
        axes = [value.order.index(a) for a in order]
        expr = self.emit(relax.op.permute_dims(value.expr, axes))
        return dataclasses.replace(value, expr=expr, order=order, width=width)

    def plain(self, value: Value) -> Any:
        """Return the expression of a value stored as the program sees it."""
        return self.expr(self.exact(self.ordered(value, range(value.rank))))

    def channels_last(self, value: Value, width: int = 0) -> Value:
        """Return an image with its channels stored last; a constant becomes an expression.

        Args:
            value: ``[N, C, ...]``.
            width: How many channels must be stored at least.
        """
        value = self.ordered(value, channels_last(value.rank))
        value = self.widened(value, width)
        return dataclasses.replace(value, expr=self.expr(value), array=None)

    def widened(self, value: Value, width: int) -> Value:
        """Return the value with its last stored axis zero-padded to ``width``."""
        if value.width >= width:
            return value
        if value.array is not None:
            return dataclasses.replace(value, width=width)
        pad = [0, 0] * (value.rank - 1) + [0, width - value.width]
        expr = self.emit(relax.op.nn.pad(value.expr, pad, "constant", 0))
        return dataclasses.replace(value, expr=expr, width=width)

    def rounded(self, width: int, dtype: str = "float32") -> int:
        """Return the smallest number of channels that fills whole vectors."""
        lanes = self.machine.lanes_of(dtype)
        return -(-width // lanes) * lanes

    def reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        """Return the value in another shape, without a copy where the order allows it."""
        shape = tuple(shape)
        if value.shape == shape:
            return value
        if value.array is not None:
            return Value.constant(value.array.reshape(shape))
        order = regrouped(value, shape)
        if order is None:
            expr = self.emit(relax.op.reshape(self.plain(value), shape))
            return self.made(expr, shape, value.dtype)
        if not order:
            expr = self.emit(relax.op.reshape(value.expr, ()))
            return self.made(expr, (), value.dtype)
        width = value.width if value.padded else shape[order[-1]]
        stored = (*(shape[a] for a in order[:-1]), width)
        expr = self.emit(relax.op.reshape(value.expr, stored))
        return Value(shape, value.dtype, order, width, expr)

    def cast(self, value: Value, dtype: str) -> Value:
        """Return the value in another dtype."""
        if value.dtype == dtype:
            return value
        if value.array is not None:
            return Value.constant(value.array.astype(dtype))
        return self.like(value, self.emit(relax.op.astype(value.expr, dtype)), dtype)

    # ------------------------------------------------------------------ side by side

    def aligned(self, operands: Sequence[Value]) -> tuple[list[Any], Value]:
        """Return expressions that broadcast against each other, and a value stored like the result.

        The order is that of the largest operand that is not a constant, so that images stay as
        their convolutions left them.
        """
        shape = np.broadcast_shapes(*(v.shape for v in operands))
        rank = len(shape)
        leader = max(operands, key=lambda v: _weight(v, shape))
        order = leader.expanded(rank)[1]
        last = order[-1] if rank else 0
        spread = [self.ordered(self._raised(v, rank), order) for v in operands]
        widths = {v.width for v in spread if rank and v.shape[last] != 1 and v.array is None}
        width = shape[last] if rank else 1
        if len(widths) == 1:
            width = widths.pop()
        exprs = []
        for value in spread:
            if rank and value.shape[last] == 1:
                value = self.exact(value)
            elif rank and value.width != width:
                value = self._fitted(value, width)
            exprs.append(self.expr(value))
        if rank and shape[last] == 1:
            width = 1
        return exprs, self.made(None, shape, leader.dtype, order, width)

    def _fitted(self, value: Value, width: int) -> Value:
        """Return the value with a width that the others have, or without padding."""
        if value.array is not None and value.width < width:
            return self.widened(value, width)
        return self.exact(value)

    def _raised(self, value: Value, rank: int) -> Value:
        """Return the value with axes of size 1 in front."""
        if value.rank == rank:
            return value
        shape, order = value.expanded(rank)
        if value.array is not None:
            return Value.constant(value.array.reshape(shape))
        width = value.width if value.rank else 1
        stored = (*(shape[a] for a in order[:-1]), width)
        expr = self.emit(relax.op.reshape(value.expr, stored))
        return Value(shape, value.dtype, order, width, expr)


def channels_last(rank: int) -> tuple[int, ...]:
    """Return the order that stores axis 1 last."""
    return (0, *range(2, rank), 1) if rank > 1 else tuple(range(rank))


def _weight(value: Value, shape: tuple[int, ...]) -> tuple[bool, int, bool]:
    """Rank operands by whose order the result should have."""
    moved = value.order != tuple(range(value.rank))
    return value.array is None, math.prod(value.shape), moved
