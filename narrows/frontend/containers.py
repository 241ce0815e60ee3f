"""Dataclasses among a model's inputs and results, which torch looks into only when told to."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.utils._pytree as pytree


def is_unknown_type(error: Exception) -> bool:
    """Tell whether torch.export met a result that it does not know how to take apart."""
    return "not a known type" in str(error)


def register_dataclasses(value: Any) -> bool:
    """Let torch look into the dataclasses in a value; whether there was one it did not know."""
    found = False
    while kinds := {type(leaf) for leaf in pytree.tree_leaves(value) if _is_dataclass(leaf)}:
        for kind in kinds:
            name = f"{kind.__module__}.{kind.__qualname__}"
            pytree.register_dataclass(kind, serialized_type_name=name)
        found = True
    return found


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)
