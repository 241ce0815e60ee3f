"""Runs the model file of an OpenVINO artifact in OpenVINO, on the CPU; needs no torch."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from narrows.backends.onnx.session import MODEL
from narrows.backends.sessions import Runtime
from narrows.errors import ArtifactError

# Left alone, OpenVINO computes in bfloat16 where a processor can, and rounds the activations of
# layers with compressed weights to 8 bits. An artifact is what its program says.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}

# One request at a time, on the thread that asks for it where one thread is all there is.
LATENCY = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}


class OpenvinoSession:
    """A model file in OpenVINO.

    Attributes:
        compiled: The ``openvino.CompiledModel``.
    """

    def __init__(self, model: Path, threads: int | None = None) -> None:
        try:
            import openvino as found  # pyright: ignore[reportMissingImports]  (it is an extra)
        except ImportError as error:
            raise ArtifactError(
                "an openvino artifact runs in OpenVINO, which is not installed",
                why=str(error),
                hint="pip install openvino",
            ) from error

        config: dict[str, Any] = {**EXACT, **LATENCY}
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        openvino: Any = found  # where it is not installed, its types are not here either
        core = openvino.Core()
        try:
            self.compiled = core.compile_model(core.read_model(str(model)), "CPU", config)
        except Exception as error:  # it raises plain RuntimeErrors, and others for broken files
            why = last_line(error)
            raise ArtifactError(f"OpenVINO cannot load {model.name}", why=why) from error
        self._inputs = {name for end in self.compiled.inputs for name in end.get_names()}
        self._count = len(self.compiled.outputs)
        self._requests = threading.local()  # a request serves one thread

    def run(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the output arrays for input arrays by name."""
        request = getattr(self._requests, "own", None)
        if request is None:
            request = self._requests.own = self.compiled.create_infer_request()
        fed = {name: array for name, array in arrays.items() if name in self._inputs}
        try:
            request.infer(fed, share_inputs=True)
            return [np.array(request.get_output_tensor(i).data) for i in range(self._count)]
        except Exception as error:
            raise ArtifactError("OpenVINO failed", why=last_line(error)) from error


def open_session(
    folder: Path, manifest: Mapping[str, Any], threads: int | None, optimize: bool = True
) -> OpenvinoSession:
    """Return the session of an artifact's folder; OpenVINO has no rewrites to switch off."""
    return OpenvinoSession(folder / MODEL, threads)


RUNTIME = Runtime(open_session, code="")


def last_line(error: Exception) -> str:
    """Return what an error of OpenVINO says, without the places in its source that it begins
    with."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
