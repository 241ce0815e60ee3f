"""The arithmetic of channel labels, each function against the plainest thing that says the same."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrows.ir.labels import (
    Value,
    channels,
    compact,
    even_out,
    even_sizes,
    free,
    match,
    merge,
    number,
    occurrence,
    opaque,
    runs,
    unknown,
    varying,
)

quick = settings(max_examples=60, deadline=None, derandomize=True)
few_labels = st.lists(st.integers(0, 4), min_size=1, max_size=12)


@st.composite
def tensors(draw: st.DrawFn, high: int, rank: int = 3) -> Tensor:
    """Return a small integer tensor with entries in ``0 .. high``."""
    shape = draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    count = int(np.prod(shape))
    entries = draw(st.lists(st.integers(0, high), min_size=count, max_size=count))
    return torch.tensor(entries).view(shape)


def labelled(tensor: Tensor) -> Value:
    labels, entries = number(tensor)
    return Value(tuple(tensor.shape), labels, len(entries), unknown(len(entries)))


# ------------------------------------------------------------------ values


def test_values_of_each_kind():
    assert free((2, 3)).free
    assert free((2, 3)).axes == ()
    whole = opaque((2, 3))
    assert (whole.count, whole.axes, whole.known().tolist()) == (1, (), [False])
    image = channels((2, 3, 4, 4), 1)
    assert (image.count, image.axes) == (3, (1,))
    assert image.tensor.shape == (1, 3, 1, 1)


# ------------------------------------------------------------------ label tensors


@quick
@given(tensors(1))
def test_compact_keeps_the_labels_and_cuts_what_does_not_vary(tensor: Tensor):
    cut = compact(tensor)
    assert torch.equal(cut.expand(tensor.shape), tensor)
    for axis in range(tensor.dim()):
        constant = bool((tensor == tensor.narrow(axis, 0, 1)).all())
        assert (cut.shape[axis] == 1) == (constant or tensor.shape[axis] == 1)
    assert varying(cut) == tuple(a for a, s in enumerate(cut.shape) if s > 1)


def test_compact_cuts_expanded_axes_without_reading_them():
    labels = torch.arange(3).view(1, 3, 1).expand(10**6, 3, 10**6)  # 3e12 entries
    assert torch.equal(compact(labels), torch.arange(3).view(1, 3, 1))


@quick
@given(tensors(5))
def test_number_is_dense_and_can_be_undone(tensor: Tensor):
    labels, entries = number(tensor)
    assert torch.equal(torch.from_numpy(entries)[labels], tensor)
    assert sorted(set(labels.flatten().tolist())) == list(range(len(entries)))
    assert len(set(entries.tolist())) == len(entries)


@quick
@given(st.lists(tensors(2, rank=2), min_size=1, max_size=3))
def test_merge_tells_apart_what_any_operand_tells_apart(parts: list[Tensor]):
    shape = [3, 3]
    cut = [compact(p.repeat(3, 3)[:3, :3]) for p in parts]
    values = [labelled(c) for c in cut]
    labels, count, sources = merge(values, 2)
    wide = labels.expand(shape)
    for value, source in zip(values, sources, strict=True):
        read = torch.from_numpy(source)[wide]
        assert torch.equal(read, value.tensor.expand(shape))
    together = torch.stack([v.tensor.expand(shape) for v in values]).flatten(1)
    assert count == len(torch.unique(together, dim=1).T)
    assert int(labels.max()) + 1 == count


def test_merge_broadcasts_from_the_right():
    image, gate = channels((2, 3, 4, 4), 1), channels((3, 1, 1), 0)
    labels, count, sources = merge([image, gate, opaque((4, 4))], 4)
    assert count == 3
    assert torch.equal(labels, image.tensor)
    assert [s.tolist() for s in sources] == [[0, 1, 2], [0, 1, 2], [0, 0, 0]]


# ------------------------------------------------------------------ positions


@quick
@given(few_labels)
def test_occurrence_counts_earlier_equals(labels: list[int]):
    expected = [labels[:i].count(label) for i, label in enumerate(labels)]
    assert occurrence(np.array(labels)).tolist() == expected


@quick
@given(few_labels, st.data())
def test_match_finds_every_element_once(labels: list[int], data: st.DataObject):
    chosen = data.draw(st.permutations(range(len(labels))).map(lambda p: p[: len(p) // 2 + 1]))
    old, new = np.array(labels), np.array([labels[i] for i in chosen])
    found = match(old, new)
    assert found is not None
    assert old[found].tolist() == new.tolist()
    assert len(set(found.tolist())) == len(found)


@quick
@given(few_labels)
def test_match_keeps_the_order_inside_a_label(labels: list[int]):
    order = sorted(range(len(labels)), key=lambda i: labels[i])  # stable
    found = match(np.array(labels), np.array([labels[i] for i in order]))
    assert found is not None
    assert found.tolist() == order


@quick
@given(few_labels)
def test_match_refuses_what_is_not_there(labels: list[int]):
    old = np.array(labels)
    assert match(old, np.array([*labels, 5])) is None
    if len(set(labels)) < len(labels):  # one occurrence more than there are
        assert match(old, np.array([*labels, labels[0]])) is None


@quick
@given(st.lists(st.integers(0, 12), min_size=1, max_size=6, unique=True).map(sorted))
def test_runs_are_slices(positions: list[int]):
    span = runs(np.array(positions))
    if span is None:
        assert len({b - a for a, b in pairwise(positions)}) > 1
    else:
        assert list(range(*span)) == positions


def test_runs_go_upwards():
    assert runs(np.array([3])) == (3, 4, 1)
    assert runs(np.array([1, 4, 7])) == (1, 8, 3)
    assert runs(np.array([5, 4, 3])) is None
    assert runs(np.array([2, 2])) is None


# ------------------------------------------------------------------ rectangles


@quick
@given(tensors(1))
def test_even_sizes_are_the_shape_of_what_is_kept(entries: Tensor):
    mask = entries.bool()
    sizes = even_sizes(mask)
    kept = mask.nonzero().tolist()
    if sizes is None:
        return
    assert int(np.prod(sizes)) == len(kept)
    for depth in range(mask.dim()):
        heads: dict[tuple[int, ...], set[int]] = {}
        for place in kept:
            heads.setdefault(tuple(place[:depth]), set()).add(place[depth])
        assert {len(tails) for tails in heads.values()} == {sizes[depth]}


def test_even_sizes_of_ragged_and_empty_masks():
    assert even_sizes(torch.tensor([[True, True], [True, False]])) is None
    assert even_sizes(torch.zeros(2, 2, dtype=torch.bool)) is None
    assert even_sizes(torch.tensor([[True, False, True], [False, False, False]])) == [1, 2]


@quick
@given(tensors(1))
def test_even_out_adds_until_it_is_even(entries: Tensor):
    mask = entries.bool()
    if not bool(mask.any()):
        return
    evened = even_out(mask)
    assert bool((evened | ~mask).all())
    assert even_sizes(evened) is not None
    assert torch.equal(even_out(evened), evened)


@quick
@given(tensors(1, rank=2))
def test_even_out_of_a_table_adds_no_more_than_the_fullest_row_needs(entries: Tensor):
    mask = entries.bool()
    if not bool(mask.any()):
        return
    evened = even_out(mask)
    if even_sizes(mask) is not None:
        assert torch.equal(evened, mask)
    if min(int(mask.any(0).sum()), int(mask.any(1).sum())) > 1:
        rows = evened.sum(1)
        assert set(rows.tolist()) <= {0, int(mask.sum(1).max())}
        assert torch.equal(rows > 0, mask.any(1))
