"""Rules for comparisons of codes, and for what is zero."""

from __future__ import annotations

import operator
from typing import Any

from tvm import relax, tirx

from narrows.backends.tvm.kernels import codes
from narrows.backends.tvm.lowering import Lowering
from narrows.backends.tvm.rules.codes import MOST_SHIFT, each
from narrows.backends.tvm.rules.pointwise import unary
from narrows.backends.tvm.rules.table import Call, rule
from narrows.backends.tvm.values import Value


@rule("narrows.compare")
def _compare(low: Lowering, call: Call) -> Value:
    args = call.args
    sides = [(args[f"{s}_zero"], args[f"{s}_shift"]) for s in ("a", "b")]
    if max(by for _, by in sides) > MOST_SHIFT:
        raise low.refuse("a comparison of numbers whose scales are too far apart")

    def answer(a: Any, b: Any) -> Any:
        left, right = (
            tirx.shift_left(codes.whole(x, zero, "int64"), codes.number(by, "int64"))
            for x, (zero, by) in zip((a, b), sides, strict=True)
        )
        return getattr(operator, args["how"])(left, right)

    return each(low, [args["a"], args["b"]], answer, "bool", "compare")


@rule("narrows.compare_number")
def _compare_number(low: Lowering, call: Call) -> Value:
    code = codes.number(call.args["code"], "int32")

    def answer(x: Any) -> Any:
        return getattr(operator, call.args["how"])(codes.whole(x, 0), code)

    return each(low, [call.args["x"]], answer, "bool", "compare")


@rule("logical_not")
def _logical_not(low: Lowering, call: Call) -> Value:
    x: Value = call.args["self"]
    if x.dtype == "bool":
        return unary(low, x, relax.op.logical_not)
    return unary(low, x, lambda e: relax.op.equal(e, low.scalar(0, x.dtype)), "bool")
