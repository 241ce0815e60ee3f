"""``einsum`` of one or two tensors as permutations and one ``matmul``.

ATen's own composition of ``einsum`` makes every tensor as wide as the equation has letters. Here a
product with a weight stays a product with that weight.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def einsum(equation: str, tensors: Sequence[Tensor], *, path: Any = None) -> Tensor | None:
    """Return the sum of products that the equation asks for.

    The result is ``None`` for three tensors and more, a diagonal (``bii``), or an axis that is
    broadcast.
    """
    parsed = _parse(equation, [t.dim() for t in tensors])
    if parsed is None:
        return None
    inputs, output = parsed
    if any(len(set(word)) < len(word) for word in (*inputs, output)):
        return None
    if len(tensors) == 1:
        return _single(tensors[0], inputs[0], output)
    return (
        _pair(tensors[0], tensors[1], inputs[0], inputs[1], output) if len(tensors) == 2 else None
    )


def _parse(equation: str, ranks: Sequence[int]) -> tuple[list[str], str] | None:
    """Return the letters of each tensor and of the result; an ellipsis gets letters of its own."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if not arrow:
        once = {c for c in left if c.isalpha() and left.count(c) == 1}
        output = ("..." if "..." in left else "") + "".join(sorted(once))
    spare = [c for c in string.ascii_letters if c not in equation]
    widths = [r - len(w.replace("...", "")) for w, r in zip(inputs, ranks, strict=True)]
    most = max((k for w, k in zip(inputs, widths, strict=True) if "..." in w), default=0)
    if most > len(spare) or any(
        k != 0 for w, k in zip(inputs, widths, strict=True) if "." not in w
    ):
        return None

    def spelled(word: str, width: int) -> str:
        return word.replace("...", "".join(spare[most - width : most]))

    return [spelled(w, k) for w, k in zip(inputs, widths, strict=True)], spelled(output, most)


def _single(x: Tensor, word: str, output: str) -> Tensor:
    return _ordered(*_summed(x, word, output), output)


def _pair(a: Tensor, b: Tensor, left: str, right: str, output: str) -> Tensor | None:
    sizes = dict(zip(left, a.shape, strict=True))
    if any(str(sizes.get(c, s)) != str(s) for c, s in zip(right, b.shape, strict=True)):
        return None
    a, left = _summed(a, left, right + output)
    b, right = _summed(b, right, left + output)
    sizes |= dict(zip(right, b.shape, strict=True))
    batch = "".join(c for c in output if c in left and c in right)
    inner = "".join(c for c in left if c in right and c not in output)
    rows = "".join(c for c in output if c in left and c not in batch)
    columns = "".join(c for c in output if c in right and c not in batch)
    a = _ordered(a, left, batch + rows + inner)
    b = _ordered(b, right, batch + inner + columns)
    a = _merged(a, len(batch) + len(rows), len(inner))
    # Without a batch, matmul takes any number of rows, and leaves them as they are.
    a = _merged(a, len(batch), len(rows)) if batch or not rows else a
    b = _merged(_merged(b, len(batch) + len(inner), len(columns)), len(batch), len(inner))
    product = torch.matmul(a, b)
    if len(columns) != 1:
        product = _split(product, product.dim() - 1, [sizes[c] for c in columns])
    if (batch or not rows) and len(rows) != 1:
        product = _split(product, len(batch), [sizes[c] for c in rows])
    return _ordered(product, batch + rows + columns, output)


def _summed(x: Tensor, word: str, wanted: str) -> tuple[Tensor, str]:
    """Sum over the axes whose letters nobody wants; return the rest and its letters."""
    axes = [i for i, c in enumerate(word) if c not in wanted]
    return (x.sum(axes) if axes else x), "".join(c for c in word if c in wanted)


def _ordered(x: Tensor, have: str, want: str) -> Tensor:
    order = [have.index(c) for c in want]
    return x if all(i < j for i, j in pairwise(order)) else x.permute(order)


def _merged(x: Tensor, start: int, count: int) -> Tensor:
    """Make ``count`` axes from ``start`` on one axis; a new one for none."""
    if count == 1:
        return x
    return x.flatten(start, start + count - 1) if count else x.unsqueeze(start)


def _split(x: Tensor, axis: int, sizes: list[Any]) -> Tensor:
    return x.unflatten(axis, sizes) if sizes else x.squeeze(axis)
