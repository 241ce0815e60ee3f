"""A program with other weights: those of a state dict, or its own in another precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from narrows.errors import ProgramError, suggest
from narrows.ir.meta import Meta, copy_meta
from narrows.ir.ops import dialect
from narrows.ir.ops.args import arguments, changed
from narrows.ir.program import Program
from narrows.ir.rewrite.factors import factored


def with_state(program: Program, state: Mapping[str, Tensor]) -> Program:
    """Return the program with the tensors of a state dict; see `Program.with_weights`."""
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ProgramError(
            "weights come as a state dict, tensors by name",
            why=f"got a {type(state).__name__}"
            + (" of other things" if isinstance(state, Mapping) else ""),
            hint="program.with_weights(model.state_dict())",
        )
    weights = {}
    for name, tensor in program.weights.items():
        names = [name, *(a for a, n in program.aliases.items() if n == name)]
        found = next((state[n] for n in names if n in state), None)
        if found is None:
            found = _computed(program, name, state)
        if found is None:
            if name in program.buffers and name not in program.stored:
                weights[name] = tensor
                continue
            raise ProgramError(f"the checkpoint has no weight {name!r}", hint=suggest(name, state))
        if found.shape != tensor.shape:
            raise ProgramError(
                f"weight {name!r} is {list(found.shape)} in the checkpoint, "
                f"{list(tensor.shape)} in the program"
            )
        weights[name] = found.detach().to(tensor.dtype)
    return program.replace(weights=weights)


def _computed(program: Program, name: str, state: Mapping[str, Tensor]) -> Tensor | None:
    """Return a weight that was computed from others, from what a state dict has of those."""
    recipe = factored(program).get(name) if program.recipes else None
    if not isinstance(recipe, Program) or not recipe.weights.keys() & state.keys():
        return None
    return recipe.with_weights(state)()


def in_precision(program: Program, dtype: torch.dtype) -> Program:
    """Return the program in ``dtype``; whatever was floating-point, in whatever dtype, is that.

    A number that ``dtype`` cannot hold, such as the lowest one that fills a mask, becomes the
    nearest that it can.

    Raises:
        ProgramError: ``dtype`` is not floating-point.
    """
    if not _is_floating(dtype):
        raise ProgramError(
            f"a program is floating-point, not {dtype}", hint="program.to(torch.float32)"
        )
    result = program.copy()
    result.weights = {n: _cast(t, dtype) for n, t in program.weights.items()}
    result.examples = tuple(_cast(e, dtype) for e in program.examples)
    result.recipes = {n: in_precision(r, dtype) for n, r in program.recipes.items()}
    for node in result.nodes:
        born = _is_born_floating(node)
        if _is_floating(Meta(node).dtype):
            Meta(node).dtype = dtype
        if node.op != "call_function":
            continue
        node.args = pytree.tree_map(lambda a: _literal(a, dtype), node.args)
        node.kwargs = pytree.tree_map(lambda a: _literal(a, dtype), node.kwargs)
        _bound_numbers(node, dtype)
        if born:
            _say_dtype(result.graph, node, dtype)
    made = result.seal()
    if program.pruning is None:
        return made

    def change(other: Program) -> Program:
        return made if other.graph is program.graph else in_precision(other, dtype)

    return made.replace(pruning=program.pruning.translated(change))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    most = torch.finfo(dtype).max
    if torch.finfo(value.dtype).max > most:
        value = torch.where(value.isfinite(), value.clamp(-most, most), value)
    return value.to(dtype)


def _literal(value: Any, dtype: torch.dtype) -> Any:
    if _is_floating(value):
        return dtype
    most = torch.finfo(dtype).max
    if isinstance(value, float) and math.isfinite(value) and abs(value) > most:
        return math.copysign(most, value)
    return value


def _bound_numbers(node: fx.Node, dtype: torch.dtype) -> None:
    """Let whole numbers that stand for elements be such that ``dtype`` holds; sizes stay."""
    if not _is_floating(Meta(node).dtype) or not hasattr(node.target, "_schema"):
        return
    most, given = torch.finfo(dtype).max, arguments(node)
    large = {
        a.name: math.copysign(most, given[a.name])
        for a in node.target._schema.arguments  # type: ignore[union-attr]
        if str(a.type) in ("number", "Optional[number]")
        and type(given.get(a.name)) is int
        and abs(given[a.name]) > most
    }
    if large:
        node.args, node.kwargs = changed(node, large)


def _is_floating(dtype: Any) -> bool:
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _is_born_floating(node: fx.Node) -> bool:
    """Whether a node's result is floating-point although nothing it reads is."""
    if not isinstance(node.target, torch._ops.OpOverload) or not _is_floating(Meta(node).dtype):
        return False
    if _is_floating(arguments(node).get("dtype")):
        return False
    read = [Meta(n) for n in node.all_input_nodes if Meta(n).size is None]
    return all(m.dtype is not None and not m.dtype.is_floating_point for m in read)


def _say_dtype(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> None:
    """Have a node that takes torch's default dtype make ``dtype`` instead."""
    if dtype is torch.get_default_dtype():
        return
    if "dtype" in arguments(node):
        node.args, node.kwargs = changed(node, {"dtype": dtype})
        return
    with graph.inserting_after(node):
        made = graph.call_function(dialect.CAST, (node, dtype))
    copy_meta(node, made)
    Meta(made).shape, Meta(made).dtype = Meta(node).shape, dtype
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    Meta(node).dtype = torch.get_default_dtype()
