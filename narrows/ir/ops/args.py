"""Reading and writing a node's arguments by the names of its ATen schema."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from narrows.ir.program import Meta


@cache
def _schema(target: Any) -> tuple[tuple[str, Any, bool], ...]:
    return tuple(
        (a.name, a.default_value if a.has_default_value() else None, a.kwarg_only)
        for a in target._schema.arguments
    )


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return every argument of an ATen node by its schema name, defaults filled in."""
    result: dict[str, Any] = {}
    position = 0
    for name, default, keyword in _schema(node.target):
        if not keyword and position < len(node.args):
            result[name] = node.args[position]
            position += 1
        else:
            result[name] = node.kwargs.get(name, default)
    return result


def first_tensor(node: fx.Node) -> fx.Node:
    """Return the node's first argument, which is a tensor for almost every operator."""
    first = next(iter(arguments(node).values()))
    assert isinstance(first, fx.Node)
    return first


def changed(node: fx.Node, changes: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the node's ``args`` and ``kwargs`` with some arguments replaced by schema name."""
    args, kwargs, position = list(node.args), dict(node.kwargs), 0
    for name, default, keyword in _schema(node.target):
        inline = not keyword and position < len(args)
        if name in changes:
            if inline:
                args[position] = changes[name]
            elif keyword or name in kwargs or changes[name] != default:
                kwargs[name] = changes[name]
        position += inline
    return tuple(args), kwargs


def numeric(value: Any) -> Any:
    """Return an argument with every node that stands for a number replaced by its example value."""
    return map_arg(value, lambda n: Meta(n).size if Meta(n).shape is None else n)


def is_tensor(value: Any) -> bool:
    """Whether an argument is a node that stands for one tensor."""
    return isinstance(value, fx.Node) and Meta(value).shape is not None


def call(node: fx.Node, values: dict[fx.Node, Tensor]) -> Any:
    """Run the node's operator on tensors given per operand, numbers taken from the example."""
    args, kwargs = map_arg(
        (node.args, node.kwargs), lambda n: values[n] if n in values else Meta(n).size
    )
    with torch.no_grad():
        return invoke(node.target, args, kwargs)


VIEWS = frozenset({torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default})


def invoke(target: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator on labels, which are expanded tensors and so cannot always be viewed in
    place."""
    if target in VIEWS:
        return args[0].reshape(args[1])
    return target(*args, **kwargs)
