"""`DecomposeAttention`: attention becomes two matrix products and a softmax between them.

The integer forms work operator by operator. The queries are scaled, not the scores: they are fewer,
and a scale that is a power of two (heads of 16, 64 or 256) then only changes an exponent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from narrows.ir.editing import add_weight
from narrows.ir.meta import Meta, copy_meta, shape_of
from narrows.ir.ops import dialect, table
from narrows.ir.ops.args import arguments
from narrows.ir.ops.product import Attention
from narrows.ir.program import Draft, Note, Program
from narrows.passes.base import Fidelity, Pass, PassResult
from narrows.passes.eliminate_dead import EliminateDead
from narrows.passes.hidden_scores import choose_hidden


@dataclass(frozen=True)
class DecomposeAttention(Pass):
    """Takes scaled dot-product attention apart; with dropout it stays whole, with a note.

    A mask of truth values chooses between a score and minus infinity, one of numbers is added,
    unless it does no more than that; so it is in attention that is written out already. Keys that
    several queries share are repeated.
    """

    name: ClassVar[str] = "decompose-attention"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def run(self, program: Program) -> PassResult:
        """Return the program with its attention taken apart."""
        result = program.copy()
        notes, changed = [], False
        for node in result.nodes:
            if not isinstance(table.find(node), Attention):
                continue
            why = _obstacle(program, arguments(node))
            if why:
                notes.append(
                    Note(node.name, "attention", f"left whole: {why}", 0, Meta(node).source)
                )
                continue
            _decompose(result, node)
            changed = True
        changed |= choose_hidden(result)
        if not changed:
            return PassResult(program, False, tuple(notes))
        return PassResult(EliminateDead().run(result).program, True, tuple(notes))  # of masks


def _obstacle(program: Program, given: dict[str, Any]) -> str:
    if given["dropout_p"]:
        return "it has dropout"
    mask = given["attn_mask"]
    if mask is None or mask.op != "get_attr":
        return ""
    numbers = program.weights[str(mask.target)].detach()
    hidden = ~numbers if numbers.dtype is torch.bool else numbers == -math.inf
    if bool(hidden.all(-1).any()):
        return "its mask hides all keys from a query, which integers would give equal shares of all"
    return ""


def _decompose(program: Draft, node: fx.Node) -> None:
    given, graph = arguments(node), program.graph
    query, key, value = (given[k] for k in ("query", "key", "value"))
    shape, rank = shape_of(query), len(shape_of(query))
    scale = 1 / math.sqrt(shape[-1]) if given["scale"] is None else given["scale"]

    def call(target: Any, args: tuple[Any, ...], shape: tuple[int, ...], suffix: str) -> fx.Node:
        made = graph.create_node("call_function", target, args, {}, f"{node.name}_{suffix}")
        copy_meta(node, made)
        Meta(made).shape, Meta(made).dtype = tuple(shape), Meta(node).dtype
        return made

    def shared(operand: fx.Node, suffix: str) -> fx.Node:
        """Return keys or values once per query head."""
        sizes = shape_of(operand)
        times = shape[-3] // sizes[-3] if given["enable_gqa"] else 1
        if times == 1:
            return operand
        whole = (*sizes[:-3], shape[-3], *sizes[-2:])
        return call(dialect.REPEAT_EACH, (operand, times, rank - 3), whole, suffix)

    with graph.inserting_before(node):
        key, value = shared(key, "shared_keys"), shared(value, "shared_values")
        keys = shape_of(key)
        scores = (*shape_of(node)[:-2], shape[-2], keys[-2])
        scaled = call(dialect.MULTIPLY, (query, scale), shape, "scaled")
        order = [*range(rank - 2), rank - 1, rank - 2]
        turned = call(dialect.TURN, (key, order), (*keys[:-2], keys[-1], keys[-2]), "keys")
        products = call(dialect.MATMUL, (scaled, turned), scores, "scores")
        mask = _mask(program, node, given, scores[-2:])
        softmax: Any = dialect.SOFTMAX if given["attn_mask"] is None else dialect.SAFE_SOFTMAX
        if mask is not None and Meta(mask).dtype is torch.bool:
            hidden = (mask, products, -math.inf)
            products = call(dialect.CHOOSE, hidden, scores, "masked")
        elif mask is not None:
            products = call(dialect.ADD, (products, mask), scores, "masked")
        weights = call(softmax, (products, -1), scores, "weights")
        result = call(dialect.MATMUL, (weights, value), shape_of(node), "mixed")
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _mask(
    program: Draft, node: fx.Node, given: dict[str, Any], sizes: tuple[int, ...]
) -> fx.Node | None:
    """Return the node of a mask: true where a key counts, or numbers to add to scores."""
    mask, name = given["attn_mask"], f"{node.name}.mask"
    if given["is_causal"]:
        return add_weight(program, name, torch.ones(sizes, dtype=torch.bool).tril())
    if mask is None or mask.op != "get_attr" or Meta(mask).dtype is torch.bool:
        return mask
    numbers = program.tensor(mask).detach()
    told = numbers == 0
    if bool((told | (numbers == -math.inf)).all()):  # it says yes or no
        return add_weight(program, name, told)
    return mask
