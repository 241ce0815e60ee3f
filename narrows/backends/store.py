"""Artifacts on disk: a folder with the target's files and ``manifest.json``.

A folder is written beside its final place and renamed into it, so there is the whole artifact or
none. Reading verifies the hash of every file and of the manifest itself. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from narrows.errors import ArtifactError, ArtifactUsageError

MANIFEST = "manifest.json"
FORMAT = "narrows-artifact"
VERSION = 1

# What a reader relies on, with the type of each.
KEYS: dict[str, type] = {
    "narrows": str, "target": str, "name": str, "inputs": list, "outputs": list, "structure": dict,
    "passes": list, "versions": dict, "files": dict, "fidelity": dict, "notes": list,
}  # fmt: skip

CHUNK = 1 << 20


# ---------------------------------------------------------------------- manifest


def describe_files(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return size in bytes and SHA-256 of each file."""
    return {n: {"size": (folder / n).stat().st_size, "sha256": _hash(folder / n)} for n in names}


def encode_manifest(manifest: Mapping[str, Any]) -> str:
    """Return the manifest as text, with a checksum over its content."""
    content = {k: v for k, v in manifest.items() if k != "checksum"}
    return json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of an artifact's folder; `ArtifactError` if it is none, or not whole."""
    if not folder.is_dir():
        raise ArtifactUsageError(f"there is no artifact at {folder}", why="it is not a folder")
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        why = f"it has no {MANIFEST}"
        raise ArtifactUsageError(f"{folder} is not an artifact", why=why) from None
    except OSError as error:
        raise ArtifactError(f"cannot read {path}", why=str(error.strerror)) from error
    except ValueError as error:
        raise ArtifactError(
            f"{path} is corrupt", why=f"it is not JSON: {error}", hint=REMAKE
        ) from None
    _check_manifest(path, manifest)
    return manifest


def verify_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare every file with its hash; `ArtifactError` names the first that is not as it was."""
    for name, expected in manifest["files"].items():
        path = folder / name
        if Path(name).name != name or not isinstance(expected, dict):
            raise ArtifactError(
                f"{folder / MANIFEST} is corrupt", why=f"it lists the file {name!r}"
            )
        if not path.is_file():
            raise ArtifactError(f"the artifact at {folder} misses {name}", hint=REMAKE)
        size = path.stat().st_size
        if size != expected.get("size"):
            why = f"it has {size:,} bytes instead of {expected.get('size'):,}"
            raise ArtifactError(f"{path} is corrupt", why=why, hint=REMAKE)
        if _hash(path) != expected.get("sha256"):
            why = f"its SHA-256 is not the one in {MANIFEST}"
            raise ArtifactError(f"{path} is corrupt", why=why, hint=REMAKE)


REMAKE = "compile the model again"


def _check_manifest(path: Path, manifest: Any) -> None:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{path.parent} is not an artifact", why=f"its {MANIFEST} is not from narrows"
        )
    version = manifest.get("version")
    if version != VERSION:
        raise ArtifactError(
            f"the artifact at {path.parent} has format version {version}",
            why=f"this narrows reads version {VERSION}",
            hint=f"use narrows {manifest.get('narrows', '')}, which wrote it, or {REMAKE}",
        )
    content = {k: v for k, v in manifest.items() if k != "checksum"}
    if manifest.get("checksum") != _checksum(content):
        raise ArtifactError(f"{path} is corrupt", why="its checksum differs", hint=REMAKE)
    wrong = [k for k, kind in KEYS.items() if not isinstance(manifest.get(k), kind)]
    if wrong:
        raise ArtifactError(f"{path} is corrupt", why=f"{wrong[0]!r} is missing", hint=REMAKE)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------------- writing


def write_folder(target: Path, source: Path, manifest: Mapping[str, Any]) -> None:
    """Write an artifact to ``target``: all of it, or nothing.

    An artifact that stands there already is replaced. Whatever ends the writing early, an error or
    Ctrl-C, leaves ``target`` as it was.

    Args:
        target: The folder to make; its parents are made too.
        source: The folder that holds the files that the manifest lists.
        manifest: The manifest.

    Raises:
        ArtifactError: ``target`` holds something that narrows did not write, or cannot be written.
    """
    target = target.resolve()
    refuse_foreign(target)
    mark = secrets.token_hex(4)
    fresh = target.with_name(f".{target.name}.{mark}.new")
    old = target.with_name(f".{target.name}.{mark}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        for name in manifest["files"]:
            shutil.copyfile(source / name, fresh / name)
            _sync(fresh / name)
        (fresh / MANIFEST).write_text(encode_manifest(manifest), encoding="utf-8")
        _sync(fresh / MANIFEST)
        _sync(fresh)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        _sync(target.parent)
    except OSError as error:
        why = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        raise ArtifactError(f"cannot write {target}", why=why) from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def refuse_foreign(folder: Path) -> None:
    """Raise `ArtifactError` unless ``folder`` is missing, empty, or an artifact of narrows."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ArtifactError(f"cannot write the artifact to {folder}", why="it is not a folder")
    try:
        present = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise ArtifactError(f"cannot read {folder}", why=str(error.strerror)) from error
    if not present:
        return
    hint = "name another folder, or empty this one yourself"
    try:
        known = {MANIFEST, *read_manifest(folder)["files"]}
    except ArtifactError as error:
        why = "it is not empty, and narrows did not write it"
        raise ArtifactError(f"will not replace {folder}", why=why, hint=hint) from error
    foreign = sorted(present - known)
    if foreign:
        why = f"it holds {foreign[0]!r}, which narrows did not write"
        raise ArtifactError(f"will not replace {folder}", why=why, hint=hint)


def _sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
