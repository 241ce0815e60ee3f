"""Artifacts on disk: a folder with the target's files and ``manifest.json``.

There is the whole artifact or none, and it is replaced in one step (`narrows.files.folders`).
Reading verifies the hash of every file and of the manifest itself. No torch here.

::

    out/
      manifest.json    what is known of the artifact
      model.onnx ...   the target's files
      dump/            the program after every pass, where a dump was asked for
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from narrows.backends.schema import check_manifest
from narrows.errors import ArtifactError, ArtifactUsageError
from narrows.files.folders import Held, replacing
from narrows.files.reading import read_json
from narrows.files.writing import sync, write_text

MANIFEST = "manifest.json"
FORMAT = "narrows-artifact"
VERSION = 1

DUMP = "dump"  # the folder of an artifact's dump, and its key in the manifest

CHUNK = 1 << 20

REMAKE = "compile the model again"


# ---------------------------------------------------------------------- manifest


def describe_files(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return size in bytes and SHA-256 of each file."""
    return {n: {"size": (folder / n).stat().st_size, "sha256": _hash(folder / n)} for n in names}


def encode_manifest(manifest: Mapping[str, Any]) -> str:
    """Return the manifest as text, with a checksum over its content."""
    content = {k: v for k, v in manifest.items() if k != "checksum"}
    return json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n"


def identity(manifest: Mapping[str, Any]) -> str:
    """Return what tells an artifact from all others: a hash of all that is known of it.

    Its dump, which carries the identity, is left out.
    """
    return _checksum({k: v for k, v in manifest.items() if k not in ("checksum", DUMP)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of an artifact's folder; `ArtifactError` if it is none, or not whole."""
    if not folder.is_dir():
        raise ArtifactUsageError(f"there is no artifact at {folder}", why="it is not a folder")
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
    except FileNotFoundError:
        why = f"it has no {MANIFEST}"
        raise ArtifactUsageError(f"{folder} is not an artifact", why=why) from None
    except OSError as error:
        raise ArtifactError(f"cannot read {path}", why=str(error.strerror)) from error
    except ValueError as error:
        raise ArtifactError(f"{path} is corrupt", why=str(error), hint=REMAKE) from None
    _check_manifest(path, manifest)
    return manifest


def verify_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare every file with its hash; `ArtifactError` names the first that is not as it was."""
    _verify(folder, manifest["files"], f"the artifact at {folder}")


def stamps_of(folder: Path, manifest: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what changes with any file of an artifact: which it is, its size, and when it was
    written and touched last; none where one is missing."""
    try:
        found = [(folder / name).stat() for name in manifest["files"]]
    except OSError:
        return ()
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found)


def verify_dump(folder: Path, manifest: Mapping[str, Any]) -> Path:
    """Return the folder of an artifact's dump, every file of which is as it was."""
    if DUMP not in manifest:
        raise ArtifactError(
            f"the artifact at {folder} has no dump", hint="narrows compile ... --dump writes one"
        )
    _verify(folder / DUMP, manifest[DUMP], f"the dump of the artifact at {folder}")
    return folder / DUMP


def _verify(folder: Path, files: Mapping[str, Any], what: str) -> None:
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{what} misses {name}", hint=REMAKE)
        try:
            size = path.stat().st_size
            if size != expected["size"]:
                why = f"it has {size:,} bytes instead of {expected['size']:,}"
                raise ArtifactError(f"{path} is corrupt", why=why, hint=REMAKE)
            if _hash(path) != expected["sha256"]:
                why = f"its SHA-256 is not the one in {MANIFEST}"
                raise ArtifactError(f"{path} is corrupt", why=why, hint=REMAKE)
        except OSError as error:
            raise ArtifactError(f"cannot read {path}", why=str(error.strerror)) from error


def _check_manifest(path: Path, manifest: Any) -> None:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{path.parent} is not an artifact", why=f"its {MANIFEST} is not from narrows"
        )
    version = manifest.get("version")
    if version != VERSION:
        raise ArtifactError(
            f"the artifact at {path.parent} has format version {version!r:.20}",
            why=f"this narrows reads version {VERSION}",
            hint=f"use narrows {manifest.get('narrows', '')!s:.20}, which wrote it, or {REMAKE}",
        )
    content = {k: v for k, v in manifest.items() if k != "checksum"}
    if manifest.get("checksum") != _checksum(content):
        raise ArtifactError(f"{path} is corrupt", why="its checksum differs", hint=REMAKE)
    try:
        check_manifest(manifest)
    except ValueError as error:
        raise ArtifactError(f"{path} is malformed", why=str(error), hint=REMAKE) from error


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def hold(folder: Path) -> Held:
    """Return an artifact's folder, held as it is now; `ArtifactError` if there is none."""
    try:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError
        return Held(folder)
    except (FileNotFoundError, NotADirectoryError):
        why = "it is not a folder"
        raise ArtifactUsageError(f"there is no artifact at {folder}", why=why) from None
    except OSError as error:
        raise ArtifactError(f"cannot read {folder}", why=str(error.strerror)) from error


