"""`settled`: weights that are computed from other weights become weights, and how is remembered.

Weight norm, spectral norm, standardised and scaled weights, masks of ``torch.nn.utils.prune``,
low-rank sums, parts of a packed matrix: a layer's weight is then the result of a small program
whose inputs are parameters. Channels are chosen and removed in its result, a weight like others.
The small program stays beside it as its *recipe* (`Program.recipes`), so that what is left can be
trained as it was (`narrows.ir.rewrite.factors`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch.fx.node import map_arg

from narrows.ir.channels import Facts
from narrows.ir.editing import add_weight
from narrows.ir.graph import add_node
from narrows.ir.meta import Meta
from narrows.ir.ops import table
from narrows.ir.ops.args import arguments, is_tensor
from narrows.ir.ops.lookup import Lookup
from narrows.ir.program import Draft, Program
from narrows.ir.structure.layers import outline, root_of

# Where a name is taken, by a weight that the result is computed from, say.
SUFFIX = "_computed"


def settled(program: Program) -> Program:
    """Return the program with the weights of its layers and norms computed; itself if all are.

    A computed weight has the name of the layer and its argument, ``conv.weight``, where the layer
    is a module of its own that has none of that name, else the name of the largest weight that it
    is computed from, with a suffix.
    """
    (made,) = program.memo("settled", lambda: (_settled(program),))
    return program if made is None else made


def _settled(program: Program) -> Program | None:
    fixed = fixed_nodes(program)
    if not fixed:
        return None
    facts = outline(program)
    found: dict[fx.Node, list[tuple[fx.Node, str]]] = {}
    for node in program.graph.nodes:
        for name in _own(facts, node):
            root, _ = root_of(arguments(node)[name])
            if root in fixed and _is_float(root):
                found.setdefault(root, []).append((node, name))
    return folded(program, list(found), _names(program, fixed, found)) if found else None


def _is_float(node: fx.Node) -> bool:
    dtype = Meta(node).dtype
    return dtype is not None and dtype.is_floating_point


def _own(facts: Facts, node: fx.Node) -> Iterator[str]:
    """Yield the arguments of a node that hold what a layer or a norm owns."""
    row = table.find(node)
    if row is None or facts.is_free(node):
        return
    c = table.contraction(facts, node)
    if c is not None:
        yield from c.names[1:] if c.bias is not None else c.names[1:2]
    elif isinstance(row, Lookup):
        yield "weight"
    elif row.gain:
        given = arguments(node)
        yield from (name for name in (row.gain, "bias") if is_tensor(given.get(name)))


def fixed_nodes(program: Program) -> dict[fx.Node, None]:
    """Return the nodes that weights alone decide, in execution order."""
    fixed: dict[fx.Node, None] = {}
    for node in program.graph.nodes:
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        inputs = node.all_input_nodes
        alone = inputs and all(n.op == "get_attr" or n in fixed for n in inputs)
        if node.op == "call_function" and alone and not random:
            fixed[node] = None
    return fixed


# ---------------------------------------------------------------------- what becomes a weight


def folded(program: Program, nodes: Iterable[fx.Node], names: Mapping[fx.Node, str]) -> Program:
    """Return the program with what some nodes compute as weights, each with its recipe.

    Args:
        program: The program.
        nodes: Nodes that weights alone decide (`fixed_nodes`).
        names: What the new weights are called; those of one name are computed alike.
    """
    result = program.copy()
    new = dict(zip(program.graph.nodes, result.graph.nodes, strict=True))
    recipes, made = dict(program.recipes), dict[str, fx.Node]()
    for node in nodes:
        name = names[node]
        if name not in made:
            recipe = recipe_of(program, node)
            made[name] = add_weight(result, name, recipe().clone())
            own = str(made[name].target)
            recipes[own] = recipe
            if recipe.weights.keys() - recipe.buffers:
                result.buffers = result.buffers - {own}
            if recipe.stored:
                result.stored = result.stored | {own}
        new[node].replace_all_uses_with(made[name])
    _without_dead(result, [new[n] for n in fixed_nodes(program)])
    result.recipes = recipes
    return result.seal()


def _without_dead(program: Draft, nodes: list[fx.Node]) -> None:
    """Erase those of some nodes that nobody reads any more, and the weights that only they read."""
    read = [n for n in program.graph.nodes if n.op == "get_attr" and n.users]
    leaves = {str(n.target) for n in read}
    for node in reversed(nodes):
        if not node.users:
            program.graph.erase_node(node)
    for node in read:
        if not node.users:
            program.graph.erase_node(node)
    held = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    gone = {name for name in leaves if name not in held}
    for name in gone:
        del program.weights[name]
    program.aliases = {a: n for a, n in program.aliases.items() if n not in gone}
    program.buffers = program.buffers - gone
    program.stored = program.stored - gone


def recipe_of(program: Program, node: fx.Node) -> Program:
    """Return the program that computes a node that weights alone decide: without inputs."""
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    wanted = {node}
    for one in reversed(program.graph.nodes):
        if one in wanted:
            wanted.update(one.all_input_nodes)
    for one in program.graph.nodes:
        if one in wanted:
            args, kwargs = map_arg((one.args, one.kwargs), new.__getitem__)
            new[one] = add_node(graph, one.op, one.target, args, kwargs, one.name)
            new[one].meta = dict(one.meta)
    graph.output((new[node],))
    names = {str(n.target): None for n in new if n.op == "get_attr"}
    return Program(
        graph=graph, weights={name: program.weights[name] for name in names},
        in_spec=pytree.tree_flatten(((), {}))[1], out_spec=pytree.tree_flatten(torch.zeros(()))[1],
        examples=(), aliases={a: n for a, n in program.aliases.items() if n in names},
        buffers=program.buffers & names.keys(), stored=program.stored & names.keys(),
        name=node.name,
    )  # fmt: skip


# ---------------------------------------------------------------------- what it is called


def _names(
    program: Program,
    fixed: Iterable[fx.Node],
    found: Mapping[fx.Node, list[tuple[fx.Node, str]]],
) -> dict[fx.Node, str]:
    """Return a name per node; those that compute the same of the same have one."""
    alike = _alike(program, fixed)
    readers: dict[int, list[tuple[fx.Node, str]]] = {}
    for node, listed in found.items():
        readers.setdefault(alike[node], []).extend(listed)
    first = {alike[node]: node for node in reversed(list(found))}
    own = {number: _own_name(listed) for number, listed in readers.items()}
    wanted = [name for name in own.values() if name]
    taken = {*program.weights, *program.aliases}
    names: dict[int, str] = {}
    for number, name in own.items():
        if not name or wanted.count(name) > 1:
            name = f"{_largest(program, first[number])}{SUFFIX}"
        elif name in taken:
            name += SUFFIX
        stem, count = name, 0
        while name in taken:
            count += 1
            name = f"{stem}_{count}"
        taken.add(name)
        names[number] = name
    return {node: names[alike[node]] for node in found}


def _alike(program: Program, fixed: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """Return a number per node; those that compute the same of the same have one."""
    numbers: dict[Any, int] = {}
    found: dict[fx.Node, int] = {}
    for node in (*(n for n in program.graph.nodes if n.op == "get_attr"), *fixed):
        given = map_arg((node.args, node.kwargs), lambda n: f"%{found[n]}")
        key = f"{node.op} {node.target} {given}"
        found[node] = numbers.setdefault(key, len(numbers))
    return found


def _own_name(readers: list[tuple[fx.Node, str]]) -> str:
    """Return the name that a layer as a module has for what it reads, if it is one."""
    names = {f"{Meta(n).module}.{name}" for n, name in readers if Meta(n).module}
    plain = {name for _, name in readers} <= {"weight", "bias"}
    return names.pop() if plain and len(names) == 1 else ""


def _largest(program: Program, node: fx.Node) -> str:
    """Return the largest weight that a node is computed from, parameters before buffers."""
    recipe = recipe_of(program, node)

    def size(item: tuple[str, Tensor]) -> tuple[bool, int]:
        return item[0] not in program.buffers, item[1].numel()

    return max(recipe.weights.items(), key=size)[0]


__all__ = ["fixed_nodes", "folded", "recipe_of", "settled"]
