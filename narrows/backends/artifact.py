"""`Artifact`: a lowered program that runs, on its own, without torch.

``artifact.run(*inputs)`` takes what the model took and returns what it returned, as numpy arrays.
`load` reads what ``artifact.save`` wrote. Only numpy and the target's runtime are needed.

An artifact of some targets is code (`narrows.backends.sessions.Runtime`). Nothing of it runs unless
somebody says that whoever made it is trusted; what this process made is.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from narrows.backends.report import describe
from narrows.backends.sessions import Session, runtime_of
from narrows.backends.store import (
    hold,
    identity,
    read_manifest,
    stamps_of,
    verify_files,
    write_folder,
)
from narrows.backends.structure import Structure
from narrows.errors import ArtifactError
from narrows.files.folders import Held, drop, with_room
from narrows.files.writing import STDOUT, as_path

T = TypeVar("T")

BATCH = "b"  # how a manifest writes the free axis

# What this process made, by identity, which covers every byte of it.
_OWN: set[str] = set()


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
        trusted: Whether it may run if it is code.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        manifest: dict[str, Any],
        *,
        held: Held | None = None,
        stamps: tuple[Any, ...] = (),
        trusted: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = manifest
        self.trusted = trusted
        self._held, self._stamps = held, stamps
        self._opening = threading.Lock()
        self._sessions: dict[tuple[int | None, bool], Session] = {}
        reasons = [note.get("reason") for note in manifest["notes"] if isinstance(note, dict)]
        self._of_bfloat16 = "bfloat16" in reasons  # which a model file holds as float32
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
        artifact = cls(folder, manifest, trusted=True)
        weakref.finalize(artifact, drop, folder)
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
    def identity(self) -> str:
        """What tells it from every other artifact: a hash of its manifest, which has its files'."""
        return identity(self.manifest)

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

        Raises:
            ArtifactError: It is code and not trusted, a file was changed since `load`, or the
                runtime cannot load it.
        """
        key = threads, optimize
        with self._opening:
            if key not in self._sessions:
                runtime = runtime_of(self.target)
                self._refuse_untrusted(runtime.code)
                with with_room():
                    self._sessions[key] = self._read(
                        lambda folder: runtime.open(folder, self.manifest, threads, optimize)
                    )
            return self._sessions[key]

    def _refuse_untrusted(self, code: str) -> None:
        """Raise `ArtifactError` if it is code, and nobody said that its maker is trusted."""
        if code and not self.trusted:
            raise ArtifactError(
                f"the artifact at {self.folder} is code, and is not trusted",
                why=f"{code}, with all that you may do",
                hint="narrows.load(path, trust=True), or --trust, if you trust who made it",
            )

    def _read(self, reader: Callable[[Path], T]) -> T:
        """Return what a function reads from its files, wherever they are by now.

        Files that were touched since they were verified are verified again. Those of an artifact
        that was not saved yet lie in a folder of this process alone.
        """
        if self._held is None:
            return reader(self.folder)

        def verified(folder: Path) -> T:
            if stamps_of(folder, self.manifest) != self._stamps:
                verify_files(folder, self.manifest)
            return reader(folder)

        return self._held.read(verified)

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
            if self._of_bfloat16 and str(getattr(value, "dtype", "")) == "torch.bfloat16":
                value = value.float()
            arrays[spec.name], batch = spec.check(value, batch)
        return arrays

    def gather(self, arrays: Mapping[str, np.ndarray], results: Sequence[np.ndarray]) -> list[Any]:
        """Return the flat outputs: results of the model, inputs passed through, and constants."""
        if len(results) != len(self.outputs):
            raise ArtifactError(
                f"the model gives {len(results)} outputs, its manifest says {len(self.outputs)}",
                where=str(self.folder),
            )
        gathered: list[Any] = []
        for leaf in self._output_leaves:
            if "tensor" in leaf:
                gathered.append(_result(results[leaf["tensor"]], leaf.get("number", False)))
            elif "input" in leaf:
                gathered.append(arrays[self.inputs[leaf["input"]].name])
            else:
                gathered.append(leaf["value"])
        return gathered

    def gather_state(self, name: str, full: Any) -> np.ndarray:
        """Return what the artifact takes in place of a whole state of the model.

        Args:
            name: The input's name.
            full: The state with all channels, as the captured model takes and returns it.

        Raises:
            ArtifactError: The input is no state, or the model's has another shape.
        """
        states = self.manifest.get("states", ())
        state = next((s for s in states if s["name"] == name), None)
        if state is None:
            known = ", ".join(s["name"] for s in states) or "none"
            raise ArtifactError(f"the input {name!r} is no state", why=f"the states are: {known}")
        array, axes, whole = _to_array(full, name), state["axes"], state["whole"]
        if array.ndim <= axes[-1] or [array.shape[a] for a in axes] != whole:
            why = f"the model's has the sizes {whole} along the axes {axes}"
            raise ArtifactError(f"the state {name} has shape {list(array.shape)}", why=why)
        if state["kept"] is None:
            return array
        front = range(len(axes))
        rows = np.moveaxis(array, axes, front)
        rest = rows.shape[len(axes) :]
        kept = rows.reshape(-1, *rest)[state["kept"]].reshape(*state["sizes"], *rest)
        return np.ascontiguousarray(np.moveaxis(kept, front, axes))

    # ------------------------------------------------------------------ keeping

    def save(
        self, folder: str | os.PathLike[str], *, dump: str | os.PathLike[str] | None = None
    ) -> Path:
        """Write the artifact to a folder, all of it or nothing, and return the folder.

        An artifact that stands there is replaced, in one step: whoever reads it meanwhile reads the
        older one or the newer, whole.

        Args:
            folder: Where it goes.
            dump: The folder of a dump to keep with it, as ``narrows compile --dump`` does.

        Raises:
            ArtifactError: The folder cannot be written, or holds what narrows did not write; or a
                file of the artifact was changed since `load`.
        """
        target = as_path(folder, "the artifact's folder")
        if str(target) == STDOUT:
            raise ArtifactError("an artifact is a folder, and cannot go to standard output")
        kept = None if dump is None else as_path(dump, "the dump's folder")
        self._read(lambda source: write_folder(target, source, self.manifest, kept))
        if self.trusted:
            _OWN.add(self.identity)
        return target


def load(path: str | os.PathLike[str], *, trust: bool = False) -> Artifact:
    """Return the artifact that `Artifact.save` wrote; every file's hash is verified.

    Nothing of it runs here. The folder is held until the artifact goes: it can be run even if
    another one takes its place meanwhile.

    Args:
        path: The folder.
        trust: Whether it may run if it is code. What this process made may anyway.

    Raises:
        ArtifactError: There is no artifact, or a file is missing or not the one that was saved.
    """
    folder = as_path(path, "the artifact's folder")
    held = hold(folder)
    manifest, stamps = held.read(_read_verified)
    own = identity(manifest) in _OWN
    return Artifact(folder, manifest, held=held, stamps=stamps, trusted=trust or own)


def _read_verified(folder: Path) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Return the manifest, and the stamps of its files from before they were verified."""
    manifest = read_manifest(folder)
    stamps = stamps_of(folder, manifest)
    verify_files(folder, manifest)
    return manifest, stamps


def _result(value: Any, number: bool) -> Any:
    """Return one output of the model, as a plain number where it is one."""
    if not number:
        return value
    if np.size(value) != 1:
        raise ArtifactError(f"an output is {np.shape(value)} where the manifest says a number")
    return value.item()


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
