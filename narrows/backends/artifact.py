"""`Artifact`: a lowered program that runs, on its own, without torch.

``artifact.run(*inputs)`` takes what the model took and returns what it returned, as numpy arrays.
`load` reads what ``artifact.save`` wrote. Only numpy and the target's runtime are needed.
"""

from __future__ import annotations

import importlib
import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from narrows.backends.report import describe
from narrows.backends.store import read_manifest, verify_files, write_folder
from narrows.backends.structure import Structure
from narrows.errors import ArtifactError

BATCH = "b"  # how a manifest writes the free axis

# Target -> "module:function" that opens a folder; see `Session`.
SESSIONS: dict[str, str] = {
    "c": "narrows.backends.c.session:open_session",
    "onnx": "narrows.backends.onnx.session:open_session",
    "torch": "narrows.backends.torch.session:open_session",
    "tvm": "narrows.backends.tvm.session:open_session",
}


class Session(Protocol):
    """A loaded model of some target."""

    def run(self, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return the output arrays for input arrays by name."""
        ...


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that goes in or comes out.

    Attributes:
        name: Its name in the model file.
        shape: Per axis the size; ``"b"`` for the batch, another string for what depends on it.
        dtype: The numpy name, ``float32``.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{','.join(map(str, self.shape))}]"

    def check(self, value: Any, batch: int | None) -> tuple[np.ndarray, int | None]:
        """Return ``value`` as an array, and the batch size; `ArtifactError` if it does not fit."""
        array = _to_array(value, self.name)
        if array.dtype.name != self.dtype:
            raise ArtifactError(
                f"input {self.name} takes {self.dtype}, got {array.dtype.name}",
                hint=f"convert it: {self.name}.astype({self.dtype!r})",
            )
        fits = len(array.shape) == len(self.shape)
        for got, wanted in zip(array.shape, self.shape, strict=False):
            if wanted == BATCH:
                batch = got if batch is None else batch
                wanted = batch
            fits = fits and got == wanted
        if not fits:
            shape = ",".join(map(str, self.shape))
            raise ArtifactError(
                f"input {self.name} has shape {list(array.shape)}, the model takes [{shape}]",
                why=f"b is {batch} in this call"
                if BATCH in self.shape and batch is not None
                else "",
            )
        return np.ascontiguousarray(array), batch


class Artifact:
    """A lowered program: files of one target and a manifest that tells what they are.

    Attributes:
        manifest: What is known of the artifact, as JSON data; to be read, not changed.
        folder: Where its files lie.
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.manifest = manifest
        self._sessions: dict[tuple[int | None, bool], Session] = {}
        structure = manifest["structure"]
        try:
            args, kwargs = Structure.from_json(structure["inputs"]).children
            self._args, self._kwargs = args, kwargs
            self._result = Structure.from_json(structure["outputs"])
            self._input_leaves: list[dict[str, Any]] = structure["input_leaves"]
            self._output_leaves: list[dict[str, Any]] = structure["output_leaves"]
            self._inputs = tuple(map(_read_spec, manifest["inputs"]))
            self._outputs = tuple(map(_read_spec, manifest["outputs"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"the manifest of {self.folder} is malformed",
                why=f"{type(error).__name__}: {error}",
            ) from error

    @classmethod
    def owning(cls, folder: Path, manifest: dict[str, Any]) -> Artifact:
        """Return an artifact that was not saved yet; its folder is deleted when it goes."""
        artifact = cls(folder, manifest)
        weakref.finalize(artifact, shutil.rmtree, folder, ignore_errors=True)
        return artifact

    # ------------------------------------------------------------------ reading

    @property
    def name(self) -> str:
        """The program's name."""
        return self.manifest["name"]

    @property
    def target(self) -> str:
        """The target's name."""
        return self.manifest["target"]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that go in, in the order of the flat inputs."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that come out of the model file."""
        return self._outputs

    @property
    def plan(self) -> Any:
        """The channel plan as JSON data, or ``None``."""
        return self.manifest.get("plan")

    @property
    def fidelity(self) -> dict[str, Any]:
        """How far the artifact was from the program when it was made; empty if unchecked."""
        return self.manifest["fidelity"]

    @property
    def notes(self) -> list[dict[str, Any]]:
        """What the capture, the passes and the target had to say."""
        return self.manifest["notes"]

    @property
    def size(self) -> int:
        """The bytes of the model's files, without the manifest."""
        return sum(file["size"] for file in self.manifest["files"].values())

    @property
    def report(self) -> str:
        """A text for a person: what goes in and out, how it was checked, what was kept and why."""
        return describe(self.manifest)

    def __repr__(self) -> str:
        takes = ", ".join(map(str, self.inputs))
        gives = ", ".join(map(str, self.outputs))
        return f"Artifact({self.name}: {self.target}, {takes} -> {gives}, {self.size:,} bytes)"

    # ------------------------------------------------------------------ running

    @property
    def session(self) -> Session:
        """The loaded model, with the runtime's own choice of threads; made on first use."""
        return self.open()

    def open(self, threads: int | None = None, *, optimize: bool = True) -> Session:
        """Return the loaded model; made once per choice.

        Args:
            threads: How many threads run one operator; ``None`` leaves it to the runtime.
            optimize: Whether the runtime may rewrite the graph; without, it runs as written.
        """
        key = threads, optimize
        if key not in self._sessions:
            opener = _opener(self.target)
            self._sessions[key] = opener(self.folder, self.manifest, threads, optimize)
        return self._sessions[key]

    def run(self, *inputs: Any, threads: int | None = None, **kwargs: Any) -> Any:
        """Run the model on inputs structured like the example's.

        Args:
            *inputs: Numpy arrays or torch tensors, nested as the model takes them.
            threads: As for `open`.
            **kwargs: The inputs that the model takes by name.

        Returns:
            Numpy arrays, nested as the model returns them.

        Raises:
            ArtifactError: An input is missing, or has another shape or dtype than the model takes.
        """
        leaves = self._args.flatten(inputs, "the inputs")
        leaves += self._kwargs.flatten(kwargs, "the inputs by name")
        return self._result.unflatten(iter(self.run_flat(leaves, threads=threads)))

    def run_flat(
        self, leaves: Sequence[Any], *, threads: int | None = None, optimize: bool = True
    ) -> list[Any]:
        """Run on flat inputs and return the flat outputs, as `run` does."""
        arrays = self.arrays(leaves)
        return self.gather(arrays, self.open(threads, optimize=optimize).run(arrays))

    def arrays(self, leaves: Sequence[Any]) -> dict[str, np.ndarray]:
        """Return flat inputs as the arrays that a session takes; `ArtifactError` if they do not
        fit."""
        arrays: dict[str, np.ndarray] = {}
        batch: int | None = None
        for leaf, value in zip(self._input_leaves, leaves, strict=True):
            if "tensor" not in leaf:
                _check_constant(leaf["value"], value)
                continue
            spec = self.inputs[leaf["tensor"]]
            arrays[spec.name], batch = spec.check(value, batch)
        return arrays

    def gather(self, arrays: Mapping[str, np.ndarray], results: Sequence[np.ndarray]) -> list[Any]:
        """Return the flat outputs: results of the model, inputs passed through, and constants."""
        gathered: list[Any] = []
        for leaf in self._output_leaves:
            if "tensor" in leaf:
                result = results[leaf["tensor"]]
                gathered.append(result.item() if leaf.get("number") else result)
            elif "input" in leaf:
                gathered.append(arrays[self.inputs[leaf["input"]].name])
            else:
                gathered.append(leaf["value"])
        return gathered

    # ------------------------------------------------------------------ keeping

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the artifact to a folder, all of it or nothing, and return the folder.

        An artifact that stands there is replaced.

        Raises:
            ArtifactError: The folder cannot be written, or holds what narrows did not write.
        """
        target = Path(folder)
        write_folder(target, self.folder, self.manifest)
        return target


def load(folder: str | os.PathLike[str]) -> Artifact:
    """Return the artifact that `Artifact.save` wrote; every file's hash is verified.

    Raises:
        ArtifactError: There is no artifact, or a file is missing or not the one that was saved.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    verify_files(path, manifest)
    return Artifact(path, manifest)


def _opener(target: str) -> Any:
    if target not in SESSIONS:
        raise ArtifactError(
            f"cannot run an artifact of the target {target!r}",
            why=f"this narrows runs: {', '.join(SESSIONS)}",
        )
    module, _, function = SESSIONS[target].partition(":")
    return getattr(importlib.import_module(module), function)


def _read_spec(data: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(str(data["name"]), tuple(data["shape"]), str(data["dtype"]))


def _to_array(value: Any, name: str) -> np.ndarray:
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    detach = getattr(value, "detach", None)  # a torch tensor, without importing torch
    if detach is None:
        kind = type(value).__name__
        raise ArtifactError(f"input {name} must be a numpy array or a torch tensor, got a {kind}")
    try:
        return detach().cpu().numpy()
    except TypeError as error:
        raise ArtifactError(f"input {name} has no numpy form", why=str(error)) from error


def _check_constant(expected: Any, value: Any) -> None:
    if type(value) is type(expected) and value == expected:
        return
    raise ArtifactError(
        f"an input that is not a tensor must be {expected!r}, got {value!r}",
        why="its value was built into the model when it was captured",
    )
