"""The instructions that multiply codes and int8 weights by fours, and add them to int32 numbers.

Each is registered with TVM as two intrinsics. *broadcast*: four codes against four weights of each
lane. *lanes*: four codes and four weights of each lane, packed into an int32 each.

Where an instruction is missing (AVX2, and AVX-512 without VNNI), it is put together from products
of 16-bit numbers: what x86 has for bytes alone, ``vpmaddubsw``, saturates at 2^15, which two
products can pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T  # pyright: ignore[reportMissingModuleSource]

from narrows.backends.tvm.kernels.dots import by_bytes, product

PREFIX = "narrows."


@dataclass(frozen=True)
class Dot:
    """A dot product of bytes.

    Attributes:
        feature: What LLVM calls the part of the processor that has it.
        lanes: How many int32 numbers it adds to.
        add: Takes the numbers, codes and weights, the latter as vectors of bytes, and returns the
            sum.
        offset: What has to be subtracted from the codes: 128 where it takes signed ones.
        packed: Whether kernels may use *lanes*.
    """

    feature: str
    lanes: int
    add: Callable[[Any, Any, Any], Any]
    offset: int = 0
    packed: bool = True


def _call(name: str, lanes: int, *operands: Any) -> Any:
    return T.call_llvm_pure_intrin(
        T.llvm_lookup_intrinsic_id(name), *operands, dtype=f"int32x{lanes}"
    )


def _instruction(name: str, lanes: int) -> Callable[[Any, Any, Any], Any]:
    """Return the sum by one instruction."""
    return lambda total, codes, factors: _call(name, lanes, total, codes, factors)


def _by_words(name: str, lanes: int) -> Callable[[Any, Any, Any], Any]:
    """Return the sum by two products of 16-bit numbers, which are added in pairs."""

    def add(total: Any, codes: Any, factors: Any) -> Any:
        words = f"int16x{2 * lanes}"
        eight = tirx.Broadcast(tirx.const(8, "int16"), 2 * lanes)
        low_byte = tirx.Broadcast(tirx.const(255, "int16"), 2 * lanes)
        codes, factors = tirx.reinterpret(words, codes), tirx.reinterpret(words, factors)
        even = tirx.bitwise_and(codes, low_byte)
        odd = tirx.bitwise_and(tirx.shift_right(codes, eight), low_byte)
        first = tirx.shift_right(tirx.shift_left(factors, eight), eight)
        second = tirx.shift_right(factors, eight)
        return total + _call(name, lanes, even, first) + _call(name, lanes, odd, second)

    return add


def _signed(name: str, lanes: int) -> Callable[[Any, Any, Any], Any]:
    """Return the sum by an instruction that takes signed codes."""

    def add(total: Any, codes: Any, factors: Any) -> Any:
        flip = tirx.Broadcast(tirx.const(128, "uint8"), 4 * lanes)
        codes = tirx.reinterpret(f"int8x{4 * lanes}", tirx.bitwise_xor(codes, flip))
        return _call(name, lanes, total, codes, factors)

    return add


# By name, the first that a processor has is taken.
DOTS: dict[str, Dot] = {
    "avx512vnni": Dot("avx512vnni", 16, _instruction("llvm.x86.avx512.vpdpbusd.512", 16)),
    "avx512bw": Dot(
        "avx512bw", 16, _by_words("llvm.x86.avx512.pmaddw.d.512", 16), packed=False
    ),
    "avxvnni": Dot("avxvnni", 8, _instruction("llvm.x86.avx512.vpdpbusd.256", 8)),
    "avx2": Dot("avx2", 8, _by_words("llvm.x86.avx2.pmadd.wd", 8), packed=False),
    "i8mm": Dot("i8mm", 4, _instruction("llvm.aarch64.neon.usdot.v4i32.v16i8", 4)),
    "dotprod": Dot(
        "dotprod", 4, _signed("llvm.aarch64.neon.sdot.v4i32.v16i8", 4), 128, packed=False
    ),
}  # fmt: skip


def broadcast(name: str) -> str:
    """Return the name under which TVM knows the intrinsic *broadcast* of a dot product."""
    return f"{PREFIX}{name}.broadcast"


def lanes(name: str) -> str:
    """Return the name under which TVM knows the intrinsic *lanes* of a dot product."""
    return f"{PREFIX}{name}.lanes"


def install() -> None:
    """Register the intrinsics with TVM."""
    for name, dot in DOTS.items():
        TensorIntrin.register(broadcast(name), *_broadcast(dot), override=True)
        TensorIntrin.register(lanes(name), *_lanes(dot), override=True)


def _broadcast(dot: Dot) -> tuple[tirx.PrimFunc, tirx.PrimFunc]:
    """Return what the intrinsic computes, and how."""
    v, offset, add = dot.lanes, dot.offset, dot.add
    quads, number, numbers = f"uint8x{4 * v}", "int32", f"int32x{v}"

    @T.prim_func(s_tir=True)
    def meaning(a: T.handle, b: T.handle, c: T.handle) -> None:  # pyright: ignore
        A = T.match_buffer(a, (4,), "uint8", offset_factor=1)  # noqa: N806
        B = T.match_buffer(b, (v, 4), "int8", offset_factor=1)  # noqa: N806
        C = T.match_buffer(c, (v,), "int32", offset_factor=1, scope="local")  # noqa: N806
        with T.sblock("root"):
            T.reads(C[0:v], A[0:4], B[0:v, 0:4])
            T.writes(C[0:v])
            for i in T.serial(0, v):
                for k in T.serial(0, 4):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + product(A[vk], B[vi, vk], offset)

    @T.prim_func(s_tir=True)
    def code(a: T.handle, b: T.handle, c: T.handle) -> None:  # pyright: ignore
        A = T.match_buffer(a, (4,), "uint8", offset_factor=1)  # noqa: N806
        B = T.match_buffer(b, (v, 4), "int8", offset_factor=1)  # noqa: N806
        C = T.match_buffer(c, (v,), "int32", offset_factor=1, scope="local")  # noqa: N806
        with T.sblock("root"):
            T.reads(C[0:v], A[0:4], B[0:v, 0:4])
            T.writes(C[0:v])
            C[T.ramp(T.int32(0), 1, v)] = add(
                C.vload([0], dtype=numbers),
                T.reinterpret(
                    T.broadcast(T.reinterpret(A.vload([0], "uint8x4"), dtype=number), v),
                    dtype=quads,
                ),
                B.vload([0, 0], dtype=f"int8x{4 * v}"),
            )

    return meaning, code


def _lanes(dot: Dot) -> tuple[tirx.PrimFunc, tirx.PrimFunc]:
    """Return what the intrinsic computes, and how."""
    v, add = dot.lanes, dot.add
    numbers = f"int32x{v}"

    @T.prim_func(s_tir=True)
    def meaning(a: T.handle, b: T.handle, c: T.handle) -> None:  # pyright: ignore
        A = T.match_buffer(a, (v,), "int32", offset_factor=1, scope="local")  # noqa: N806
        B = T.match_buffer(b, (v,), "int32", offset_factor=1)  # noqa: N806
        C = T.match_buffer(c, (v,), "int32", offset_factor=1, scope="local")  # noqa: N806
        with T.sblock("root"):
            T.reads(C[0:v], A[0:v], B[0:v])
            T.writes(C[0:v])
            for i in T.serial(0, v):
                with T.sblock("update"):
                    vi = T.axis.remap("S", [i])
                    C[vi] = C[vi] + by_bytes(A[vi], B[vi])

    @T.prim_func(s_tir=True)
    def code(a: T.handle, b: T.handle, c: T.handle) -> None:  # pyright: ignore
        A = T.match_buffer(a, (v,), "int32", offset_factor=1, scope="local")  # noqa: N806
        B = T.match_buffer(b, (v,), "int32", offset_factor=1)  # noqa: N806
        C = T.match_buffer(c, (v,), "int32", offset_factor=1, scope="local")  # noqa: N806
        with T.sblock("root"):
            T.reads(C[0:v], A[0:v], B[0:v])
            T.writes(C[0:v])
            C[T.ramp(T.int32(0), 1, v)] = add(
                C.vload([0], dtype=numbers),
                T.reinterpret(A.vload([0], dtype=numbers), dtype=f"uint8x{4 * v}"),
                T.reinterpret(B.vload([0], dtype=numbers), dtype=f"int8x{4 * v}"),
            )

    return meaning, code
