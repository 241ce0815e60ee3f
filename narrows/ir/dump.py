"""A dump folder: a program after every pass, to read, compare and ask why.

::

    out.dump/
      index.json       what ran, in order, with its numbers
      000_capture.txt  the text form; 000_capture.json the same as data
      001_prune-channels.txt ...

Files are written whole, the index last, so a dump that was interrupted is a shorter dump. A folder
that narrows did not make is never written to. What became of the program is an artifact, and the
index carries its identity once there is one.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from narrows.errors import ArtifactError, ArtifactUsageError, UsageError, suggest
from narrows.files.reading import Count, fit, read_json
from narrows.files.writing import as_path, write_text
from narrows.ir.snapshot import Snapshot
from narrows.ir.text import render

INDEX = "index.json"
FORMAT = "narrows-dump"
VERSION = 1
OWN = re.compile(r"\.?\d{3}_.+\.(txt|json)(\..*part)?|\.index\.json\..*part")
LIMIT = 256 << 20  # bytes of a file


class StageFile(msgspec.Struct):
    """What every stage of the index has; the pass's numbers come with it."""

    name: str
    file: Annotated[str, msgspec.Meta(pattern=r"^\d{3}_[^/\\\x00]+\.txt$")] | None


class MemberFile(msgspec.Struct):
    """A weight's axis in a coupling."""

    weight: str
    axis: Count
    role: str


class CouplingFile(msgspec.Struct):
    """A `narrows.ir.couplings.Coupling`."""

    name: str
    width: Count
    barrier: str | None
    nodes: list[str]
    members: list[MemberFile]


class IndexFile(msgspec.Struct):
    """What an index holds, besides its format and version."""

    program: str
    stages: list[dict[str, Any]]
    couplings: list[dict[str, Any]]
    artifact: str = ""


@dataclass
class Dump:
    """A dump folder opened for reading or writing.

    Attributes:
        folder: Where it is.
        program: The program's name.
        stages: One entry per program kept: ``name``, ``file``, ``spelling`` and the pass's numbers.
        couplings: The couplings of the captured program, as JSON values.
        artifact: The identity of the artifact that the program became; empty while there is none.
    """

    folder: Path
    program: str = ""
    stages: list[dict[str, Any]] = field(default_factory=list)
    couplings: list[dict[str, Any]] = field(default_factory=list)
    artifact: str = ""

    # ------------------------------------------------------------------ writing

    @staticmethod
    def create(folder: str | os.PathLike[str]) -> Dump:
        """Return an empty dump in a new folder, or in one that held a dump, which is removed.

        `ArtifactError` if the folder holds anything else, or cannot be written.
        """
        path = as_path(folder, "the dump's folder")
        try:
            if path.exists():
                _clear(path)
            path.mkdir(parents=True, exist_ok=True)
            dump = Dump(path)
            dump._write_index()
        except OSError as cause:
            raise ArtifactError(
                f"cannot write the dump: {cause.strerror}", where=str(path)
            ) from cause
        return dump

    def add(self, name: str, view: Snapshot, **facts: Any) -> None:
        """Write one program.

        Args:
            name: The pass's name.
            view: The program after it.
            facts: The pass's numbers, for the index.
        """
        stem = f"{len(self.stages):03d}_{name}"
        self.program = view.name
        write_text(render(view, weights=True), self.folder / f"{stem}.txt")
        write_text(json.dumps(view.to_json()), self.folder / f"{stem}.json")
        self.stages.append({"name": name, "file": f"{stem}.txt", **facts})
        self._write_index()

    def fail(self, name: str, message: str) -> None:
        """Record that a pass failed, without a program."""
        self.stages.append({"name": name, "file": None, "error": message})
        self._write_index()

    def set_couplings(self, couplings: list[dict[str, Any]]) -> None:
        """Keep the couplings of the captured program."""
        self.couplings = couplings
        self._write_index()

    def seal(self, identity: str) -> None:
        """Keep the identity of the artifact that the program became."""
        self.artifact = identity
        self._write_index()

    def remove(self) -> None:
        """Remove the dump and its folder, as after it became part of an artifact."""
        try:
            _clear(self.folder)
            self.folder.rmdir()
        except OSError as cause:
            raise ArtifactError(
                f"cannot remove the dump: {cause.strerror}", where=str(self.folder)
            ) from cause

    def _write_index(self) -> None:
        data = {
            "format": FORMAT,
            "version": VERSION,
            "program": self.program,
            "stages": self.stages,
            "couplings": self.couplings,
            "artifact": self.artifact,
        }
        write_text(json.dumps(data, indent=1) + "\n", self.folder / INDEX)

    # ------------------------------------------------------------------ reading

    @staticmethod
    def open(folder: str | os.PathLike[str]) -> Dump:
        """Return the dump in ``folder``; `ArtifactError` if there is none or it is damaged."""
        path = as_path(folder, "the dump's folder")
        made = _read_index(path)
        return Dump(path, made.program, made.stages, made.couplings, made.artifact)

    def snapshot(self, stage: str = "") -> Snapshot:
        """Return a program of the dump.

        Args:
            stage: A pass's name, its number, or nothing for the last one.
        """
        entry = self._entry(stage)
        file = self.folder / Path(entry["file"]).with_suffix(".json").name
        try:
            return Snapshot.from_json(read_json(file, LIMIT))
        except (OSError, ValueError) as cause:
            raise ArtifactError(
                f"the dump is damaged: cannot read {file.name}",
                where=str(self.folder),
                why=str(cause),
                hint="compile again with --dump",
            ) from cause

    def _entry(self, stage: str) -> dict[str, Any]:
        kept = [s for s in self.stages if s.get("file")]
        if not kept:
            raise ArtifactError("the dump holds no program yet", where=str(self.folder))
        if not stage:
            return kept[-1]
        if stage.isdigit() and int(stage) < len(kept):
            return kept[int(stage)]
        named = [s for s in kept if s["name"] == stage]
        if named:
            return named[-1]
        names = [s["name"] for s in kept]
        raise UsageError(
            f"the dump has no pass {stage!r}",
            where=str(self.folder),
            why=f"it holds {', '.join(f'{i} {n}' for i, n in enumerate(names))}",
            hint=suggest(stage, names),
        )


