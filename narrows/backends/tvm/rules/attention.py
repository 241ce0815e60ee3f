"""Scaled dot-product attention as two products with a softmax between them."""

from __future__ import annotations

import math

import numpy as np
from tvm import relax

from narrows.backends.tvm.lowering import Lowering
from narrows.backends.tvm.rules.contractions import multiplied
from narrows.backends.tvm.rules.layout import taken
from narrows.backends.tvm.rules.norms import softmax
from narrows.backends.tvm.rules.pointwise import binary
from narrows.backends.tvm.rules.table import Call, rule
from narrows.backends.tvm.values import Value

op = relax.op


@rule("scaled_dot_product_attention")
def _attention(low: Lowering, call: Call) -> Value:
    query, key, value = (call.args[k] for k in ("query", "key", "value"))
    if call.args["dropout_p"]:
        raise low.refuse("attention with dropout draws random numbers")
    if call.args["enable_gqa"] and key.shape[-3] != query.shape[-3]:
        key, value = (_repeated(low, v, query.shape[-3]) for v in (key, value))
    scale = call.args["scale"]
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    axes = tuple(range(key.rank))
    turned = key.permuted((*axes[:-2], axes[-1], axes[-2]))
    scores = multiplied(low, query, turned, call.dtype)
    scores = binary(low, scores, _number(scale, call.dtype), op.multiply)
    mask = _mask(low, call, query.shape[-2], key.shape[-2])
    if mask is not None:
        scores = binary(low, scores, mask, op.add)
    return multiplied(low, softmax(low, scores, -1), value, call.dtype)


def _repeated(low: Lowering, value: Value, heads: int) -> Value:
    count = value.shape[-3]
    return taken(low, value, value.rank - 3, np.repeat(np.arange(count), heads // count))


def _number(number: float, dtype: str) -> Value:
    return Value.constant(np.asarray(number, dtype))


def _mask(low: Lowering, call: Call, queries: int, keys: int) -> Value | None:
    """Return what is added to the scores, if anything."""
    # Far enough from the rest that its exponential is zero; infinities would become NaN.
    never = -1e4 if call.dtype == "float16" else -1e30
    if call.args["is_causal"]:
        later = np.triu(np.ones((queries, keys), bool), 1)
        return Value.constant(np.where(later, never, 0).astype(call.dtype))
    mask = call.args["attn_mask"]
    if mask is None:
        return None
    if mask.dtype != "bool":
        if mask.array is not None:
            return Value.constant(np.maximum(mask.array, never).astype(call.dtype))
        return binary(low, mask, _number(never, call.dtype), op.maximum)
    if mask.array is not None:
        return Value.constant(np.where(mask.array, 0, never).astype(call.dtype))
    exprs, like = low.aligned([mask, _number(0, call.dtype), _number(never, call.dtype)])
    return low.like(like, low.emit(op.where(*exprs)), call.dtype)
