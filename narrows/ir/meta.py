"""`Meta`: what a node of a graph knows of itself, and the one place that spells the keys of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


class _Key:
    """One key of ``node.meta``, as an attribute of `Meta`."""

    __slots__ = ("blank", "key")

    def __init__(self, key: str, blank: Any = None) -> None:
        self.key, self.blank = key, blank

    def __get__(self, meta: Meta, owner: type) -> Any:
        return meta._meta.get(self.key, self.blank)

    def __set__(self, meta: Meta, value: Any) -> None:
        meta._meta[self.key] = value


class Meta:
    """Typed access to what a node knows of itself; the keys of ``node.meta`` are spelled only here.

    Attributes:
        shape: The shape at the example's sizes; ``None`` for a node that is not one tensor.
        dtype: The tensor's dtype.
        dynamic: The axes whose size is free (the batch axis).
        channels: The axes of an input that channels lie on, where that is declared.
        size: The value at the example's sizes of a node that is a plain number.
        source: ``file:line`` of the user's code.
        code: The text of that line.
        module: The path of the module that made the node, ``layer1.0.conv1``.
        twin: The name of the node whose work this one does a second time, for other readers.
        grid: What the codes of a quantized tensor stand for (`narrows.ir.integer.grid.Grid`).
        weight_grid: What the codes of an integer weight stand for, and which there are
            (`narrows.ir.integer.grid.WeightGrid`); of its ``get_attr`` node.
        table: The table that a quantization plan has for the node's function.
    """

    __slots__ = ("_meta",)

    shape: Any = _Key("shape")
    dtype: Any = _Key("dtype")
    dynamic: Any = _Key("dynamic", ())
    channels: Any = _Key("channels")
    size: Any = _Key("size")
    source: Any = _Key("source", "")
    code: Any = _Key("code", "")
    module: Any = _Key("module", "")
    twin: Any = _Key("twin", "")
    grid: Any = _Key("grid")
    weight_grid: Any = _Key("weight_grid")
    table: Any = _Key("table")

    def __init__(self, node: fx.Node) -> None:
        self._meta = node.meta


def shape_of(node: fx.Node) -> Any:
    """Return the shape of a node's tensor, ``None`` for a node that is not one.

    `Meta` says it, too; this makes no object for what passes read most.
    """
    return node.meta.get("shape")


def where(node: fx.Node) -> str:
    """Return the node's name and, where known, the user's source line and its text."""
    meta = Meta(node)
    text = node.name
    if meta.source:
        text += f" ({meta.source}{'  ' + meta.code if meta.code else ''})"
    return text


def op_name(node: fx.Node) -> str:
    """Return the operator's name as ATen spells it: ``conv2d.default``, ``getitem``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target._opname}.{target._overloadname}"
    return getattr(target, "__name__", str(target))


def copy_meta(source: fx.Node, target: fx.Node) -> None:
    """Give ``target`` the provenance of ``source`` (not its shape or dtype)."""
    for key in ("source", "code", "module", "dynamic", "twin"):
        if key in source.meta:
            target.meta[key] = source.meta[key]
