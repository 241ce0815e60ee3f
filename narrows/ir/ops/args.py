"""Reading and writing a node's arguments by the names of its ATen schema."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from narrows.ir.meta import Meta, shape_of


class _Schema(NamedTuple):
    target: Any
    positional: tuple[str, ...]
    keywords: frozenset[str]
    defaults: dict[str, Any]


# By identity: torch hashes an overload by its name, in Python, and it is asked for all the time.
_SCHEMAS: dict[int, _Schema] = {}


def _schema(target: Any) -> _Schema:
    """Return which arguments go by position, which by name alone, and all of them in order."""
    known = _SCHEMAS.get(id(target))
    if known is None:
        listed = target._schema.arguments
        known = _SCHEMAS[id(target)] = _Schema(
            target,
            tuple(a.name for a in listed if not a.kwarg_only),
            frozenset(a.name for a in listed if a.kwarg_only),
            {a.name: a.default_value if a.has_default_value() else None for a in listed},
        )
    return known


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return every argument of an ATen node by its schema name, defaults filled in."""
    schema = _schema(node.target)
    result = schema.defaults.copy()
    result.update(zip(schema.positional, node.args, strict=False))
    result.update(node.kwargs)
    return result


def first_tensor(node: fx.Node) -> fx.Node:
    """Return the node's first argument, which is a tensor for almost every operator."""
    first = next(iter(arguments(node).values()))
    assert isinstance(first, fx.Node)
    return first


def changed(node: fx.Node, changes: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the node's ``args`` and ``kwargs`` with some arguments replaced by schema name."""
    args, kwargs = list(node.args), dict(node.kwargs)
    schema = _schema(node.target)
    inline = schema.positional[: len(args)]
    for name, value in changes.items():
        if name in inline:
            args[inline.index(name)] = value
        elif name in schema.keywords or name in kwargs or value != schema.defaults[name]:
            kwargs[name] = value
    return tuple(args), kwargs


def numeric(value: Any) -> Any:
    """Return an argument with every node that stands for a number replaced by its example value."""
    return map_arg(value, lambda n: Meta(n).size if shape_of(n) is None else n)


def settled_arguments(node: fx.Node) -> dict[str, Any]:
    """Return `arguments`, with a number that the program computes at its value in the example."""
    given = arguments(node)
    if all(shape_of(n) is not None for n in node.all_input_nodes):
        return given
    return {name: numeric(value) for name, value in given.items()}


def computes_numbers(node: fx.Node) -> bool:
    """Whether a number among the arguments is computed by the program, from the batch's size."""
    return any(Meta(n).size is not None for n in node.all_input_nodes)


# The schema's names of the flag that makes an operator behave as in training.
TRAINING_FLAGS = frozenset({"train", "training"})


def training_flag(target: Any) -> str | None:
    """Return the argument that makes an operator behave as in training, if it has one."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    return next((name for name in _schema(target).defaults if name in TRAINING_FLAGS), None)


def is_tensor(value: Any) -> bool:
    """Whether an argument is a node that stands for one tensor."""
    return isinstance(value, fx.Node) and shape_of(value) is not None


def call(node: fx.Node, values: dict[fx.Node, Tensor]) -> Any:
    """Run the node's operator on tensors given per operand, numbers taken from the example."""
    args, kwargs = map_arg(
        (node.args, node.kwargs), lambda n: values[n] if n in values else Meta(n).size
    )
    with torch.no_grad():
        run: Any = node.target
        return run(*args, **kwargs)


def with_argument(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with one of them replaced, if the operator has it.

    Unlike `changed`, this is for the values of a run, such as the ``device`` a tensor goes to.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return args, kwargs
    schema = _schema(target)
    if name in schema.positional[: len(args)]:
        position = schema.positional.index(name)
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value} if name in schema.defaults else kwargs
