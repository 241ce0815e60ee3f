"""Convolutions over channels-last tensors, of any number of spatial axes, and matrix products.

Weights come packed: ``[O / lanes, *kernel, I, lanes]``, so that the inner loop reads whole vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te, tirx

from narrows.backends.tvm.kernels import CONTRACTION, DEPTHWISE, PADDING, ROLE


@dataclass(frozen=True)
class Window:
    """How a kernel slides over the spatial axes; one entry an axis.

    Attributes:
        kernel: Its sizes.
        stride: Steps between results.
        before: Zeros before the operand; ``after``: behind it.
        dilation: Steps between the kernel's elements.
        stuffing: Steps between the operand's elements: zeros stand between them (1 for none).
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    dilation: tuple[int, ...]
    stuffing: tuple[int, ...]

    def outputs(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return the result's spatial sizes for the operand's."""
        zipped = zip(
            sizes, self.kernel, self.stride, self.before, self.after, self.dilation,
            self.stuffing, strict=True,
        )  # fmt: skip
        return tuple(
            ((size - 1) * u + 1 + b + a - d * (k - 1) - 1) // s + 1
            for size, k, s, b, a, d, u in zipped
        )

    @property
    def pads(self) -> bool:
        """Whether the operand has to be copied into zeros."""
        return any(self.before) or any(self.after) or any(u > 1 for u in self.stuffing)


def padded(x: Any, window: Window, zero: int = 0) -> Any:
    """Return ``[N, *spatial, C]`` with the window's zeros around and between.

    Args:
        x: The operand.
        window: Where the zeros are.
        zero: What stands for zero: the zero point of codes.
    """
    if not window.pads:
        return x
    sizes = [int(s) for s in x.shape[1:-1]]
    full = [
        (s - 1) * u + 1 + b + a
        for s, u, b, a in zip(sizes, window.stuffing, window.before, window.after, strict=True)
    ]
    fill = tirx.const(zero, x.dtype)

    def at(n: Any, *index: Any) -> Any:
        *place, c = index
        tests, source = [], []
        for i, size, u, b, a in zip(
            place, sizes, window.stuffing, window.before, window.after, strict=True
        ):
            if b or u > 1:
                tests.append(i >= b)
            if a or u > 1:
                tests.append(i < b + (size - 1) * u + 1)
            if u > 1:
                tests.append(tirx.floormod(i - b, u) == 0)
            source.append(tirx.floordiv(i - b, u) if u > 1 else i - b)
        value = x[(n, *source, c)]
        return tirx.if_then_else(tirx.all(*tests), value, fill) if tests else value

    shape = (x.shape[0], *full, x.shape[-1])
    return te.compute(shape, at, name="padding", attrs={ROLE: PADDING})


def convolution(window: Window, groups: int) -> Callable[[Any, Any], Any]:
    """Return the kernel ``[N, *spatial, C], [O / v, *kernel, I, v] -> [N, *out, O]``.

    Args:
        window: How it slides.
        groups: Vectors of output channels ``O / v / groups`` to a group read the ``I`` channels of
            theirs.
    """

    def compute(x: Any, weight: Any) -> Any:
        source = padded(x, window)
        blocks, *_, inner, lanes = (int(s) for s in weight.shape)
        axes = [te.reduce_axis((0, k), name=f"k{i}") for i, k in enumerate(window.kernel)]
        channel = te.reduce_axis((0, inner), name="ki")
        share = blocks // groups

        def at(n: Any, *index: Any) -> Any:
            *place, o = index
            spots = [
                i * s + k * d
                for i, s, k, d in zip(place, window.stride, axes, window.dilation, strict=True)
            ]
            block = tirx.floordiv(o, lanes)
            read = channel + tirx.floordiv(block, share) * inner if groups > 1 else channel
            factor = weight[(block, *axes, channel, tirx.floormod(o, lanes))]
            return te.sum(source[(n, *spots, read)] * factor, axis=[*axes, channel])

        sizes = window.outputs([int(s) for s in x.shape[1:-1]])
        shape = (x.shape[0], *sizes, blocks * lanes)
        return te.compute(shape, at, name="contraction", attrs={ROLE: CONTRACTION})

    return compute


def depthwise(window: Window) -> Callable[[Any, Any], Any]:
    """Return the kernel ``[N, *spatial, C], [*kernel, C] -> [N, *out, C]``."""

    def compute(x: Any, weight: Any) -> Any:
        source = padded(x, window)
        axes = [te.reduce_axis((0, k), name=f"k{i}") for i, k in enumerate(window.kernel)]

        def at(n: Any, *index: Any) -> Any:
            *place, c = index
            spots = [
                i * s + k * d
                for i, s, k, d in zip(place, window.stride, axes, window.dilation, strict=True)
            ]
            return te.sum(source[(n, *spots, c)] * weight[(*axes, c)], axis=axes)

        sizes = window.outputs([int(s) for s in x.shape[1:-1]])
        shape = (x.shape[0], *sizes, weight.shape[-1])
        return te.compute(shape, at, name="depthwise", attrs={ROLE: DEPTHWISE})

    return compute


def linear(x: Any, weight: Any) -> Any:
    """Compute ``[..., I], [O / v, I, v] -> [..., O]``."""
    blocks, inner, lanes = (int(s) for s in weight.shape)
    k = te.reduce_axis((0, inner), name="k")

    def at(*index: Any) -> Any:
        *lead, o = index
        factor = weight[tirx.floordiv(o, lanes), k, tirx.floormod(o, lanes)]
        return te.sum(x[(*lead, k)] * factor, axis=k)

    shape = (*x.shape[:-1], blocks * lanes)
    return te.compute(shape, at, name="contraction", attrs={ROLE: CONTRACTION})


def product(inner: int) -> Callable[[Any, Any], Any]:
    """Return the kernel ``[B, M, K'], [B or 1, K, N] -> [B, M, N]``, with K' >= K = ``inner``."""

    def compute(a: Any, b: Any) -> Any:
        k = te.reduce_axis((0, inner), name="k")
        alone = int(b.shape[0]) == 1

        def at(i: Any, m: Any, n: Any) -> Any:
            return te.sum(a[i, m, k] * b[0 if alone else i, k, n], axis=k)

        shape = (a.shape[0], a.shape[1], b.shape[2])
        return te.compute(shape, at, name="contraction", attrs={ROLE: CONTRACTION})

    return compute


def pack(weight: np.ndarray, lanes: int) -> np.ndarray:
    """Return ``[O, I, *kernel]`` as ``[O / lanes, *kernel, I, lanes]``, filled up with zeros."""
    outputs = weight.shape[0]
    missing = -outputs % lanes
    more = [(0, missing)] + [(0, 0)] * (weight.ndim - 1)
    filled = np.pad(weight, more).reshape(-1, lanes, *weight.shape[1:])
    axes = (0, *range(3, filled.ndim), 2, 1)
    return np.ascontiguousarray(filled.transpose(axes))


def merge_groups(weight: np.ndarray, groups: int, lanes: int) -> tuple[np.ndarray, int, int]:
    """Return a grouped weight with groups merged until each fills whole vectors.

    Args:
        weight: ``[O, I, *kernel]``, with ``I`` input channels to a group.
        groups: How many groups there are.
        lanes: Output channels to a vector.

    Returns:
        The weight ``[O', I', *kernel]``, in which a merged group holds those of its parts in
        blocks on the diagonal; the number of groups; the input channels that it reads in all, at
        least as many as before.
    """
    outputs, inner = weight.shape[0] // groups, weight.shape[1]
    merged = lanes // int(np.gcd(outputs, lanes))
    missing = -groups % merged
    total = groups + missing
    kernel = weight.shape[2:]
    parts = np.zeros((total, outputs, inner, *kernel), weight.dtype)
    parts[:groups] = weight.reshape(groups, outputs, inner, *kernel)
    parts = parts.reshape(total // merged, merged, outputs, inner, *kernel)
    wide = np.zeros((total // merged, merged, outputs, merged, inner, *kernel), weight.dtype)
    for i in range(merged):
        wide[:, i, :, i] = parts[:, i]
    result = wide.reshape(total * outputs, merged * inner, *kernel)
    return result, total // merged, total * inner
