"""The devices of the ``tvm`` target: what TVM is told, how the result is linked, where it runs."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Machine:
    """What kernels are made for.

    Attributes:
        vector: Bits of a vector register.
        registers: How many vector registers there are.
        gpu: Whether kernels run as grids of threads.
        dot: Which instruction multiplies codes and weights by fours and adds them up, as
            `narrows.backends.tvm.schedules.dots` calls it; empty where there is none.
    """

    vector: int = 128
    registers: int = 16
    gpu: bool = False
    dot: str = ""

    def lanes_of(self, dtype: str) -> int:
        """Return how many numbers one register holds."""
        return max(1, self.vector // (8 * np.dtype(dtype).itemsize))


@dataclass(frozen=True)
class Device:
    """One device of the target.

    Attributes:
        name: The spelling after ``tvm:``.
        summary: What it is, in a few words.
        kind: The kind of TVM's target.
        options: The further keys of TVM's target.
        machine: What kernels are made for; found out on the spot for this CPU.
        linkers: Programs that link for it, the first that is there is taken; without one the
            artifact holds object files.
        source: The suffix of the device code that is written beside the library.
        runs_here: Whether it can be run where it is compiled.
    """

    name: str
    summary: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    machine: Machine = field(default_factory=Machine)
    linkers: tuple[str, ...] = ("g++", "clang++", "c++", "gcc", "clang", "cc")
    source: str = ""
    runs_here: bool = False


_GPU = Machine(vector=32, registers=64, gpu=True)
# What is not said is asked of the GPU, which need not be there.
_CUDA = {"arch": "sm_80", "max_shared_memory_per_block": 49152}
_ARM = {"mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]}
_RISCV = {
    "mtriple": "riscv64-linux-gnu", "mcpu": "generic-rv64", "mabi": "lp64d",
    "mattr": ["+m", "+a", "+f", "+d", "+c"],
}  # fmt: skip

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("llvm", "this CPU, or the one that mcpu names", "llvm", runs_here=True),
        Device(
            "aarch64", "64-bit ARM with NEON, Linux", "llvm", _ARM, Machine(128, 32),
            ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-gcc"),
        ),
        Device(
            "riscv64", "64-bit RISC-V (rv64gc), Linux", "llvm", _RISCV, Machine(128, 32),
            ("riscv64-linux-gnu-g++", "riscv64-linux-gnu-gcc"),
        ),
        Device("cuda", "NVIDIA GPUs", "cuda", _CUDA, _GPU, source="cu"),
        Device("opencl", "OpenCL source and host code", "opencl", {}, _GPU, source="cl"),
        Device("metal", "Metal source and host code", "metal", {}, _GPU, source="metal"),
        Device("webgpu", "WebGPU source and host code", "webgpu", {}, _GPU, source="wgsl"),
    )
}  # fmt: skip


def has_gpu() -> bool:
    """Whether NVIDIA's driver is here and finds a GPU."""
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        found = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    except (OSError, AttributeError):
        return False
    return found and count.value > 0
