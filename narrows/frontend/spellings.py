"""Second names of operators: one spelling of each meaning reaches the op table.

Each rule returns the call in the dialect's spelling, or ``None`` where it is not the same. The
values are the same to the last bit, for every dtype. What looks like a second name and is none:

* ``eq.Scalar`` and the other comparisons, ``remainder``, ``fmod``, ``lerp``, ``where`` and
  ``pow`` with a number: their ``.Tensor`` takes no number, and a constant tensor would promote
  types in another way. ``rsub.Scalar`` is a number less a tensor, and a number comes second.
* ``relu6``, ``hardtanh``, ``selu``, ``celu``, ``stack``: runtimes have kernels, and
  cost tables times, for just these.
* ``dropout`` and its kin, ``rrelu``: they differ where the program is trained on.
* ``squeeze`` of all axes depends on the batch's size, ``split`` and ``chunk`` of an axis of free
  size on that.
* ``flatten`` and ``unflatten`` do not say the sizes of the other axes, as ``reshape`` must.
* ``conv2d.padding`` pads one side more for an even kernel, which no ``padding`` of numbers says.
* ``addmm`` scales its terms and takes the weight as ``[in, out]``; ``linear`` takes ``[out, in]``.
* ``sort.stable`` and ``argsort.stable`` promise an order among equals.
* ``take_along_dim`` broadcasts its index, ``gather`` does not.
* ``glu``, ``addcmul``, ``rot90``, ``channel_shuffle``, ``logsumexp``: several operators in one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from narrows.frontend.lifted import val

aten = torch.ops.aten

# An overload, its arguments and keyword arguments; or None where the rule does not fit.
Call = tuple[Any, tuple[Any, ...], dict[str, Any]] | None
Rule = Callable[..., Call]

TO_THE_END = 2**63 - 1  # as torch spells it: the largest int64


def renamed(target: Any) -> Rule:
    """Return the rule of an operator that takes the same arguments as ``target``."""
    return lambda *args, **kwargs: (target, args, kwargs)


def _with_number(target: Any) -> Rule:
    """Return the rule of an overload for a number where ``target`` takes a tensor or a number."""

    def rule(x: Any, other: Any, alpha: Any = 1) -> Call:
        return target, (x, other), {} if alpha == 1 else {"alpha": alpha}

    return rule


def _turned(order: Callable[..., Sequence[int]]) -> Rule:
    """Return the rule of an operator that puts axes into another order."""

    def rule(x: Any, *args: Any) -> Call:
        return aten.permute.default, (x, list(order(val(x).dim(), *args))), {}

    return rule


def _moved(rank: int, source: Any, destination: Any) -> list[int]:
    """Return the order of axes that ``movedim`` makes."""
    come = [a % rank for a in ([source] if isinstance(source, int) else source)]
    go = [a % rank for a in ([destination] if isinstance(destination, int) else destination)]
    placed = dict(zip(go, come, strict=True))
    rest = iter(a for a in range(rank) if a not in come)
    return [placed[a] if a in placed else next(rest) for a in range(rank)]


def _last_two(rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2]


def _adjoint(x: Any) -> Call:
    return None if val(x).is_complex() else _turned(_last_two)(x)


def _narrow(x: Any, axis: int, start: Any, length: Any) -> Call:
    if start == 0:  # the length may be computed, from the batch's size
        return aten.slice.Tensor, (x, axis, 0, length), {}
    if not isinstance(start, int) or not isinstance(length, int):
        return None
    end = start + length
    return aten.slice.Tensor, (x, axis, start, TO_THE_END if start < 0 and end == 0 else end), {}


def _swapped(rank: int, first: int, second: int) -> list[int]:
    order = list(range(rank))
    if rank:
        order[first], order[second] = order[second], order[first]
    return order


def _tiled(x: Any, times: Sequence[Any]) -> Call:
    return aten.repeat.default, (x, [1] * (val(x).dim() - len(times)) + [*times]), {}


def _parted(lengths: Callable[[int, Any], list[int] | None]) -> Rule:
    """Return the rule of an operator that cuts an axis into parts of these lengths.

    Neither the axis' size nor what says the parts may be computed.
    """

    def rule(x: Any, how: Any, axis: int = 0) -> Call:
        size, given = val(x).shape[axis], how if isinstance(how, list | tuple) else [how]
        known = all(isinstance(n, int) for n in (size, *given))
        parts = lengths(size, how) if known and size else None
        return None if parts is None else (aten.split.sizes, (x, parts, axis), {})

    return rule


def _of_length(size: int, length: int) -> list[int]:
    return [min(length, size - start) for start in range(0, size, length)]


def _even(size: int, count: int) -> list[int]:
    return _of_length(size, -(-size // count))


def _nearly_even(size: int, count: int) -> list[int]:
    return [size // count + (i < size % count) for i in range(count)]


def _between(size: int, indices: Sequence[int]) -> list[int] | None:
    """Return the lengths of the parts that indices separate; ``None`` where parts overlap."""
    ends = [0, *(slice(i).indices(size)[1] for i in indices), size]
    lengths = [end - start for start, end in pairwise(ends)]
    return lengths if min(lengths) >= 0 else None


def _padded(mode: str) -> Rule:
    """Return the rule of padding in one mode, whatever the number of axes."""

    def rule(x: Any, pad: Any, *value: Any) -> Call:
        return aten.pad.default, (x, pad, mode, *value), {}

    return rule


def _resized(packet: Any) -> Rule:
    """Return the rule of resizing that is told a size and a scale per axis.

    The one spelling is told either. Where the sizes are those of the scales, the scales say more:
    where between the elements to read follows from them.
    """
    names = [a.name for a in packet.default._schema.arguments]

    def rule(*args: Any, **kwargs: Any) -> Call:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, sizes = given["self"], given["output_size"]
        flags = [given[n] for n in names if n == "align_corners"]
        scales = [given.get(n) for n in names if n.startswith("scales")]
        if not any(scales):
            return packet.vec, (x, sizes, *flags, None), {}
        axes = zip(val(x).shape[-len(scales) :], scales, sizes, strict=True)
        if not all(isinstance(n, int) and by and int(n * by) == out for n, by, out in axes):
            return None
        return packet.vec, (x, None, *flags, scales), {}

    return rule


def _less(x: Any, other: Any, alpha: Any = 1) -> Call:
    return aten.sub.Tensor, (other, x), {} if alpha == 1 else {"alpha": alpha}


def _rounded(x: Any, other: Any, rounding_mode: str | None = None) -> Call:
    if rounding_mode == "trunc":
        return aten.div.Tensor_mode, (x, other), {"rounding_mode": rounding_mode}
    return aten.div.Tensor if rounding_mode is None else aten.floor_divide.default, (x, other), {}


def _rounded_down(x: Any, other: Any, rounding_mode: str | None = None) -> Call:
    return None if rounding_mode == "trunc" else _rounded(x, other, rounding_mode)


def _at_least(x: Any, low: Any) -> Call:
    return aten.clamp.default, (x, low, None), {}


def _between_tensors(x: Any, low: Any = None, high: Any = None) -> Call:
    return _within(x, low, high) or (aten.clamp.Tensor, (x, low, high), {})


def _within(x: Any, low: Any = None, high: Any = None) -> Call:
    if low is None:
        return aten.minimum.default, (x, high), {}
    return (aten.maximum.default, (x, low), {}) if high is None else None


def _filled(x: Any, mask: Any, value: Any) -> Call:
    """Where a mask is true a value, in the type of ``x``: a choice, if that promotes no type."""
    if isinstance(val(value), Tensor):
        same = val(value).dtype == val(x).dtype
        return (aten.where.self, (mask, value, x), {}) if same else None
    number = val(value)  # a size that is free promotes types as any whole number does
    number = {torch.SymInt: 1, torch.SymFloat: 1.0}.get(type(number), number)
    kept = torch.result_type(torch.empty(1, dtype=val(x).dtype), number) == val(x).dtype
    return (aten.where.ScalarSelf, (mask, value, x), {}) if kept else None


def _real(target: Any) -> Rule:
    """Return the rule of an operator that is ``target`` where numbers are real."""
    return lambda x: None if val(x).is_complex() else (target, (x,), {})


def _converted(
    x: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
    non_blocking: bool = False, copy: bool = False, memory_format: Any = None,
) -> Call:  # fmt: skip
    """The same elements in another type, and perhaps elsewhere; a program knows no other copies."""
    before = val(x)
    if layout not in (None, before.layout) or pin_memory:
        return None
    dtype = before.dtype if dtype is None else dtype
    order = {} if memory_format is None else {"memory_format": memory_format}
    if device is None or torch.device(device) == before.device:
        return aten.to.dtype, (x, dtype), order
    return aten.to.device, (x, device, dtype), order


def _kept_here(
    x: Any, device: Any, dtype: Any, non_blocking: bool = False, copy: bool = False,
    memory_format: Any = None,
) -> Call:  # fmt: skip
    if torch.device(device) != val(x).device:
        return None
    return _converted(x, dtype, memory_format=memory_format)


def _copied(x: Any, memory_format: Any = None) -> Call:
    if memory_format in (None, torch.preserve_format):
        return None  # not alias: what is returned must not share memory with an input
    return aten.contiguous.default, (x,), {"memory_format": memory_format}


def _by_a_vector(x: Any, weight: Any, bias: Any = None) -> Call:
    """A linear layer whose weight is a vector, and that has no bias, is a product."""
    alone = val(weight).dim() == 1 and bias is None
    return (aten.matmul.default, (x, weight), {}) if alone else None


def _normalised(target: Any) -> Rule:
    """Return the rule of the softmax that may be told to compute half precision in float32."""

    def rule(x: Any, axis: int, half_to_float: bool) -> Call:
        return target, (x, axis, torch.float32) if half_to_float else (x, axis), {}

    return rule


def _over_all(target: Any) -> Rule:
    """Return the rule of a statistic of all elements, by one of ``target`` over all axes."""
    return lambda x, **kwargs: (target, (x, list(range(val(x).dim()))), kwargs)


def _size_of(x: Any, order: Any, axes: Any, keepdim: bool = False) -> Call:
    power = 2 if order is None else order
    return aten.linalg_vector_norm.default, (x, power, axes or None, keepdim), {}


def _counted(*args: Any, **kwargs: Any) -> Call:
    start, end = args if len(args) == 2 else (0, *args)
    return aten.arange.start_step, (start, end, 1), kwargs


def _made_of(value: int) -> Rule:
    def rule(sizes: Any, **kwargs: Any) -> Call:
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        return aten.full.default, (sizes, value), {**kwargs, "dtype": dtype}

    return rule


def _moment(target: Any) -> Rule:
    """Return the rule of ``var`` and ``std`` that take away one or nothing of the count."""

    def rule(x: Any, axes: Any, unbiased: bool = True, keepdim: bool = False) -> Call:
        return target, (x, axes), {"correction": int(unbiased), "keepdim": keepdim}

    return rule


RESIZINGS = (
    aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d,
    aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_trilinear3d,
    aten.upsample_bicubic2d, aten._upsample_bilinear2d_aa, aten._upsample_nearest_exact2d,
)  # fmt: skip

SPELLINGS: dict[Any, Rule] = {
    aten.subtract.Tensor: renamed(aten.sub.Tensor),
    aten.multiply.Tensor: renamed(aten.mul.Tensor),
    aten.divide.Tensor: renamed(aten.div.Tensor),
    aten.true_divide.Tensor: renamed(aten.div.Tensor),
    aten.add.Scalar: _with_number(aten.add.Tensor),
    aten.sub.Scalar: _with_number(aten.sub.Tensor),
    aten.subtract.Scalar: _with_number(aten.sub.Tensor),
    aten.mul.Scalar: _with_number(aten.mul.Tensor),
    aten.multiply.Scalar: _with_number(aten.mul.Tensor),
    aten.div.Scalar: _with_number(aten.div.Tensor),
    aten.divide.Scalar: _with_number(aten.div.Tensor),
    aten.true_divide.Scalar: _with_number(aten.div.Tensor),
    aten.absolute.default: renamed(aten.abs.default),
    aten.negative.default: renamed(aten.neg.default),
    aten.positive.default: renamed(aten.alias.default),
    aten.clip.default: renamed(aten.clamp.default),
    aten.clip.Tensor: _between_tensors,
    aten.max.other: renamed(aten.maximum.default),
    aten.min.other: renamed(aten.minimum.default),
    aten.__and__.Tensor: renamed(aten.bitwise_and.Tensor),
    aten.__or__.Tensor: renamed(aten.bitwise_or.Tensor),
    aten.__xor__.Tensor: renamed(aten.bitwise_xor.Tensor),
    aten.concat.default: renamed(aten.cat.default),
    aten.concatenate.default: renamed(aten.cat.default),
    aten.transpose.int: _turned(_swapped),
    aten.swapaxes.default: _turned(_swapped),
    aten.swapdims.default: _turned(_swapped),
    aten.movedim.int: _turned(_moved),
    aten.movedim.intlist: _turned(_moved),
    aten.moveaxis.int: _turned(_moved),
    aten.moveaxis.intlist: _turned(_moved),
    aten.numpy_T.default: _turned(lambda rank: range(rank)[::-1]),
    aten.t.default: _turned(lambda rank: range(rank)[::-1]),
    aten.mT.default: _turned(_last_two),
    aten.adjoint.default: _adjoint,
    aten.narrow.default: _narrow,
    aten.narrow_copy.default: _narrow,
    aten.split_with_sizes.default: renamed(aten.split.sizes),
    aten.split.Tensor: _parted(_of_length),
    aten.chunk.default: _parted(_even),
    aten.tensor_split.sections: _parted(_nearly_even),
    aten.tensor_split.indices: _parted(_between),
    aten.var.dim: _moment(aten.var.correction),
    aten.std.dim: _moment(aten.std.correction),
    aten.rsub.Tensor: _less,
    aten.floor_divide.Scalar: renamed(aten.floor_divide.default),
    aten.div.Scalar_mode: _rounded,
    aten.masked_fill.Scalar: _filled,
    aten.masked_fill.Tensor: _filled,
    aten.clamp_min.default: _at_least,
    aten.clamp_max.default: lambda x, high: (aten.clamp.default, (x, None, high), {}),
    aten.clamp_min.Tensor: renamed(aten.maximum.default),
    aten.clamp_max.Tensor: renamed(aten.minimum.default),
    aten.sgn.default: _real(aten.sign.default),
    aten.square.default: lambda x: (aten.pow.Tensor_Scalar, (x, 2), {}),
    aten.to.dtype_layout: _converted,
    aten._to_copy.default: _converted,
    aten.detach.default: renamed(aten.alias.default),
    aten.lift_fresh_copy.default: renamed(aten.alias.default),
    aten.view.default: renamed(aten.reshape.default),
    aten._unsafe_view.default: renamed(aten.reshape.default),
    aten.tile.default: _tiled,
    aten.constant_pad_nd.default: _padded("constant"),
    **{getattr(aten, f"reflection_pad{n}d").default: _padded("reflect") for n in (1, 2, 3)},
    **{getattr(aten, f"replication_pad{n}d").default: _padded("replicate") for n in (1, 2, 3)},
    **{packet.default: _resized(packet) for packet in RESIZINGS},
    aten._softmax.default: _normalised(aten.softmax.int),
    aten._log_softmax.default: _normalised(aten.log_softmax.int),
    aten.mm.default: renamed(aten.matmul.default),
    aten.bmm.default: renamed(aten.matmul.default),
    aten.mean.default: _over_all(aten.mean.dim),
    aten.sum.default: _over_all(aten.sum.dim_IntList),
    aten.max.default: _over_all(aten.amax.default),
    aten.min.default: _over_all(aten.amin.default),
    aten.norm.ScalarOpt_dim: _size_of,
    aten.arange.default: _counted,
    aten.arange.start: _counted,
    aten.eye.default: lambda n, **kwargs: (aten.eye.m, (n, n), kwargs),
    aten.zeros.default: _made_of(0),
    aten.ones.default: _made_of(1),
    aten.zeros_like.default: lambda x, **kwargs: (aten.full_like.default, (x, 0), kwargs),
    aten.ones_like.default: lambda x, **kwargs: (aten.full_like.default, (x, 1), kwargs),
}

# Second names where the rule fits; what it returns ``None`` for has a row of its own.
PARTLY: dict[Any, Rule] = {
    aten.div.Tensor_mode: _rounded_down,
    aten.clamp.Tensor: _within,
    aten.clone.default: _copied,
    aten.linear.default: _by_a_vector,
    aten.to.device: _kept_here,
}


def respell(node: fx.Node) -> None:
    """Give a node the one spelling of what it computes, in place; it stays the user's line's."""
    if node.op != "call_function":
        return
    rule = SPELLINGS.get(node.target) or PARTLY.get(node.target)
    call = None if rule is None else rule(*node.args, **node.kwargs)
    if call is not None:
        node.target, node.args, node.kwargs = call
