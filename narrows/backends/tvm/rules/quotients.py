"""Rules for quotients of two activations, and for vector norms, of codes."""

from __future__ import annotations

import math
from typing import Any

from tvm import relax, tirx

from narrows.backends.tvm.kernels import codes
from narrows.backends.tvm.kernels.settling import HALF_EVEN, quotient
from narrows.backends.tvm.lowering import Lowering
from narrows.backends.tvm.rules.codes import each
from narrows.backends.tvm.rules.integers import settle_of
from narrows.backends.tvm.rules.reductions import reduced
from narrows.backends.tvm.rules.table import Call, rule
from narrows.backends.tvm.values import Value

BEYOND = 2**20  # a number of steps that no grid has


@rule("narrows.div")
def _div(low: Lowering, call: Call) -> Value:
    args, by = call.args, call.args["shift_by"]
    settle = settle_of(call, 0, 0)

    def number(value: int) -> Any:
        return codes.number(value, "int64")

    def code(a: Any, b: Any) -> Any:
        over = codes.whole(a, args["a_zero"], "int64")
        under = codes.whole(b, args["b_zero"], "int64")
        none = under == number(0)
        beyond = over * number(BEYOND)
        over = tirx.Select(under < number(0), number(0) - over, over)
        under = tirx.Select(none, number(1), tirx.abs(under))
        over = tirx.shift_left(over, number(-by)) if by < 0 else over
        under = tirx.shift_left(under, number(by)) if by > 0 else under
        made = quotient(over, under, settle.rounding, "int64")
        return codes.clipped(tirx.Select(none, beyond, made), settle, "int64")

    return each(low, [args["a"], args["b"]], code, "uint8", "divide")


@rule("narrows.vector_norm")
def _vector_norm(low: Lowering, call: Call) -> Value:
    args, zero, order = call.args, call.args["x_zero"], call.args["order"]
    if low.machine.gpu:
        raise low.refuse("a norm of codes on a GPU, whose compilers round roots their own way")
    settle = settle_of(call, 0, 0)

    def size(code: Any) -> Any:
        whole = codes.whole(code, zero, "int64")
        return whole * whole if order == 2 else tirx.abs(whole)

    sizes = each(low, [args["x"]], size, "int64", "sizes")
    over = relax.op.max if order == math.inf else relax.op.sum
    total = reduced(low, sizes, list(args["axes"]), args["keepdim"], over)

    def code(value: Any) -> Any:
        made = tirx.Cast("float64", value)
        made = tirx.sqrt(made) if order == 2 else made
        made = made * codes.number(2.0 ** -args["shift_by"], "float64")
        if settle.rounding != HALF_EVEN:
            made = tirx.floor(made + codes.number(0.5, "float64"))
        made = tirx.min(made, codes.number(float(BEYOND), "float64"))
        return codes.clipped(tirx.Cast("int64", tirx.nearbyint(made)), settle, "int64")

    return each(low, [total], code, "uint8", "root")
