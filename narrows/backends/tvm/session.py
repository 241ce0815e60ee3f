"""Runs the library of a TVM artifact; needs TVM, but no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from narrows.backends.sessions import Runtime
from narrows.backends.tvm.link import LIBRARY
from narrows.backends.tvm.versions import INSTALL, problem
from narrows.errors import ArtifactError

# TVM reads and writes tensors with instructions that want this alignment, in bytes.
ALIGNMENT = 64


class TvmSession:
    """A loaded library.

    Attributes:
        machine: TVM's virtual machine, which runs the kernels in order.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], threads: int | None) -> None:
        reason = problem()
        if reason:
            raise ArtifactError(
                "a tvm artifact runs in TVM, which is not as it should be",
                why=reason,
                hint=INSTALL,
            )
        if threads is not None:  # read when the first parallel loop runs
            os.environ["TVM_NUM_THREADS"] = str(threads)
        import tvm
        from tvm import relax

        self._tvm, self._threads = tvm, threads
        device = tvm.device(manifest["device"]["runs_on"], 0)
        if not device.exist:
            raise ArtifactError(
                f"the artifact runs on {manifest['device']['runs_on']}, of which there is none"
            )
        try:
            self.machine = relax.VirtualMachine(tvm.runtime.load_module(str(path)), device)
        except Exception as error:  # what a broken library raises is not documented
            raise ArtifactError(f"TVM cannot load {path.name}", why=_line(error)) from error
        self._device = device
        self._names = [spec["name"] for spec in manifest["inputs"]]
        self._count = len(manifest["outputs"])
        results = (*manifest["outputs"], *manifest.get("islands", ()))
        self._shapes = [tuple(spec["shape"]) for spec in results]
        self._held: dict[str, Any] = {}

    def run(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the output arrays for input arrays by name."""
        return self.run_all(arrays)[: self._count]

    def run_all(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the output arrays, and what the floating-point islands of integers gave."""
        self._use_threads()
        try:
            results = self.machine["main"](*(self._tensor(n, arrays[n]) for n in self._names))
            # A tensor without axes comes back with one.
            pairs = zip(results, self._shapes, strict=True)
            return [result.numpy().reshape(shape) for result, shape in pairs]
        except Exception as error:
            raise ArtifactError("TVM failed", why=_line(error)) from error

    def _use_threads(self) -> None:
        """Give the pool, which the process shares, this session's number of threads."""
        if self._threads is not None:
            self._tvm.get_global_func("runtime.config_threadpool")(1, self._threads)

    def _tensor(self, name: str, array: np.ndarray) -> Any:
        on_cpu = self._device.dlpack_device_type() == self._tvm.cpu().dlpack_device_type()
        if on_cpu and array.ctypes.data % ALIGNMENT == 0 and array.flags.writeable:
            return self._tvm.runtime.from_dlpack(array)
        if name not in self._held:
            self._held[name] = self._tvm.runtime.empty(array.shape, str(array.dtype), self._device)
        self._held[name].copyfrom(array)
        return self._held[name]


def open_session(
    folder: Path, manifest: Mapping[str, Any], threads: int | None, optimize: bool = True
) -> TvmSession:
    """Return the session of an artifact's folder; it is optimized already, or not, as it is."""
    path = folder / LIBRARY
    if not path.is_file():
        raise ArtifactError(
            "the artifact holds object files, not a library",
            why=f"there was no linker for {manifest['device']['name']} where it was compiled",
            hint="link its .o files as a shared library on the device",
        )
    if not manifest["device"]["runs_here"] and manifest["device"]["name"] != "cuda":
        raise ArtifactError(
            f"the artifact is for {manifest['device']['name']}, which is not what this is",
            hint="copy the library there, and load it with TVM's runtime",
        )
    return TvmSession(path, manifest, threads)


RUNTIME = Runtime(open_session, code="its library is loaded into the process")


def _line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
