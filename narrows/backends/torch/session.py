"""Runs the ``.pt2`` file of a torch artifact; needs torch, but not the model's code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from narrows.backends.sessions import Runtime
from narrows.errors import ArtifactError

MODEL = "model.pt2"


class TorchSession:
    """A loaded ``.pt2`` file.

    Attributes:
        function: What runs it, called like the model.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], threads: int | None) -> None:
        try:
            import torch
        except ImportError as error:
            raise ArtifactError(
                "a torch artifact runs in torch, which is not installed",
                why=str(error),
                hint="pip install torch",
            ) from error

        self._torch, self._threads, self._manifest = torch, threads, manifest
        self._spec: Any
        try:
            if manifest["options"]["form"] == "aot":
                self.function: Any = torch._inductor.aoti_load_package(str(path))
                self._spec = _spec(self.function.loader.get_call_spec()[0])
            else:
                exported = torch.export.load(path)
                self.function, self._spec = exported.module(), exported.call_spec.in_spec
        except Exception as error:  # what a broken file raises is not documented
            raise ArtifactError(f"torch cannot load {path.name}", why=_line(error)) from error

    def run(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the output arrays for input arrays by name."""
        torch, structure = self._torch, self._manifest["structure"]
        names = [spec["name"] for spec in self._manifest["inputs"]]
        flat = [
            torch.from_numpy(arrays[names[leaf["tensor"]]]) if "tensor" in leaf else leaf["value"]
            for leaf in structure["input_leaves"]
        ]
        args, kwargs = self._spec.unflatten(flat)
        before = torch.get_num_threads()
        try:
            if self._threads is not None:
                torch.set_num_threads(self._threads)
            with torch.no_grad():
                result = self.function(*args, **kwargs)
        except Exception as error:
            raise ArtifactError("torch failed", why=_line(error)) from error
        finally:
            torch.set_num_threads(before)
        found: dict[int, np.ndarray] = {}
        leaves = torch.utils._pytree.tree_leaves(result)
        for leaf, value in zip(structure["output_leaves"], leaves, strict=True):
            if "tensor" in leaf:
                found[leaf["tensor"]] = _array(value)
        return [found[i] for i in sorted(found)]


def open_session(
    folder: Path, manifest: Mapping[str, Any], threads: int | None, optimize: bool = True
) -> TorchSession:
    """Return the session of an artifact's folder; it is optimized already, or not, as it is."""
    return TorchSession(folder / MODEL, manifest, threads)


RUNTIME = Runtime(
    open_session, code="torch unpickles parts of a .pt2 file and evaluates expressions in it"
)


def _spec(text: str) -> Any:
    from torch.utils import _pytree as pytree

    return pytree.treespec_loads(text)


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
