"""`DecomposeAttention`: attention becomes two matrix products and a softmax between them.

The integer forms work operator by operator. The queries are scaled, not the scores: they are fewer,
and a scale that is a power of two (heads of 16, 64 or 256) then only changes an exponent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from narrows.ir.ops.args import arguments
from narrows.ir.program import Meta, Note, Program, aten, copy_meta, shape_of
from narrows.passes.base import Fidelity, Pass, PassResult


@dataclass(frozen=True)
class DecomposeAttention(Pass):
    """Takes scaled dot-product attention without a mask apart; others stay, with a note."""

    name: ClassVar[str] = "decompose-attention"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def run(self, program: Program) -> PassResult:
        """Return the program with its attention taken apart."""
        result = program.copy()
        notes, changed = [], False
        for node in result.nodes:
            if node.target is not aten.scaled_dot_product_attention.default:
                continue
            why = _obstacle(arguments(node))
            if why:
                notes.append(
                    Note(node.name, "attention", f"left whole: {why}", 0, Meta(node).source)
                )
                continue
            _decompose(result.graph, node)
            changed = True
        return PassResult(result if changed else program, changed, tuple(notes))


def _obstacle(given: dict[str, Any]) -> str:
    if given["attn_mask"] is not None or given["is_causal"]:
        return "it has a mask"
    if given["dropout_p"]:
        return "it has dropout"
    return "its heads share keys" if given["enable_gqa"] else ""


def _decompose(graph: fx.Graph, node: fx.Node) -> None:
    given = arguments(node)
    query, key, value = (given[k] for k in ("query", "key", "value"))
    shape, rank = shape_of(query), len(shape_of(query))
    scale = 1 / math.sqrt(shape[-1]) if given["scale"] is None else given["scale"]

    def call(target: Any, args: tuple[Any, ...], shape: tuple[int, ...], suffix: str) -> fx.Node:
        made = graph.create_node("call_function", target, args, {}, f"{node.name}_{suffix}")
        copy_meta(node, made)
        Meta(made).shape, Meta(made).dtype = tuple(shape), Meta(node).dtype
        return made

    keys = shape_of(key)
    lead = shape_of(node)[:-2]
    scores = (*lead, shape[-2], keys[-2])
    with graph.inserting_before(node):
        scaled = call(aten.mul.Tensor, (query, scale), shape, "scaled")
        turned = call(aten.transpose.int, (key, rank - 2, rank - 1),
                      (*keys[:-2], keys[-1], keys[-2]), "keys")  # fmt: skip
        products = call(aten.matmul.default, (scaled, turned), scores, "scores")
        weights = call(aten.softmax.int, (products, -1), scores, "weights")
        result = call(aten.matmul.default, (weights, value), shape_of(node), "mixed")
    node.replace_all_uses_with(result)
    graph.erase_node(node)
