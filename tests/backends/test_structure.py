"""Nested arguments and results without torch."""

from __future__ import annotations

import json
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree

from narrows.backends.structure import Structure
from narrows.errors import ArtifactError

Pair = namedtuple("Pair", "first second")


@dataclass
class Boxes:
    where: Any
    score: Any = None


torch.export.register_dataclass(Boxes)


def structure_of(value: Any) -> tuple[Structure, list[tuple[str, str]]]:
    notes: list[tuple[str, str]] = []
    return Structure.from_spec(pytree.tree_flatten(value)[1], notes, "outputs"), notes


@pytest.mark.parametrize(
    "value",
    [
        1,
        (),
        (1, 2),
        [1, (2, [3])],
        {"a": 1, "b": {"c": (2,)}},
        {3: 1, "x": [2, None]},
        ((1, [2, {"k": 3}]), {"mask": 4}),
    ],
)
def test_plain_structures_survive_json(value: Any):
    structure, notes = structure_of(value)
    again = Structure.from_json(json.loads(json.dumps(structure.to_json())))
    flat, _ = pytree.tree_flatten(value)
    assert again == structure
    assert again.flatten(value) == flat
    assert again.unflatten(iter(flat)) == value
    assert type(again.unflatten(iter(flat))) is type(value)
    assert notes == []


@pytest.mark.parametrize(
    ("value", "plain", "note"),
    [
        (Pair(1, 2), (1, 2), "Pair runs as a plain tuple"),
        (torch.max(torch.eye(2), 0), None, "max runs as a plain tuple"),
        (OrderedDict(a=1), {"a": 1}, "OrderedDict runs as a plain dict"),
        (defaultdict(int, a=1), {"a": 1}, "defaultdict runs as a plain dict"),
        (Boxes(1, 2), {"where": 1, "score": 2}, "Boxes runs as a dict of its fields"),
        (Boxes(1), {"where": 1}, "Boxes runs as a dict of its fields"),
        ({(1, 2): 3}, [3], "dict runs as a list of its parts"),
    ],
)
def test_what_json_cannot_say_degrades_with_a_note(value: Any, plain: Any, note: str):
    structure, notes = structure_of(value)
    assert notes == [("outputs", note)]
    flat, _ = pytree.tree_flatten(value)
    if plain is not None:
        assert structure.unflatten(iter(flat)) == plain
    else:
        assert type(structure.unflatten(iter(flat))) is tuple


def test_inputs_may_be_the_original_containers():
    structure, _ = structure_of({"p": Pair(1, 2), "b": Boxes(3)})
    assert structure.flatten({"b": Boxes(30), "p": Pair(10, 20)}) == [10, 20, 30]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((1,), r"the input must be a tuple of 2, got 1"),
        (5, r"the input must be a tuple of 2, got a int"),
        ((1, {"k": 3}), r"the input\[1\] must be a dict with the keys \['a', 'b'\], got the keys"),
        ((1, [3]), r"the input\[1\] must be a dict with the keys \['a', 'b'\], got a list"),
        ((1, {"a": 1, "b": 2}), r"the input\[1\]\['b'\] must be a list of 1, got a int"),
    ],
)
def test_another_nesting_is_refused_with_its_place(value: Any, message: str):
    structure, _ = structure_of((1, {"a": 2, "b": [3]}))
    with pytest.raises(ArtifactError, match=message):
        structure.flatten(value)


@pytest.mark.parametrize("data", [None, "x", {"set": []}, {"tuple": 3}, {"tuple": [], "list": []}])
def test_malformed_json_is_refused(data: Any):
    with pytest.raises(ValueError, match="not a structure"):
        Structure.from_json(data)
