"""`Fold`: a channel that is gone is merged with the one that is most like it; no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from narrows.ir.program import Note, Program
from narrows.ir.structure.layers import layers_of
from narrows.passes.choosing.compensations.base import Task
from narrows.passes.choosing.criteria.chains import folded
from narrows.passes.choosing.families import Family, families_of
from narrows.passes.choosing.repair import held_by


@dataclass(frozen=True)
class Fold:
    """Merge a channel that is gone with the nearest one that is left, from the weights alone.

    The plan says which channels are left; each that is gone belongs to the one with the closest
    filter, so that there is a cluster for each that is left, and what read any of its ``n``
    channels reads that one, ``W'_i = sum_j W_j`` (in the paper clusters are those of k-means).

    Where all that read the channels go without the same ones, its filter becomes the mean of the
    cluster's, whose deviation is repaired: times ``n / sqrt(n + n (n - 1) c)`` with ``c`` the mean
    cosine of two of its filters, at least zero, its mean left where it was (FOLD-AR). Where one
    layer alone goes without them, the channel itself stays as it is, and counts for another one by
    the ratio of the lengths of their filters.
    """

    name: ClassVar[str] = "fold"
    paper: ClassVar[str] = (
        "Wang et al., Forget the Data and Fine-Tuning! Just Fold the Network to Compress, ICLR 2025"
    )
    needs_data: ClassVar[bool] = False

    def made(self, task: Task) -> tuple[Program, list[Note]]:
        """Return the network with channels merged."""
        base, products = task.base, task.reads.products
        weights = dict(task.begun.weights)
        families, notes = families_of(base, task.reads, task.there, together=True)
        families = [f for f in families if not held_by(base, products[f.layer])]
        whole = _whole(task, families)
        for family, merged in zip(families, whole, strict=True):
            product = products[family.layer]
            name, bias = product.layer.weight, product.bias
            matrix = product.matrix(weights[name], weights[bias] if bias else None)
            source = product.matrix(base.weights[name], None)
            family.added(product, matrix, source, shares(family, scaled=not merged))
            weights[name], _ = product.weights(matrix, weights[name])
        done: set[tuple[int, ...]] = set()
        for family, merged in zip(families, whole, strict=True):
            key = tuple(family.makers[0])
            if merged and key not in done:
                done.add(key)
                _center(task, family, weights)
        return base.with_weights(task.left.masked(products, weights)), notes


def nearest(family: Family) -> Tensor:
    """Return per dropped channel which of the kept ones has the closest filter."""
    rows = torch.cat([family.filters, family.constants], 1)
    there = torch.as_tensor(family.there)
    return torch.cdist(rows[~there], rows[there]).argmin(1)


def shares(family: Family, *, scaled: bool) -> Tensor:
    """Return how much of each dropped channel every kept one stands for, ``[gone, kept]``.

    Args:
        family: The channels.
        scaled: Whether by the ratio of the lengths of their filters, or whole.
    """
    there = torch.as_tensor(family.there)
    near, sizes = nearest(family), family.filters.norm(dim=1)
    own = sizes[there][near]
    ratio = torch.where(own > 0, sizes[~there] / own, 0.0) if scaled else torch.ones_like(own)
    made = ratio.new_zeros(len(near), int(there.sum()))
    return made.scatter(1, near[:, None], ratio[:, None])


def repair(filters: Tensor) -> float:
    """Return what the mean of filters ``[n, numbers]`` is scaled by to have their deviation."""
    n = len(filters)
    units = filters / filters.norm(dim=1, keepdim=True).clamp(min=1e-30)
    cosines = units @ units.T
    c = float((cosines.sum() - cosines.diagonal().sum()) / max(n * (n - 1), 1))
    return n / (n + n * (n - 1) * max(c, 0.0)) ** 0.5


def _whole(task: Task, families: Sequence[Family]) -> list[bool]:
    """Return which families are merged where their channels are made."""
    reads, result = task.reads, []
    for family in families:
        tie, channels = reads.tie[family.reads[0]], reads.channel[family.reads]
        state = dict(zip(channels.tolist(), family.there.tolist(), strict=True))
        others = np.flatnonzero(reads.tie == tie)
        agree = all(
            state.get(int(reads.channel[r])) == bool(task.there[r])
            for r in others
            if int(reads.channel[r]) in state
        )
        makers = [m for made in family.makers for m in made]
        bound = any(
            reads.maker_stays[m] or held_by(task.base, reads.products[reads.maker_layer[m]])
            for m in makers
        )
        normed = any(f.settled for f in families if reads.tie[f.reads[0]] == tie)
        result.append(agree and not bound and not normed)
    return result


def _center(task: Task, family: Family, weights: dict[str, Tensor]) -> None:
    """Give what makes the kept channels the mean of their clusters, its deviation repaired."""
    reads = task.reads
    near = nearest(family).numpy()
    kept, gone = np.flatnonzero(family.there), np.flatnonzero(~family.there)
    clusters = {k: np.append(kept[k], gone[near == k]) for k in np.unique(near)}
    for place, maker in enumerate(family.makers[0]):
        product = reads.products[reads.maker_layer[maker]]
        name, bias = product.layer.weight, product.bias
        matrix = product.matrix(weights[name], weights[bias] if bias else None)
        source = product.matrix(task.base.weights[name], task.base.weights[bias] if bias else None)
        matrix, source = matrix.flatten(0, 1), source.flatten(0, 1)
        means = _means(task, product.layer.weight, source[:, -1])
        for members in clusters.values():
            rows = np.stack([reads.rows[family.makers[m][place]] for m in members])
            factor = repair(family.filters[torch.as_tensor(members)])
            for at in rows.T:  # where a channel is several outputs, each by itself
                center, mean = source[at].mean(0), means[at].mean()
                matrix[at[0]] = factor * center
                matrix[at[0], -1] = factor * (center[-1] - mean) + mean
        shape = (product.groups, product.outputs, -1)
        weights[name], constant = product.weights(matrix.reshape(shape), weights[name])
        if bias:
            weights[bias] = constant


def _means(task: Task, weight: str, bias: Tensor) -> Tensor:
    """Return the mean of each output: its norm's shift, or the bias where no norm tells more."""
    (layer, *_) = layers_of(task.program)[weight]
    norm = folded(task.program, layer)
    return bias if norm is None else norm.shift


__all__ = ["Fold", "nearest", "repair", "shares"]
