"""`Structure`: how a call's arguments or its result nest, as plain JSON.

torch keeps the nesting in a pytree spec. An artifact runs without torch, so it keeps its own:
tuples, lists and dicts around leaves. ``"*"`` is a leaf, ``{"tuple": [...]}``, ``{"list": [...]}``
and ``{"dict": [[key, ...], ...]}`` are the rest. A named tuple becomes a tuple, a dataclass a dict.
"""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from narrows.errors import ArtifactError

LEAF = "*"


@dataclass(frozen=True)
class Structure:
    """A leaf, or a container of structures.

    Attributes:
        kind: ``"*"``, ``"tuple"``, ``"list"`` or ``"dict"``.
        children: What is inside, in the order of the leaves.
        keys: The keys of a dict.
    """

    kind: str = LEAF
    children: tuple[Structure, ...] = ()
    keys: tuple[Any, ...] = ()

    # ------------------------------------------------------------------ making

    @staticmethod
    def from_spec(spec: Any, notes: list[tuple[str, str]], where: str) -> Structure:
        """Return the structure of a pytree spec.

        Args:
            spec: The ``torch.utils._pytree.TreeSpec``.
            notes: Gets ``where`` and a sentence for every part that JSON cannot say.
            where: What the structure is of.
        """
        if spec.is_leaf():
            return Structure()
        children = tuple(Structure.from_spec(child, notes, where) for child in spec.children())
        kind, context = spec.type, spec.context
        if kind is namedtuple:
            notes.append((where, f"{context.__name__} runs as a plain tuple"))
            return Structure("tuple", children)
        if kind in (tuple, list):
            return Structure(kind.__name__, children)
        if issubclass(kind, tuple):  # what torch.max and its like return
            notes.append((where, f"{kind.__name__} runs as a plain tuple"))
            return Structure("tuple", children)
        if issubclass(kind, dict):
            keys = _dict_keys(context)
            if all(isinstance(key, str | int) for key in keys):
                if kind is not dict:
                    notes.append((where, f"{kind.__name__} runs as a plain dict"))
                return Structure("dict", children, tuple(keys))
        names = _field_names(kind, context, len(children))
        if names is not None:
            notes.append((where, f"{kind.__name__} runs as a dict of its fields"))
            return Structure("dict", children, names)
        notes.append((where, f"{kind.__name__} runs as a list of its parts"))
        return Structure("list", children)

    @staticmethod
    def from_json(data: Any) -> Structure:
        """Return the structure that `to_json` wrote; `ValueError` for anything else."""
        if data == LEAF:
            return Structure()
        if not isinstance(data, dict) or len(data) != 1:
            raise ValueError(f"not a structure: {data!r:.60}")
        kind, inside = next(iter(data.items()))
        if kind not in ("tuple", "list", "dict") or not isinstance(inside, list):
            raise ValueError(f"not a structure: {data!r:.60}")
        if kind != "dict":
            return Structure(kind, tuple(Structure.from_json(child) for child in inside))
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in inside):
            raise ValueError(f"not pairs of a key and a structure: {inside!r:.60}")
        keys = tuple(key for key, _ in inside)
        if not all(isinstance(key, str | int) for key in keys) or len(set(keys)) != len(keys):
            raise ValueError(f"not the keys of a dict: {keys!r:.60}")
        return Structure(kind, tuple(Structure.from_json(child) for _, child in inside), keys)

    def to_json(self) -> Any:
        """Return the structure as JSON data."""
        if self.kind == LEAF:
            return LEAF
        inside = [child.to_json() for child in self.children]
        if self.kind == "dict":
            return {"dict": [[key, child] for key, child in zip(self.keys, inside, strict=True)]}
        return {self.kind: inside}

    # ------------------------------------------------------------------ using

    def leaves(self, path: str = "") -> Iterator[str]:
        """Yield the path of every leaf: ``x[0]``, ``x['mask']``."""
        if self.kind == LEAF:
            yield path
            return
        for label, child in self._labelled():
            yield from child.leaves(f"{path}[{label!r}]")

    def flatten(self, value: Any, path: str = "the input") -> list[Any]:
        """Return the leaves of ``value``; `ArtifactError` says where it nests in another way."""
        if self.kind == LEAF:
            return [value]
        parts = self._parts(value, path)
        flat: list[Any] = []
        for (label, child), part in zip(self._labelled(), parts, strict=True):
            flat += child.flatten(part, f"{path}[{label!r}]")
        return flat

    def unflatten(self, leaves: Iterator[Any]) -> Any:
        """Return the leaves in their nesting."""
        if self.kind == LEAF:
            return next(leaves)
        values = [child.unflatten(leaves) for child in self.children]
        if self.kind == "dict":
            return dict(zip(self.keys, values, strict=True))
        return tuple(values) if self.kind == "tuple" else values

    def _labelled(self) -> list[tuple[Any, Structure]]:
        labels = self.keys if self.kind == "dict" else range(len(self.children))
        return list(zip(labels, self.children, strict=True))

    def _parts(self, value: Any, path: str) -> list[Any]:
        if self.kind == "dict":
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
                # torch leaves out the fields that are None
                value = {k: v for k, v in fields.items() if k in self.keys or v is not None}
            if not isinstance(value, Mapping) or set(value) != set(self.keys):
                got = f"the keys {list(value)}" if isinstance(value, Mapping) else _kind(value)
                wanted = f"a dict with the keys {list(self.keys)}" if self.keys else "absent"
                raise ArtifactError(f"{path} must be {wanted}, got {got}")
            return [value[key] for key in self.keys]
        count = len(self.children)
        if not isinstance(value, tuple | list) or len(value) != count:
            got = f"{len(value)}" if isinstance(value, tuple | list) else _kind(value)
            raise ArtifactError(f"{path} must be a {self.kind} of {count}, got {got}")
        return list(value)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def _dict_keys(context: Any) -> list[Any]:
    # An OrderedDict's or dict's context is its keys; a defaultdict's is [factory, keys].
    if len(context) == 2 and callable(context[0]) and isinstance(context[1], list):
        return list(context[1])
    return list(context)


def _field_names(kind: type, context: Any, count: int) -> tuple[str, ...] | None:
    """Return the names of a dataclass's children, as far as torch or the class tells them."""
    names = context[0] if isinstance(context, list | tuple) and context else context
    if (
        isinstance(names, list | tuple)
        and len(names) == count
        and all(isinstance(name, str) for name in names)
    ):
        return tuple(names)
    if dataclasses.is_dataclass(kind) and len(dataclasses.fields(kind)) == count:
        return tuple(field.name for field in dataclasses.fields(kind))
    return None