# ---------------------------------------------------------------------- writing


def write_folder(
    target: Path, source: Path, manifest: Mapping[str, Any], dump: Path | None = None
) -> None:
    """Write an artifact to ``target``: all of it, or nothing.

    An artifact that stands there already is replaced. Whatever ends the writing early, an error or
    Ctrl-C, leaves ``target`` as it was.

    Args:
        target: The folder to make; its parents are made too.
        source: The folder that holds the files that the manifest lists.
        manifest: The manifest.
        dump: A folder with a dump that becomes part of the artifact.

    Raises:
        ArtifactError: ``target`` holds something that narrows did not write, or cannot be written.
    """
    refuse_foreign(target)
    target = Path(os.path.realpath(target))
    manifest, dump = _with_dump(source, manifest, dump)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as fresh:
            for name in manifest["files"]:
                _copy(source / name, fresh / name, target / name)
            if dump is not None:
                manifest = {**manifest, DUMP: _copy_dump(dump, fresh / DUMP)}
            write_text(encode_manifest(manifest), fresh / MANIFEST)
            _keep_mode(fresh / MANIFEST, target / MANIFEST)
    except OSError as error:
        why = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        raise ArtifactError(f"cannot write {target}", why=why) from error


def _with_dump(
    source: Path, manifest: Mapping[str, Any], dump: Path | None
) -> tuple[Mapping[str, Any], Path | None]:
    """Return what is written of a dump: the one that is given, else the artifact's own."""
    if dump is None and DUMP in manifest and (source / DUMP).is_dir():
        dump = verify_dump(source, manifest)
    return {k: v for k, v in manifest.items() if k != DUMP}, dump


def _copy(source: Path, fresh: Path, older: Path) -> None:
    shutil.copyfile(source, fresh)
    _keep_mode(fresh, older)
    sync(fresh)


def _keep_mode(fresh: Path, older: Path) -> None:
    """Give a file the mode of the one that it replaces, if there is one."""
    try:
        mode = stat.S_IMODE(older.stat().st_mode)
    except OSError:
        return
    os.chmod(fresh, mode)


def _copy_dump(source: Path, fresh: Path) -> dict[str, dict[str, Any]]:
    """Copy a dump and return its files, as a manifest lists them."""
    names = sorted(path.name for path in source.iterdir() if not path.name.startswith("."))
    fresh.mkdir()
    for name in names:
        shutil.copyfile(source / name, fresh / name)
        sync(fresh / name)
    sync(fresh)
    return describe_files(fresh, names)


def refuse_foreign(folder: Path) -> None:
    """Raise `ArtifactError` unless ``folder`` is missing, empty, or an artifact of narrows."""
    try:
        there = folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ArtifactError(f"cannot write the artifact to {folder}", why=why) from error
    if not stat.S_ISDIR(there.st_mode):
        raise ArtifactError(f"cannot write the artifact to {folder}", why="it is not a folder")
    try:
        hold(folder).read(_refuse_foreign)
    except ArtifactError:
        if folder.exists():
            raise


def _refuse_foreign(folder: Path) -> None:
    try:
        present = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise ArtifactError(f"cannot read {folder}", why=str(error.strerror)) from error
    if not present:
        return
    hint = "name another folder, or empty this one yourself"
    try:
        manifest = read_manifest(folder)
    except ArtifactError as error:
        why = "it is not empty, and narrows did not write it"
        raise ArtifactError(f"will not replace {folder}", why=why, hint=hint) from error
    dump = folder / DUMP
    inside = {p.name for p in dump.iterdir()} if DUMP in manifest and dump.is_dir() else set()
    foreign = present - {MANIFEST, *manifest["files"], *([DUMP] if DUMP in manifest else [])}
    foreign |= {f"{DUMP}/{name}" for name in inside - set(manifest.get(DUMP, ()))}
    if foreign:
        why = f"it holds {min(foreign)!r}, which narrows did not write"
        raise ArtifactError(f"will not replace {folder}", why=why, hint=hint)
