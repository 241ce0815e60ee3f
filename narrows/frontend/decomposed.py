"""Operators of decomposed graphs, spelled as the undecomposed dialect does.

A graph comes decomposed when the user ran ``ExportedProgram.run_decompositions``, or when in-place
writes made `narrows` let torch functionalise it. Only what maps back one to one is mapped; the rest
stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from narrows.frontend.lifted import Lifted, is_item, val
from narrows.frontend.spellings import Call, Rule, renamed, respell

aten = torch.ops.aten


def recompose(lifted: Lifted) -> None:
    """Replace decomposed operators and second names by those of the dialect, in place."""
    for node in list(lifted.graph.nodes):
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        call = rule(*node.args, **node.kwargs) if rule is not None else None
        if call is None:
            respell(node)
            continue
        old = node
        if isinstance(val(node), (tuple, list)):  # only the first result is known to the dialect
            if not all(is_item(u) and u.args[1] == 0 for u in node.users):
                continue
            old = next(iter(node.users), node)
        target, args, kwargs = call
        with lifted.graph.inserting_before(node):
            new = lifted.graph.call_function(target, args, kwargs)
        new.meta = {**node.meta, "val": val(old)}
        for user in [u for u in node.users if u is not new and is_item(u) and old is not node]:
            user.replace_all_uses_with(new)
            lifted.graph.erase_node(user)
        node.replace_all_uses_with(new)
        lifted.graph.erase_node(node)


def _convolution(
    x: Any, weight: fx.Node, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> Call:  # fmt: skip
    rank = val(weight).dim() - 2
    if rank not in (1, 2, 3):
        return None
    if transposed:
        op = (
            aten.conv_transpose1d.default,
            aten.conv_transpose2d.input,
            aten.conv_transpose3d.input,
        )
        rest = (stride, padding, output_padding, groups, dilation)
        return op[rank - 1], (x, weight, bias, *rest), {}
    op = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
    return op[rank - 1], (x, weight, bias, stride, padding, dilation, groups), {}


def _batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: Any, eps: Any
) -> Call:
    return aten.batch_norm.default, (x, weight, bias, mean, var, False, momentum, eps, True), {}


def _batch_norm_of_input(
    x: Any, weight: Any, bias: Any, training: bool, momentum: Any, eps: Any
) -> Call:
    args = (x, weight, bias, None, None, True, momentum, eps, True)
    return (aten.batch_norm.default, args, {}) if training else None


def _layer_norm(x: Any, shape: Any, weight: Any, bias: Any, eps: Any) -> Call:
    return aten.layer_norm.default, (x, shape, weight, bias, eps), {}


def _group_norm(
    x: Any, weight: Any, bias: Any, n: Any, c: Any, hw: Any, groups: Any, eps: Any
) -> Call:
    return aten.group_norm.default, (x, groups, weight, bias, eps), {}


def _addmm(bias: Any, x: Any, weight: Any, **kwargs: Any) -> Call:
    source = _transposed(weight)
    plain = kwargs.get("alpha", 1) == 1 and kwargs.get("beta", 1) == 1 and val(bias).dim() == 1
    return (aten.linear.default, (x, source, bias), {}) if plain and source is not None else None


def _mm(x: Any, weight: Any) -> Call:
    source = _transposed(weight)
    return (aten.linear.default, (x, source), {}) if source is not None else None


def _transposed(node: fx.Node) -> Any:
    """Return ``w`` where ``node`` is the transpose of the matrix ``w``."""
    if node.target is aten.permute.default and [a % 2 for a in node.args[1]] == [1, 0]:  # type: ignore
        return node.args[0]
    return None


def _dropout(x: Any, p: float, train: bool | None) -> Call:
    return (aten.dropout.default, (x, p, False), {}) if train is False else None


def _attention(
    query: Any, key: Any, value: Any, p: float = 0.0, causal: bool = False, **kwargs: Any
) -> Call:
    named = {k: v for k, v in kwargs.items() if k == "scale"}
    args = (query, key, value, kwargs.get("attn_mask"), p, causal)
    return aten.scaled_dot_product_attention.default, args, named


def _copy(x: fx.Node, source: fx.Node) -> Call:
    """``x.copy_(source)`` where x is not written any more: the source, as x's type and shape."""
    before, after = val(source), val(x)
    if before.dtype != after.dtype:
        return None if before.shape != after.shape else (aten.to.dtype, (source, after.dtype), {})
    return aten.expand_as.default, (source, x), {}


_RULES: dict[Any, Rule] = {
    aten.convolution.default: _convolution,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten._native_batch_norm_legit.no_stats: _batch_norm_of_input,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
    aten.addmm.default: _addmm,
    aten.mm.default: _mm,
    aten.native_dropout.default: _dropout,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten.max_pool2d_with_indices.default: renamed(aten.max_pool2d.default),
    aten.max_pool3d_with_indices.default: renamed(aten.max_pool3d.default),
    aten._adaptive_avg_pool2d.default: renamed(aten.adaptive_avg_pool2d.default),
    aten._adaptive_avg_pool3d.default: renamed(aten.adaptive_avg_pool3d.default),
    aten.copy.default: _copy,
    aten.fill.Scalar: renamed(aten.full_like.default),
    aten.zero.default: lambda x: (aten.full_like.default, (x, 0), {}),
}
