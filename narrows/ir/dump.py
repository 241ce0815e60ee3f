"""A dump folder: a program after every pass, to read, compare and ask why.

::

    out.dump/
      index.json       what ran, in order, with its numbers
      000_capture.txt  the text form; 000_capture.json the same as data
      001_prune-channels.txt ...

Files are written under another name and renamed, the index last, so a dump that was interrupted is
a shorter dump. A folder that narrows did not make is never written to.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from narrows.errors import ArtifactError, ArtifactUsageError, UsageError, suggest
from narrows.ir.snapshot import Snapshot
from narrows.ir.text import render

INDEX = "index.json"
FORMAT = "narrows-dump"
VERSION = 1
OWN = re.compile(r"\.?\d{3}_.+\.(txt|json)(\.part)?|\.index\.json\.part")


@dataclass
class Dump:
    """A dump folder opened for reading or writing.

    Attributes:
        folder: Where it is.
        program: The program's name.
        stages: One entry per program kept: ``name``, ``file``, ``spelling`` and the pass's numbers.
        couplings: The couplings of the captured program, as JSON values.
    """

    folder: Path
    program: str = ""
    stages: list[dict[str, Any]] = field(default_factory=list)
    couplings: list[dict[str, Any]] = field(default_factory=list)

    # ------------------------------------------------------------------ writing

    @staticmethod
    def create(folder: str | os.PathLike[str]) -> Dump:
        """Return an empty dump in a new folder, or in one that held a dump, which is removed.

        `ArtifactError` if the folder holds anything else, or cannot be written.
        """
        path = Path(folder)
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
        _write(self.folder / f"{stem}.txt", render(view, weights=True))
        _write(self.folder / f"{stem}.json", json.dumps(view.to_json()))
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

    def _write_index(self) -> None:
        data = {
            "format": FORMAT,
            "version": VERSION,
            "program": self.program,
            "stages": self.stages,
            "couplings": self.couplings,
        }
        _write(self.folder / INDEX, json.dumps(data, indent=1) + "\n")

    # ------------------------------------------------------------------ reading

    @staticmethod
    def open(folder: str | os.PathLike[str]) -> Dump:
        """Return the dump in ``folder``, or in ``folder.dump``, where compile puts it.

        `ArtifactError` if there is none or it is damaged.
        """
        path = Path(folder)
        beside = path.with_name(path.name + ".dump") if path.name else path
        if not (path / INDEX).is_file() and (beside / INDEX).is_file():
            path = beside
        data = _read_index(path)
        return Dump(path, data["program"], data["stages"], data["couplings"])

    def snapshot(self, stage: str = "") -> Snapshot:
        """Return a program of the dump.

        Args:
            stage: A pass's name, its number, or nothing for the last one.
        """
        entry = self._entry(stage)
        file = self.folder / Path(entry["file"]).with_suffix(".json").name
        try:
            return Snapshot.from_json(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as cause:
            raise ArtifactError(
                f"the dump is damaged: cannot read {file.name}",
                where=str(self.folder),
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


def _read_index(path: Path) -> dict[str, Any]:
    try:
        data = json.loads((path / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactUsageError(
            "there is no dump here", where=str(path), hint="narrows compile ... --dump writes one"
        ) from None
    except (OSError, ValueError) as cause:
        raise ArtifactError("the dump's index cannot be read", where=str(path / INDEX)) from cause
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ArtifactError("this index was not written by narrows", where=str(path / INDEX))
    if data.get("version") != VERSION:
        raise ArtifactError(
            f"the dump has version {data.get('version')}, this narrows reads {VERSION}",
            where=str(path / INDEX),
            hint="compile again with --dump",
        )
    if not {"program", "stages", "couplings"} <= data.keys():
        raise ArtifactError("the dump's index is incomplete", where=str(path / INDEX))
    return data


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


def _write(path: Path, text: str) -> None:
    """Write a file so that it is either whole or absent."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
