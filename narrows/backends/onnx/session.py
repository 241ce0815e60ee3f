"""Runs the model file of an ONNX artifact in ONNX Runtime; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from narrows.backends.sessions import Runtime
from narrows.errors import ArtifactError

MODEL = "model.onnx"
DATA = "model.onnx.data"

# x86 processors without VNNI multiply uint8 by int8 with `vpmaddubsw`, whose sums of two products
# end at 2**15. Told so, ONNX Runtime takes another kernel there. It does so on some that have VNNI,
# too, where products are exact anyway and the other kernel takes twice as long; so these are not
# told.
EXACT_PRODUCTS = ("session.x64quantprecision", "1")

FOLDER = "session.model_external_initializers_file_folder_path"


def has_vnni() -> bool:
    """Whether the processor multiplies uint8 by int8 exactly, as NumPy found out from itself.

    ``False`` where that cannot be told, which is slower and never wrong.
    """
    core = getattr(np, "_core", None) or np.core  # as NumPy before 2 calls it
    umath = getattr(core, "_multiarray_umath", None)
    return bool(getattr(umath, "__cpu_features__", {}).get("AVX512VNNI", False))


class OnnxSession:
    """A model file in ONNX Runtime, on the CPU.

    Attributes:
        inference: The ``onnxruntime.InferenceSession``.
    """

    def __init__(
        self,
        model: Path | bytes,
        threads: int | None = None,
        optimize: bool = True,
        folder: Path | None = None,
        weights: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Load a model.

        Args:
            model: Its file, or what is in it.
            threads: How many it may use; all unless given.
            optimize: Whether ONNX Runtime rewrites it.
            folder: Where files lie that a model in memory names.
            weights: What a model in memory names and no file holds.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise ArtifactError(
                "an onnx artifact runs in ONNX Runtime, which is not installed",
                why=str(error),
                hint="pip install onnxruntime",
            ) from error

        options = session_options(threads, optimize, folder)
        if weights:
            held = [onnxruntime.OrtValue.ortvalue_from_numpy(w) for w in weights.values()]
            options.add_external_initializers([*weights], held)
        try:
            self.inference = onnxruntime.InferenceSession(
                model if isinstance(model, bytes) else str(model),
                options,
                providers=["CPUExecutionProvider"],
            )
        except Exception as error:  # ONNX Runtime's own classes share no public base
            raise ArtifactError(
                f"ONNX Runtime cannot load {getattr(model, 'name', 'the model')}",
                why=_first_line(error),
            ) from error

    def run(
        self, arrays: Mapping[str, np.ndarray], names: Sequence[str] | None = None
    ) -> list[np.ndarray]:
        """Return the output arrays, or those that are named, for input arrays by name."""
        try:
            return [np.asarray(result) for result in self.inference.run(names, dict(arrays))]
        except Exception as error:
            raise ArtifactError("ONNX Runtime failed", why=_first_line(error)) from error


def session_options(
    threads: int | None = None, optimize: bool = True, folder: Path | None = None
) -> Any:
    """Return the ``SessionOptions`` of every session: quiet, and exact in integers.

    Files that a model in memory names lie in ``folder``.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; they come as exceptions anyway
    if not has_vnni():
        options.add_session_config_entry(*EXACT_PRODUCTS)
    if folder is not None:
        options.add_session_config_entry(FOLDER, str(folder))
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    return options


def open_session(
    folder: Path, manifest: Mapping[str, Any], threads: int | None, optimize: bool = True
) -> OnnxSession:
    """Return the session of an artifact's folder; its ends are those of the manifest."""
    session = OnnxSession(folder / MODEL, threads, optimize)
    ends = (session.inference.get_inputs(), session.inference.get_outputs())
    for side, found in zip(("inputs", "outputs"), ends, strict=True):
        names, wanted = [v.name for v in found], [spec["name"] for spec in manifest[side]]
        if names != wanted:
            raise ArtifactError(
                f"{MODEL} has the {side} {', '.join(names)}",
                where=str(folder),
                why=f"its manifest says {', '.join(wanted)}",
            )
    return session


RUNTIME = Runtime(open_session, code="")


def open_mapped(folder: Path, optimize: bool = True) -> OnnxSession:
    """Return a session that maps the weights from the model file, which nobody may change then."""
    from narrows.backends.onnx.modelfile import outline

    if (folder / DATA).exists():  # there they are mapped anyway
        return OnnxSession(folder / MODEL, optimize=optimize)
    return OnnxSession(outline(folder / MODEL), optimize=optimize, folder=folder)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