def split_stage(text: str) -> tuple[str, str]:
    """Return folder and pass of ``FOLDER@PASS``; the pass may be missing."""
    folder, at, stage = text.rpartition("@")
    if not at or Path(text).exists():
        return text, ""
    return folder, stage


def _read_index(path: Path) -> IndexFile:
    index = path / INDEX
    try:
        data = read_json(index, LIMIT)
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactUsageError(
            "there is no dump here", where=str(path), hint="narrows compile ... --dump writes one"
        ) from None
    except (OSError, ValueError) as cause:
        raise ArtifactError(
            "the dump's index cannot be read", where=str(index), why=str(cause)
        ) from cause
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ArtifactError("this index was not written by narrows", where=str(index))
    if data.get("version") != VERSION:
        raise ArtifactError(
            f"the dump has version {data.get('version')!r:.20}, this narrows reads {VERSION}",
            where=str(index),
            hint="compile again with --dump",
        )
    try:
        made = fit(data, IndexFile)
        fit(made.stages, list[StageFile])
        fit(made.couplings, list[CouplingFile])
    except ValueError as cause:
        raise ArtifactError(
            "the dump's index is incomplete", where=str(index), why=str(cause)
        ) from cause
    return made


def _clear(path: Path) -> None:
    """Remove the files of an older dump; refuse a folder that holds anything else."""
    if not path.is_dir():
        raise ArtifactError("a file is in the way of the dump folder", where=str(path))
    files = list(path.iterdir())
    if not files:
        return
    hint = "name a new or empty folder"
    if not (path / INDEX).is_file():
        raise ArtifactError(
            "the dump folder holds files that narrows did not write", where=str(path), hint=hint
        )
    _read_index(path)
    foreign = sorted(f.name for f in files if f.name != INDEX and not OWN.fullmatch(f.name))
    if foreign:
        raise ArtifactError(
            f"the dump folder holds {foreign[0]}, which narrows did not write",
            where=str(path),
            hint=hint,
        )
    # The index goes last: it is what shows that the folder is ours.
    for file in sorted(files, key=lambda f: f.name == INDEX):
        file.unlink()
