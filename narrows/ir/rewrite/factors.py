"""`factored`: what is left of a computed weight, computed from what is left of its factors.

A recipe (`narrows.ir.structure.computed`) is a small program whose inputs are parameters. Channels
go through it as they go through a network, by the rows of the op table: the parts of the result
that stay are all that is needed, and where the operators work channel by channel, parts of the
parameters are all that is read. Where something is computed *over* the channels that went, a mean
say, it has to go on counting them, and no smaller parameters would do: such a weight is a constant
from there on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.fx.node import map_arg

from narrows.errors import NarrowsError
from narrows.ir.compare import relative_error
from narrows.ir.graph import add_node
from narrows.ir.meta import Meta
from narrows.ir.ops import dialect
from narrows.ir.program import Note, Origin, Program, Pruning
from narrows.ir.rewrite import rewrite

# Beyond this many places of two axes, their labels would be larger than the weights.
LARGE = 1 << 23
# The rounding that sums of other blocks may have, in units of the dtype's last place.
UNITS = 256

OVER = "it counts what went, too"
SHARED = "another layer keeps other parts of what it is computed from"
CHANGED = "a rewrite has changed its numbers"
GROUPS = "its groups keep other channels, or channels of zeros were added"


def factored(program: Program) -> dict[str, Program | str]:
    """Return, per weight that was computed from others, what computes what is left of it.

    That is a program without inputs, whose weights are the parts of the factors that stay; for a
    weight that no such program computes it is the reason.
    """
    return program.memo("factored", lambda: _factored(program))


def _factored(program: Program) -> dict[str, Program | str]:
    found: dict[str, Program | str] = {}
    for name, weight in program.weights.items():
        origin = program.origins.get(name)
        recipe = program.recipes.get(name if origin is None else origin.name)
        if recipe is not None:
            found[name] = _of_one(recipe, weight, origin)
    leaves = dict(program.weights)
    for name, made in found.items():
        if isinstance(made, str):
            continue
        if any(_differ(leaves.get(n), t) for n, t in made.weights.items()):
            found[name] = SHARED
        else:
            leaves.update(made.weights)
    return found


def factor_notes(program: Program) -> Iterator[Note]:
    """Yield a note per weight that was computed from others: what `Program.to_module` trains."""
    for name, made in factored(program).items():
        if isinstance(made, str):
            text = f"{name!r} was computed from other weights and is one of its own now: {made}"
        else:
            factors = ", ".join(n for n in made.weights if n not in made.buffers)
            text = f"{name!r} is computed here once; to_module() trains what is left of {factors}"
        yield Note(name, "computed", text)


def _differ(known: Tensor | None, own: Tensor) -> bool:
    if known is None or known is own:
        return False
    return known.shape != own.shape or not torch.equal(known, own)


def _of_one(recipe: Program, weight: Tensor, origin: Origin | None) -> Program | str:
    kept = {} if origin is None else {a: i for a, i in enumerate(origin.index) if i is not None}
    if any(isinstance(i, tuple) or i < 0 for index in kept.values() for i in index):
        return GROUPS
    made = _sliced(recipe, kept) if kept else recipe
    if made is None:
        return OVER
    value = made()
    if value.shape != weight.shape or value.dtype != weight.dtype:
        return CHANGED
    bound = UNITS * torch.finfo(weight.dtype).eps
    return made if relative_error(value, weight) <= bound else CHANGED


# ---------------------------------------------------------------------- channels of a recipe


def _sliced(recipe: Program, kept: Mapping[int, tuple[int, ...]]) -> Program | None:
    """Return the recipe of a part of its result, made of parts of its weights.

    ``None`` where that takes more of them than what is left.

    Args:
        recipe: The recipe.
        kept: Per axis of the result the indices that stay, in order.
    """
    asked = _asked(recipe, kept)
    if asked is None:
        return None
    try:
        made, _ = rewrite(Pruning(asked))
    except NarrowsError:
        return None
    return _with_parts(made, asked, recipe)


def _asked(recipe: Program, kept: Mapping[int, tuple[int, ...]]) -> Program | None:
    """Return the recipe as a program of its weights that returns the part that stays."""
    graph, new, picks = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, Tensor]()
    returned: Any = recipe.output.args[0]
    (result,) = returned
    shape = Meta(result).shape
    leaves = [n for n in recipe.graph.nodes if n.op == "get_attr"]
    for node in leaves:
        new[node] = graph.placeholder(node.name)
        new[node].meta = dict(node.meta)
        own = Meta(node).shape
        axes = _channel_axes(own, shape, kept)
        if math.prod(own[a] for a in axes) > LARGE:
            return None
        Meta(new[node]).channels = axes
    for node in recipe.graph.nodes:
        if node.op == "call_function":
            args, kwargs = map_arg((node.args, node.kwargs), new.__getitem__)
            new[node] = add_node(graph, node.op, node.target, args, kwargs, node.name)
            new[node].meta = dict(node.meta)
    last = new[result]
    for axis, index in kept.items():
        picks[f"kept_{axis}"] = torch.tensor(index)
        place = graph.create_node("get_attr", f"kept_{axis}")
        Meta(place).shape, Meta(place).dtype = (len(index),), torch.int64
        before, last = (
            last,
            add_node(
                graph, "call_function", dialect.PICK, (last, axis, place), name=f"part_{axis}"
            ),
        )
        last.meta = dict(before.meta)
        old = Meta(before).shape
        Meta(last).shape = tuple(len(index) if a == axis else s for a, s in enumerate(old))
    graph.output((last,))
    examples = tuple(recipe.tensor(n) for n in leaves)
    return Program(
        graph=graph, weights=picks, in_spec=pytree.tree_flatten((examples, {}))[1],
        out_spec=recipe.out_spec, examples=examples, buffers=frozenset(picks), name=recipe.name,
    )  # fmt: skip


def _channel_axes(
    own: tuple[int, ...], shape: tuple[int, ...], kept: Iterable[int]
) -> tuple[int, ...]:
    """Return the axes of a factor that may hold channels of some axes of the result, by the sizes.

    An axis too many costs time, one too few a factor; neither makes a part wrong.
    """
    same = [
        a for a, size in enumerate(own)
        if any(size == shape[k] and (a == k or len(own) != len(shape)) for k in kept) and size > 1
    ]  # fmt: skip
    held = [a for a, s in enumerate(own) if s > 1 and any(s % shape[k] == 0 for k in kept)]
    return tuple(same or held)


def _with_parts(made: Program, asked: Program, recipe: Program) -> Program | None:
    """Return a rewritten recipe with the parts of its weights in place of its inputs.

    ``None`` where something but an input is cut.
    """
    names = [str(n.target) for n in recipe.graph.nodes if n.op == "get_attr"]
    graph, new, weights = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, Tensor]()
    cuts: dict[fx.Node, fx.Node] = {}
    known = {n.name for n in recipe.graph.nodes}
    for node, name in zip(made.placeholders, names, strict=True):
        value, last = recipe.weights[name], node
        while len(last.users) == 1 and _is_cut(step := next(iter(last.users)), known):
            value = _cut(made, step, value)
            cuts[step] = last = step
        if name in weights and _differ(weights[name], value):
            return None
        weights[name] = value.contiguous() if cuts else value
        new[node] = new[last] = graph.create_node("get_attr", name, name=node.name)
        new[last].meta = dict(last.meta)
    for node in made.graph.nodes:
        if node.op != "call_function" or node in cuts:
            continue
        if _is_cut(node, known):
            return None
        args, kwargs = map_arg((node.args, node.kwargs), new.__getitem__)
        new[node] = add_node(graph, node.op, node.target, args, kwargs, node.name)
        new[node].meta = dict(node.meta)
    graph.output(tuple(new[n] for n in made.output.args[0]))  # type: ignore[union-attr]
    return recipe.replace(graph=graph, weights=weights)


def _is_cut(node: fx.Node, known: set[str]) -> bool:
    return node.target in (dialect.PICK, dialect.SLICE) and node.name not in known


def _cut(made: Program, node: fx.Node, value: Tensor) -> Tensor:
    def given(n: fx.Node) -> Any:
        return value if n is node.args[0] else made.tensor(n)

    args, kwargs = map_arg((node.args, node.kwargs), given)
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


__all__ = ["factor_notes", "factored"]
