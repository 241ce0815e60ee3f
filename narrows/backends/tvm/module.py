"""`lower`: a description becomes a Relax module, operator by operator, by the table of rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax

from narrows.backends.tvm.devices import Machine
from narrows.backends.tvm.lowering import Lowering, RuleError
from narrows.backends.tvm.rules import RULES
from narrows.backends.tvm.rules.table import Call
from narrows.backends.tvm.values import Value


class MissingRulesError(Exception):
    """Operators have no rule.

    Attributes:
        found: Node names by operator.
    """

    def __init__(self, found: dict[str, list[str]]) -> None:
        self.found = found
        super().__init__(", ".join(found))


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
    return _Walk(Lowering(machine), weights).run(graph)


class _Walk:
    """Lowers the nodes of a description in their order."""

    def __init__(self, low: Lowering, weights: Mapping[str, np.ndarray]) -> None:
        self.low = low
        self.values: dict[str, Any] = {n: Value.constant(a) for n, a in weights.items()}

    def run(self, graph: Mapping[str, Any]) -> tvm.IRModule:
        """Return the module of a description."""
        params = []
        for spec in graph["inputs"]:
            shape = tuple(spec["shape"])
            var = relax.Var(spec["name"], relax.TensorType(shape, spec["dtype"]))
            params.append(var)
            self.values[spec["name"]] = self.low.made(var, shape, spec["dtype"])
        with self.low.builder.function("main", params):
            with self.low.builder.dataflow():
                for node in graph["nodes"]:
                    self._call(node)
                outputs = [self._output(name, params) for name in graph["outputs"]]
                result = self.low.builder.emit_output(relax.Tuple(outputs))
            self.low.builder.emit_func_output(result)
        return self.low.builder.get()

    def _call(self, node: Mapping[str, Any]) -> None:
        self.low.name = node["name"]
        shape, dtype = node["shape"], node["dtype"]
        several = isinstance(dtype, list)
        shape = [tuple(s) for s in shape] if several else tuple(shape)
        call = Call(node["name"], node["op"], self._arguments(node["args"]), shape, dtype)
        result = RULES[call.op](self.low, call)
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
        expr = self.low.plain(value)
        if value.array is not None or any(expr.same_as(p) for p in params):
            expr = self.low.emit(relax.op.reshape(expr, value.shape))  # an output must be computed
        return expr
