"""Small programs that have many operators with integer forms side by side, for every backend."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import fx

import narrows
from narrows.ir.program import Program
from tests.builder import Builder, aten


def images(*shapes: tuple[int, ...]) -> Builder:
    """Return a builder whose inputs are drawn at random."""
    b = Builder(*shapes)
    generator = torch.Generator().manual_seed(0)
    b.examples = tuple(torch.randn(s, generator=generator) for s in shapes)
    return b


STATISTICS = (
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default,
)  # fmt: skip


def averages() -> Program:
    """Poolings over one to three axes, and sums."""
    b = images((2, 6, 11), (2, 4, 5, 6, 7), (2, 3, 5, 7))
    line, volume, _ = b.inputs
    return b.program(
        b.call(aten.avg_pool1d.default, line, [3], [2], [1]),
        b.call(aten.avg_pool1d.default, line, [2], [], [0], True, False),
        b.call(aten.adaptive_avg_pool1d.default, line, [11]),
        b.call(aten.max_pool1d.default, line, [3], [2], [1]),
        b.call(aten.max_pool2d.default, b.inputs[2], [2, 2], [2, 2], [1, 1], [1, 1], True),
        b.call(aten.avg_pool2d.default, b.inputs[2], [3, 2], [3, 2], [1, 1], True),
        b.call(aten.sum.dim_IntList, line, [-1]),
        b.call(aten.sum.dim_IntList, line, [1], True),
        *(b.call(target, line, [0, 1, 2]) for target in STATISTICS),
        b.call(aten.mean.dim, line, [0, 2]),
        b.call(aten.maximum.default, *(b.call(t, line, [0, 1, 2]) for t in STATISTICS[1:3])),
        b.call(aten.avg_pool3d.default, volume, [2, 3, 2], [2, 1, 2], [1, 1, 0], True, False),
        b.call(aten.avg_pool3d.default, volume, [2], [2], [0], False, True, 3),
        b.call(aten.adaptive_avg_pool3d.default, volume, [1, 1, 1]),
        b.call(aten.max_pool3d.default, volume, [2], [2], [1]),
        b.call(aten.stack.default, [volume, b.call(aten.neg.default, volume)], 2),
    )


def resizings() -> Program:
    """Resizing over one to three axes, and adaptive windows that differ in size."""
    b = images((2, 3, 6, 9), (2, 5, 7), (2, 2, 3, 5, 4))
    image, line, volume = b.inputs
    narrow = b.call(aten.relu.default, image)
    return b.program(
        b.call(aten.upsample_bilinear2d.vec, image, None, False, [2.0, 4.0]),
        b.call(aten.upsample_bilinear2d.vec, narrow, None, False, [1.5, 0.7]),
        b.call(aten.upsample_bilinear2d.vec, image, [12, 14], True, None),
        b.call(aten.upsample_bicubic2d.vec, image, [9, 13], False, None),
        b.call(aten._upsample_bilinear2d_aa.vec, image, [4, 5], False, None),
        b.call(aten._upsample_nearest_exact2d.vec, narrow, None, [1.5, 1.5]),
        b.call(aten.upsample_nearest2d.vec, narrow, None, [1.5, 2.1]),
        b.call(aten.upsample_linear1d.vec, line, [10], False, None),
        b.call(aten.upsample_trilinear3d.vec, volume, [6, 7, 9], False, None),
        b.call(aten.adaptive_avg_pool2d.default, image, [4, 5]),
        b.call(aten.adaptive_avg_pool2d.default, narrow, [7, 2]),
        b.call(aten.adaptive_avg_pool1d.default, line, [3]),
        b.call(aten.adaptive_avg_pool3d.default, volume, [2, 2, 3]),
    )


def slopes() -> Program:
    """Slopes of what is negative, one per channel or one."""
    b = images((2, 6, 5, 7), (2, 6))
    image, row = b.inputs
    several = b.weight("several", torch.tensor([0.1, -0.3, 0.0, 1.5, 0.25, 1e-3]))
    one = b.weight("one", torch.tensor([0.2]))
    return b.program(
        b.call(aten.prelu.default, image, several),
        b.call(aten.prelu.default, image, one),
        b.call(aten.prelu.default, b.call(aten.permute.default, image, [0, 1, 3, 2]), several),
        b.call(aten.prelu.default, row, several),
    )


def paddings() -> Program:
    """Kernels of even sizes whose result is as large as the operand: more is padded behind; and
    one of a single element, around whose operand there are zeros."""
    b = images((2, 3, 16), (2, 4, 5, 7))
    line, image = b.inputs
    generator = torch.Generator().manual_seed(1)

    def kernel(name: str, *shape: int) -> fx.Node:
        return b.weight(name, torch.randn(shape, generator=generator))

    inside = b.call(aten.sigmoid.default, image)  # its zero point is 0
    return b.program(
        b.call(aten.conv1d.padding, line, kernel("a", 4, 3, 4), None, [1], "same", [2]),
        b.call(aten.conv1d.padding, line, kernel("b", 4, 3, 2), None, [1], "same"),
        b.call(aten.conv2d.padding, image, kernel("c", 6, 4, 2, 4), None, [1, 1], "same"),
        b.call(aten.conv2d.padding, inside, kernel("d", 4, 1, 3, 2), None, [1], "same", [1, 3], 4),
        b.call(aten.conv2d.default, image, kernel("e", 5, 4, 1, 1), None, [1, 1], [1, 1]),
    )


def functions() -> Program:
    """Functions of one number that end somewhere, or have a pole, met from both sides."""
    b = images((2, 3, 5, 6))
    (x,) = b.inputs
    above = b.call(aten.add.Tensor, b.call(aten.abs.default, x), 0.1)
    unary = ("log", "sqrt", "rsqrt", "log1p", "reciprocal")
    inside = b.call(aten.mul.Tensor, x, 0.2)
    return b.program(
        *(b.call(getattr(aten, name).default, above) for name in unary),
        *(b.call(getattr(aten, name).default, inside) for name in ("acos", "atanh", "erfinv")),
        b.call(aten.logit.default, b.call(aten.sigmoid.default, x)),
        b.call(aten.reciprocal.default, x),
        *(b.call(aten.pow.Tensor_Scalar, x, n) for n in (2, 3, -1)),
        b.call(aten.pow.Tensor_Scalar, above, -0.5),
        b.call(aten.pow.Scalar, 0.5, x),
        b.call(aten.nan_to_num.default, x),
        b.call(aten.floor_divide.default, x, 0.7),
        b.call(aten.remainder.Scalar, x, 0.7),
    )


def borders() -> Program:
    """Padding with numbers, and with elements, over one to three axes."""
    b = images((2, 3, 5, 6), (2, 3, 2, 4, 3))
    image, volume = b.inputs
    line, narrow = b.call(aten.select.int, image, 1, 0), b.call(aten.relu.default, image)
    modes = ("reflect", "replicate", "circular")
    return b.program(
        *(b.call(aten.pad.default, image, [1, 2, 0, 3], m) for m in modes),
        *(b.call(aten.pad.default, line, [2, 1], m) for m in modes),
        *(b.call(aten.pad.default, volume, [1, 1, 0, 2, 1, 0], m) for m in modes),
        b.call(aten.pad.default, line, [0, 2], "reflect"),
        b.call(aten.pad.default, volume, [1, 0, 0, 0, 2, 2], "replicate"),
        b.call(aten.pad.default, image, [1, 1], "constant", 0.3),
        b.call(aten.pad.default, narrow, [1, 1, 0, 2], "constant", 0.5),
        b.call(aten.pad.default, image, [1, -1, 2, 0, 0, 1], "constant", -77.0),
        b.call(aten.pad.default, image, [0, 0, 0, 0, 1, 1], "constant", float("-inf")),
    )


def quotients() -> Program:
    """Quotients of every sign, by zero, by what broadcasts; and norms."""
    b = images((2, 3, 5, 6))
    (x,) = b.inputs
    above, part = b.call(aten.relu.default, x), b.call(aten.slice.Tensor, x, 1, 0, 1)
    total = b.call(aten.sum.dim_IntList, b.call(aten.exp.default, x), [-1], True)
    size = b.call(aten.linalg_vector_norm.default, x, 2, [1], True)
    least = b.call(aten.clamp.default, size, 1e-12)
    return b.program(
        b.call(aten.div.Tensor, x, b.call(aten.add.Tensor, above, 0.01)),
        b.call(aten.div.Tensor, above, x),
        b.call(aten.div.Tensor, part, x),
        b.call(aten.div.Tensor, x, b.weight("w", torch.tensor([2.0, -3.0, 0.5]).reshape(3, 1, 1))),
        b.call(aten.relu.default, b.call(aten.div.Tensor, b.call(aten.exp.default, x), total)),
        b.call(aten.div.Tensor, x, b.call(aten.expand.default, least, [-1, 3, 5, 6])),
        b.call(aten.linalg_vector_norm.default, above, 2, [1, 3]),
        b.call(aten.linalg_vector_norm.default, x),
        *(b.call(aten.linalg_vector_norm.default, x, n, [2]) for n in (1, float("inf"))),
    )


def choices() -> Program:
    """Comparisons of unlike grids and with numbers, what follows from truth values, and choices."""
    b = images((2, 3, 5, 6), (2, 3, 5, 6))
    b.examples = (b.examples[0], b.examples[1] > 0)
    x, told = b.inputs
    y = b.call(aten.mul.Tensor, b.call(aten.tanh.default, x), 5.0)
    z = b.call(aten.mul.Tensor, b.call(aten.relu.default, x), 0.1)
    above = b.call(aten.gt.Tensor, x, y)
    tests = [above, *(b.call(getattr(aten, n).Tensor, z, y) for n in ("le", "eq", "ne", "ge"))]
    tests += [b.call(getattr(aten, n).Scalar, x, 0.3) for n in ("lt", "le", "eq", "ge", "gt")]
    tests += [b.call(aten.ne.Scalar, x, 0.25), b.call(aten.isfinite.default, x)]
    both = b.call(aten.bitwise_and.Tensor, told, b.call(aten.logical_not.default, above))
    row = b.call(aten.any.dim, b.call(aten.logical_xor.default, both, tests[1]), 1, True)
    number = b.call(aten.to.dtype, row, torch.float32)
    chosen = [
        b.call(aten.where.self, both, x, z),
        b.call(aten.relu.default, b.call(aten.where.self, row, x, y)),
        b.call(aten.where.ScalarOther, tests[5], x, 0.7),
        b.call(aten.where.ScalarSelf, told, -9.0, x),
        b.call(aten.where.Scalar, above, 1.0, 2.5),
        b.call(aten.where.ScalarSelf, row, -1.0, x),
        b.call(aten.mul.Tensor, x, told),
        b.call(aten.mul.Tensor, x, tests[5]),
        b.call(aten.where.self, above, x, b.call(aten.full_like.default, x, 0.25)),
        b.call(aten.tril.default, x, 1),
        b.call(aten.mul.Tensor, number, y),
        b.call(aten.maximum.default, x, z),
        b.call(aten.minimum.default, z, b.call(aten.slice.Tensor, x, 1, 0, 1)),
        b.call(aten.maximum.default, x, b.weight("least", torch.tensor(0.2))),
        b.call(aten.clamp.Tensor, x, b.call(aten.neg.default, z), b.call(aten.abs.default, y)),
        b.call(aten.maximum.default, x, b.weight("ends", torch.rand(3, 1, 1))),
    ]
    return b.program(*tests, both, row, number, *chosen)


def norms() -> Program:
    """Normalisations over trailing axes and over groups, of what lies far from zero, too."""
    b = images((2, 6, 5, 8), (2, 3, 300))
    x, rows = b.inputs
    generator = torch.Generator().manual_seed(2)
    six, eight, more = (b.weight(f"w{n}", torch.rand(n, generator=generator)) for n in (6, 8, 300))
    far = b.call(aten.add.Tensor, x, b.weight("far", torch.tensor([200.0, *[0.0] * 7])))
    inside = b.call(aten.sigmoid.default, rows)  # its zero point is 0
    return b.program(
        b.call(
            aten.layer_norm.default,
            far,
            [8],
            eight,
            b.weight("b8", torch.randn(8, generator=generator)),
        ),
        b.call(aten.layer_norm.default, x, [5, 8]),
        b.call(aten.layer_norm.default, rows, [300], more),
        b.call(aten.relu.default, b.call(aten.layer_norm.default, inside, [3, 300])),
        b.call(aten.rms_norm.default, far, [8], eight),
        b.call(aten.rms_norm.default, rows, [300], None, 1e-3),
        b.call(
            aten.group_norm.default,
            far,
            3,
            six,
            b.weight("b6", torch.randn(6, generator=generator)),
        ),
        b.call(aten.instance_norm.default, x, six, None, None, None, True, 0.1, 1e-5, False),
        b.call(aten.layer_norm.default, b.call(aten.permute.default, x, [0, 2, 3, 1]), [6], six),
    )


PROGRAMS: dict[str, Callable[[], Program]] = {
    "averages": averages,
    "resizings": resizings,
    "slopes": slopes,
    "paddings": paddings,
    "functions": functions,
    "borders": borders,
    "quotients": quotients,
    "choices": choices,
    "norms": norms,
}
# Those whose codes may have 16 bits.
WIDE = ("averages", "borders", "quotients", "choices", "norms")


@functools.cache
def integers(name: str, rounding: str = "half_even", bits: int = 8) -> Program:
    """Return one of the programs in integers, none of it left in floating-point."""
    program = PROGRAMS[name]()
    made = narrows.quantize(
        program, [program.examples], activations=bits, rounding=rounding, method="minmax"
    )
    assert made.plan.floats == {}
    return made.program
