"""Dumps on the command line: where one is written, what it becomes part of, and how it is found.

``--dump`` alone writes beside the artifact, so that a compile that fails leaves it there, and moves
it into the artifact in the end. So an artifact has its own dump or none, and never another's.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from narrows.backends import store
from narrows.errors import ArtifactError
from narrows.files.folders import Held, claimed
from narrows.ir.dump import Dump

if TYPE_CHECKING:
    from narrows.backends.artifact import Artifact
    from narrows.passes.instruments import Dumper

SUFFIX = ".dump"  # of what is beside an artifact that is not done


def make_dumper(output: Path, asked: str | None, stack: ExitStack) -> Dumper | None:
    """Return what writes a dump, or ``None`` if none was asked for.

    Args:
        output: The artifact's folder.
        asked: The folder that was asked for; empty for the usual place.
        stack: Ends with the command; until then no other command writes to the usual place.
    """
    from narrows.passes.instruments import Dumper

    if asked is None:
        return None
    if asked:
        return Dumper(asked)
    return Dumper(stack.enter_context(claimed(output.with_name(output.name + SUFFIX))))


def save(artifact: Artifact, output: Path, dumper: Dumper | None, asked: str | None) -> Path | None:
    """Save an artifact, with its dump if that is in the usual place; return where the dump is."""
    if dumper is None:
        artifact.save(output)
        return None
    dump = dumper.dump
    dump.seal(artifact.identity)
    if asked:
        artifact.save(output)
        return dump.folder
    artifact.save(output, dump=dump.folder)
    dump.remove()
    return output / store.DUMP


def open_dump(text: str) -> tuple[Dump, Held]:
    """Return the dump of an artifact, or the one in a folder, and what keeps it readable.

    Raises:
        ArtifactError: There is none, it is damaged, or it is not of the artifact beside which it
            lies.
    """
    folder = Path(text)
    if not (folder / store.MANIFEST).is_file():
        dump = Dump.open(folder)
        _refuse_stale(folder, dump)
        return dump, store.hold(folder)
    held = store.hold(folder)
    return held.read(_dump_of), held


def _dump_of(folder: Path) -> Dump:
    manifest = store.read_manifest(folder)
    dump = Dump.open(store.verify_dump(folder, manifest))
    if dump.artifact != store.identity(manifest):
        raise ArtifactError(
            f"the dump in {folder} is of another artifact",
            why=f"it is of {dump.artifact:.12}, this is {store.identity(manifest):.12}",
            hint="compile again with --dump",
        )
    return dump


def _refuse_stale(folder: Path, dump: Dump) -> None:
    """Raise if a dump that lies beside an artifact is of another one; say if it is of none."""
    artifact = folder.with_name(folder.name.removesuffix(SUFFIX))
    if folder.suffix != SUFFIX or not (artifact / store.MANIFEST).is_file():
        return
    known = store.identity(store.hold(artifact).read(store.read_manifest))
    if not dump.artifact:
        print(f"note: {folder} is of a compile that made no artifact", file=sys.stderr)
    elif dump.artifact != known:
        raise ArtifactError(
            f"{folder} is not the dump of {artifact}",
            why=f"it is of {dump.artifact:.12}, the artifact there is {known:.12}",
            hint="compile again with --dump, or move it to a name of its own to read it",
        )
