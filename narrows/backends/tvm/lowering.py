"""`lower`: a description becomes a Relax module, operator by operator, through the table of rules.

A `Lowering` is what a rule works with: it emits expressions, and gives values in the order and
width that a kernel wants.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from narrows.backends.tvm.devices import Machine
from narrows.backends.tvm.kernels import ALIKE
from narrows.backends.tvm.rules import RULES
from narrows.backends.tvm.rules.table import Call
from narrows.backends.tvm.values import Value, regrouped


class MissingRulesError(Exception):
    """Operators have no rule.

    Attributes:
        found: Node names by operator.
    """

    def __init__(self, found: dict[str, list[str]]) -> None:
        self.found = found
        super().__init__(", ".join(found))


class RuleError(Exception):
    """A rule cannot express one call.

    Attributes:
        node: The node's name.
        why: What the rule has no form for.
    """

    def __init__(self, node: str, why: str) -> None:
        self.node, self.why = node, why
        super().__init__(f"{node}: {why}")


def lower(
    graph: Mapping[str, Any], weights: Mapping[str, np.ndarray], machine: Machine
) -> tvm.IRModule:
    """Return the Relax module whose ``main`` computes a description.

    Args:
        graph: As in `narrows.backends.tvm.describe.Description`.
        weights: The arrays by name.
        machine: What the kernels are made for.

    Raises:
        MissingRulesError: Operators have no rule; it names all of them.
        RuleError: A rule cannot express one call.
    """
    missing: dict[str, list[str]] = {}
    for node in graph["nodes"]:
        if node["op"] not in RULES:
            missing.setdefault(node["op"], []).append(node["name"])
    if missing:
        raise MissingRulesError(missing)
    return Lowering(machine, weights).run(graph)


class Lowering:
    """Builds the module; the rules call its methods.

    Attributes:
        machine: What the kernels are made for.
        builder: The Relax block builder.
    """

    def __init__(self, machine: Machine, weights: Mapping[str, np.ndarray]) -> None:
        self.machine = machine
        self.builder = relax.BlockBuilder()
        self.values: dict[str, Any] = {n: Value.constant(a) for n, a in weights.items()}
        self.name = ""

    def run(self, graph: Mapping[str, Any]) -> tvm.IRModule:
        """Return the module of a description."""
        params = []
        for spec in graph["inputs"]:
            shape = tuple(spec["shape"])
            var = relax.Var(spec["name"], relax.TensorType(shape, spec["dtype"]))
            params.append(var)
            self.values[spec["name"]] = self.made(var, shape, spec["dtype"])
        with self.builder.function("main", params):
            with self.builder.dataflow():
                for node in graph["nodes"]:
                    self._call(node)
                outputs = [self._output(name, params) for name in graph["outputs"]]
                result = self.builder.emit_output(relax.Tuple(outputs))
            self.builder.emit_func_output(result)
        return self.builder.get()

    def _call(self, node: Mapping[str, Any]) -> None:
        self.name = node["name"]
        shape, dtype = node["shape"], node["dtype"]
        several = isinstance(dtype, list)
        shape = [tuple(s) for s in shape] if several else tuple(shape)
        call = Call(node["name"], node["op"], self._arguments(node["args"]), shape, dtype)
        result = RULES[call.op](self, call)
        wanted = shape if several else [shape]
        for value, expected in zip(result if several else [result], wanted, strict=True):
            if value.shape != expected:
                raise RuleError(call.name, f"{call.op} gave {value.shape}, not {expected}")
            if value.array is None and str(value.expr.ty.dtype) != value.dtype:
                raise RuleError(
                    call.name, f"{call.op} gave {value.expr.ty.dtype} for {value.dtype}"
                )
        self.values[call.name] = result

    def _arguments(self, value: Any) -> Any:
        if isinstance(value, dict):
            if set(value) == {"ref"}:
                return self.values[value["ref"]]
            return {key: self._arguments(v) for key, v in value.items()}
        return [self._arguments(v) for v in value] if isinstance(value, list) else value

    def _output(self, name: str, params: list[Any]) -> Any:
        value = self.values[name]
        expr = self.plain(value)
        if value.array is not None or any(expr.same_as(p) for p in params):
            expr = self.emit(relax.op.reshape(expr, value.shape))  # an output must be computed
        return expr

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
