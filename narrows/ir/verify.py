"""`verify`: the invariants of the program dialect, as a table.

Each row is a predicate over one node (or over the whole program) and what it means when it fails.
Every pass starts from and ends with a program for which all rows hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from narrows.errors import ProgramError
from narrows.ir.editing import infer_shapes
from narrows.ir.graph import SIZE_FUNCTIONS
from narrows.ir.meta import Meta, op_name, where
from narrows.ir.program import Program

# What torch.export spells arithmetic on sizes with where Python's own would not be symbolic.
SYMBOLIC = frozenset({torch.sym_float, torch.sym_int, torch.sym_max, torch.sym_min, torch.sym_not})


@dataclass(frozen=True)
class NodeRule:
    """A predicate that the nodes of some kinds satisfy, and the sentence for one that does not."""

    ops: tuple[str, ...]
    holds: Callable[[Program, fx.Node], bool]
    what: str
    why: str = ""


@dataclass(frozen=True)
class ProgramRule:
    """A rule over the whole program: yields what breaks it."""

    broken: Callable[[Program], Iterator[str]]
    why: str = ""


def verify(program: Program, *, shapes: bool = False) -> None:
    """Check that a program keeps the invariants of its dialect; return nothing.

    Args:
        program: The program; it is only read.
        shapes: Also run the graph without data and compare shapes and types with the nodes' meta.

    Raises:
        ProgramError: Names the node, the user's source line, and the invariant.
    """
    _check_order(program)
    for node in program.graph.nodes:
        for rule in NODE_RULES:
            if node.op in rule.ops and not rule.holds(program, node):
                raise ProgramError(
                    f"{program.name}: {rule.what.format(op=op_name(node), target=node.target)}",
                    where=where(node),
                    why=rule.why,
                )
    for rule in PROGRAM_RULES:
        for what in rule.broken(program):
            raise ProgramError(f"{program.name}: {what}", why=rule.why)
    if shapes:
        _check_shapes(program)


# ---------------------------------------------------------------------- one node


def _known_kind(program: Program, node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr", "call_function", "output")


def _known_target(program: Program, node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) or node.target in SIZE_FUNCTIONS | SYMBOLIC


def _pure(program: Program, node: fx.Node) -> bool:
    return not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable


def _weight_exists(program: Program, node: fx.Node) -> bool:
    return node.target in program.weights


def _weight_fits(program: Program, node: fx.Node) -> bool:
    meta, tensor = Meta(node), program.weights[str(node.target)]
    return meta.shape == tuple(tensor.shape) and meta.dtype == tensor.dtype


def _no_stray_kwargs(program: Program, node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return not node.kwargs
    return set(node.kwargs) <= {a.name for a in node.target._schema.arguments}


def _has_meta(program: Program, node: fx.Node) -> bool:
    """One tensor has a shape and a dtype, a number its size; only tuple results have neither."""
    meta = Meta(node)
    if meta.shape is not None:
        return meta.dtype is not None
    if meta.size is not None:
        return True
    if node.op == "placeholder":
        return True  # None, a string
    returns = node.target._schema.returns if isinstance(node.target, OpOverload) else ()
    return len(returns) > 1 or any(isinstance(r.type, torch.ListType) for r in returns)


def _axes_exist(program: Program, node: fx.Node) -> bool:
    meta = Meta(node)
    return all(0 <= axis < len(meta.shape or ()) for axis in meta.dynamic)


def _output_is_tuple(program: Program, node: fx.Node) -> bool:
    return len(node.args) == 1 and isinstance(node.args[0], tuple)


NODE_RULES = (
    NodeRule(
        ("placeholder", "get_attr", "call_function", "call_module", "call_method", "output"),
        _known_kind,
        "a node of a kind outside the dialect",
        why="a program holds placeholder, get_attr, call_function and output nodes",
    ),
    NodeRule(
        ("call_function",),
        _known_target,
        "{op} is no operator of the dialect",
        why="a program calls overloads of torch.ops, getitem, and arithmetic on sizes",
    ),
    NodeRule(("call_function",), _pure, "{op} writes into its arguments", "programs are values"),
    NodeRule(("call_function",), _no_stray_kwargs, "{op} has keyword arguments it does not know"),
    NodeRule(("get_attr",), _weight_exists, "no weight {target!r} to read"),
    NodeRule(("get_attr",), _weight_fits, "the meta does not fit the weight {target!r}"),
    NodeRule(
        ("placeholder", "get_attr", "call_function"),
        _has_meta,
        "{op} has no shape in its meta",
        why="passes go by the shapes; call infer_shapes after a rewrite",
    ),
    NodeRule(
        ("placeholder", "get_attr", "call_function"), _axes_exist, "a free axis that is not there"
    ),
    NodeRule(("output",), _output_is_tuple, "the output node holds no tuple"),
)


# ---------------------------------------------------------------------- the program


def _check_order(program: Program) -> None:
    """Check that nodes stand after what they read, under unique and valid names."""
    seen: set[fx.Node] = set()
    names: set[str] = set()
    for node in program.graph.nodes:
        for arg in node.all_input_nodes:
            if arg not in seen:
                raise ProgramError(
                    f"{program.name}: {node.name} reads {arg.name} before it is computed",
                    where=where(node),
                )
        if node.name in names or not node.name.isidentifier():
            raise ProgramError(
                f"{program.name}: {node.name!r} is no valid and unique name", where=where(node)
            )
        seen.add(node)
        names.add(node.name)


def _output_count(program: Program) -> Iterator[str]:
    outputs = [n for n in program.graph.nodes if n.op == "output"]
    if len(outputs) != 1 or program.nodes[-1].op != "output":
        yield f"{len(outputs)} output nodes; one belongs at the end"
        return
    count = len(outputs[0].args[0])  # type: ignore[arg-type]
    if count != program.out_spec.num_leaves:
        yield f"{count} outputs, the result's structure has {program.out_spec.num_leaves}"


def _input_count(program: Program) -> Iterator[str]:
    holders, examples = len(program.placeholders), len(program.examples)
    if not holders == examples == program.in_spec.num_leaves:
        yield (
            f"{holders} placeholders and {examples} examples, "
            f"the arguments' structure has {program.in_spec.num_leaves}"
        )


def _inputs_fit(program: Program) -> Iterator[str]:
    for node, example in zip(program.placeholders, program.examples, strict=True):
        meta = Meta(node)
        if isinstance(example, Tensor) and meta.shape != tuple(example.shape):
            yield f"input {node.name} has shape {meta.shape}, its example {tuple(example.shape)}"


def _weights_read(program: Program) -> Iterator[str]:
    read = {n.target for n in program.graph.nodes if n.op == "get_attr" and n.users}
    for name in program.weights:
        if name not in read:
            yield f"nothing reads the weight {name!r}"


def _weights_once(program: Program) -> Iterator[str]:
    targets = [n.target for n in program.graph.nodes if n.op == "get_attr"]
    for name in sorted({str(t) for t in targets if targets.count(t) > 1}):
        yield f"the weight {name!r} has several nodes"


def _aliases_resolve(program: Program) -> Iterator[str]:
    for alias, name in program.aliases.items():
        if name not in program.weights:
            yield f"the alias {alias!r} stands for {name!r}, which is no weight"
        if alias in program.weights:
            yield f"{alias!r} is a weight and an alias"


def _buffers_exist(program: Program) -> Iterator[str]:
    for name in sorted(program.buffers - set(program.weights)):
        yield f"the buffer {name!r} is no weight"


def _states_fit(program: Program) -> Iterator[str]:
    holders = {n.name: Meta(n).shape for n in program.placeholders}
    results: Any = program.output.args[0]
    for state in program.states:
        given = holders.get(state.name)
        result = results[state.output] if state.output < len(results) else None
        made = Meta(result).shape if isinstance(result, fx.Node) else None
        for what, shape in (("input", given), ("output", made)):
            if shape is None or tuple(shape[a] for a in state.axes) != state.sizes:
                yield f"the {what} of the state {state.name!r} has shape {shape}, not {state.sizes}"


PROGRAM_RULES = (
    ProgramRule(_output_count),
    ProgramRule(_input_count),
    ProgramRule(_inputs_fit),
    ProgramRule(_states_fit, why="what is returned goes in again"),
    ProgramRule(_weights_read, why="dead weights would be saved and counted"),
    ProgramRule(_weights_once, why="a shared weight stands once"),
    ProgramRule(_aliases_resolve),
    ProgramRule(_buffers_exist),
)


# ---------------------------------------------------------------------- shapes


def _check_shapes(program: Program) -> None:
    """Compare every node's meta with a run without data."""
    copy = program.copy()
    before = {n.name: Meta(n) for n in program.graph.nodes}
    for node in copy.graph.nodes:
        for key in ("shape", "dtype", "size"):
            node.meta.pop(key, None)
    try:
        infer_shapes(copy)
    except Exception as error:
        raise ProgramError(
            f"{program.name} does not run: {type(error).__name__}: {error}"
        ) from error
    for node in copy.graph.nodes:
        old, new = before[node.name], Meta(node)
        same_size = old.size == new.size or (
            isinstance(old.size, float) and math.isclose(old.size, new.size or math.nan)
        )
        if (old.shape, old.dtype) != (new.shape, new.dtype) or not same_size:
            raise ProgramError(
                f"{program.name}: the meta says {old.dtype} {old.shape} {old.size or ''}, "
                f"the operator gives {new.dtype} {new.shape} {new.size or ''}",
                where=where(program.node(node.name)),
            )
