"""Runs a C artifact: compiles it in a temporary folder and calls it in a process of its own.

Needs numpy and a C compiler, neither torch nor the model. Numbers become codes here, as the
caller of the C function has to make them.
"""

from __future__ import annotations

import math
import subprocess
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from narrows.backends.c.compiler import FAST, PLAIN, build, compiles
from narrows.backends.c.runner import MODEL, RUNNER, Operand, runner
from narrows.backends.c.types import CODES
from narrows.backends.sessions import Runtime
from narrows.errors import ArtifactError
from narrows.files.folders import drop, scratch

LIMIT = 600  # seconds that a run may take


class CSession:
    """A compiled model.

    Attributes:
        program: The executable: it reads inputs from stdin and writes outputs to stdout, over and
            over, until there are no more.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], optimize: bool) -> None:
        place = scratch()
        weakref.finalize(self, drop, place)
        self.program = place / "model"
        self._ports = manifest["c"]
        self._inputs, self._outputs = manifest["inputs"], manifest["outputs"]
        takes = _operands(self._inputs, self._ports["inputs"])
        gives = _operands(self._outputs, self._ports["outputs"])
        text = runner(takes, gives, manifest["options"]["prefix"])
        (place / RUNNER).write_text(text, encoding="utf-8")
        flags = FAST if optimize and compiles(FAST, place) else ("-O2",) if optimize else PLAIN
        folder = folder.absolute()
        build([folder / MODEL, place / RUNNER], self.program, (*flags, "-iquote", str(folder)))

    def run(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the output arrays for input arrays by name."""
        return self.run_many([arrays])[0]

    def run_many(self, calls: Sequence[Mapping[str, np.ndarray]]) -> list[list[np.ndarray]]:
        """Return the outputs of several calls, made one after the other in one process."""
        data = b"".join(self._encode(arrays) for arrays in calls)
        try:
            done = subprocess.run([self.program], input=data, capture_output=True, timeout=LIMIT)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ArtifactError("the C model does not run", why=str(error)) from error
        if done.returncode == 1:
            raise ArtifactError("the C model refuses its input", why="an index is out of range")
        if done.returncode:
            told = done.stderr.decode(errors="replace").strip().splitlines()
            why = told[-1] if told else f"it ended with {done.returncode}"
            raise ArtifactError("the C model failed", why=why)
        try:
            return self._decode(done.stdout, len(calls))
        except ValueError as error:
            why = f"it gave {len(done.stdout):,} bytes, and its manifest says otherwise"
            raise ArtifactError("the C model failed", why=why) from error

    def _encode(self, arrays: Mapping[str, np.ndarray]) -> bytes:
        made = []
        for spec, port in zip(self._inputs, self._ports["inputs"], strict=True):
            array = arrays[spec["name"]]
            if spec["dtype"].startswith("float"):
                array = codes_of(array, port["codes"], port["rounding"])
            made.append(np.ascontiguousarray(array.transpose(port["order"])).tobytes())
        return b"".join(made)

    def _decode(self, data: bytes, calls: int) -> list[list[np.ndarray]]:
        results: list[list[np.ndarray]] = []
        at = 0
        for _ in range(calls):
            outputs = []
            for spec, port in zip(self._outputs, self._ports["outputs"], strict=True):
                shape = [spec["shape"][a] for a in port["order"]]
                count = int(np.prod(shape, dtype=np.int64))
                kind = np.dtype(np.uint8 if port["codes"] is None else type_of(port["codes"]))
                array = np.frombuffer(data, kind, count, at).reshape(shape)
                at += array.nbytes
                array = array.transpose(np.argsort(port["order"]))
                if spec["dtype"].startswith("float"):
                    array = numbers_of(array, port["codes"]) * steps_of(port, array.ndim)
                elif spec["dtype"] == "bool":
                    array = array.astype(np.bool_)
                outputs.append(np.array(array, order="C"))  # one without axes keeps none
            results.append(outputs)
        return results


def _operands(specs: Sequence[Mapping[str, Any]], ports: Sequence[Any]) -> list[Operand]:
    made = []
    for spec, port in zip(specs, ports, strict=True):
        code = np.uint8 if port["codes"] is None else type_of(port["codes"])
        ctype = "int64_t" if spec["dtype"] == "int64" else CODES[np.dtype(code).itemsize]
        made.append(Operand(ctype, math.prod(spec["shape"])))
    return made


def codes_of(array: np.ndarray, grid: Sequence[int], rounding: str) -> np.ndarray:
    """Return the codes of numbers, as the interpreter makes them."""
    exponent, zero, low, high = grid
    scaled = array * array.dtype.type(2.0**exponent)
    half = array.dtype.type(0.5)
    rounded = np.rint(scaled) if rounding == "half_even" else np.floor(scaled + half)
    return (rounded.clip(low - zero, high - zero) + zero).astype(type_of(grid))


def type_of(grid: Sequence[int]) -> type[np.generic]:
    """Return the type of codes."""
    _, _, low, high = grid
    return np.uint8 if low >= 0 and high <= 255 else np.int16


def numbers_of(codes: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    """Return the numbers that codes stand for."""
    exponent, zero, *_ = grid
    return (codes.astype(np.float32) - np.float32(zero)) * np.float32(2.0**-exponent)


def steps_of(port: Mapping[str, Any], rank: int) -> np.ndarray:
    """Return what the numbers of a port are multiplied by, where its parts have own exponents."""
    made = np.exp2(-np.asarray(port.get("powers", [0]), np.float32))
    return made.reshape([-1 if a == port.get("axis", 0) else 1 for a in range(rank)])


def open_session(
    folder: Path, manifest: Mapping[str, Any], threads: int | None, optimize: bool = True
) -> CSession:
    """Return the session of an artifact's folder; a model in C has one thread, whatever is asked.

    Without ``optimize`` it is compiled for a machine without vectors.
    """
    return CSession(folder, manifest, optimize)


RUNTIME = Runtime(open_session, code="its C files are compiled here and run")
