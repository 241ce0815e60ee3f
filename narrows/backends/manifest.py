"""The manifest that every artifact has, whatever its target."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from narrows import version
from narrows.backends.store import FORMAT, VERSION
from narrows.backends.structure import Structure

if TYPE_CHECKING:
    from narrows.backends.base import Target
    from narrows.backends.leaves import Leaves
    from narrows.ir.program import Program


def new_manifest(
    target: Target,
    program: Program,
    leaves: Leaves,
    inputs: list[dict[str, Any]],
    outputs: list[dict[str, Any]],
    plan_json: Any,
    packages: Iterable[str],
) -> dict[str, Any]:
    """Return the manifest of a program that is lowered, without files and unchecked.

    Args:
        target: The target, with its options.
        program: The program.
        leaves: What becomes of its flat inputs and outputs.
        inputs: Name, shape and dtype of each tensor that goes in, as JSON data.
        outputs: As ``inputs``, of each that comes out.
        plan_json: The channel plan that made the program, as JSON data.
        packages: The distributions whose versions are noted.
    """
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "narrows": version.VERSION,
        "target": target.name,
        "options": dataclasses.asdict(target),
        "name": program.name,
        "inputs": inputs,
        "outputs": outputs,
        "states": [state.to_json() for state in program.states],
        "structure": {"input_leaves": leaves.inputs, "output_leaves": leaves.outputs},
        "plan": plan_json,
        "passes": list(program.history),
        "versions": _versions(packages),
        "files": {},
        "fidelity": {},
        "notes": [dataclasses.asdict(note) for note in program.notes],
    }
    _add_structure(manifest, program)
    return manifest


def add_note(manifest: dict[str, Any], reason: str, where: str, message: str) -> None:
    """Add what a person should know; see `narrows.ir.program.Note`."""
    from narrows.ir.program import Note

    manifest["notes"].append(dataclasses.asdict(Note(where, reason, message)))


def _add_structure(manifest: dict[str, Any], program: Program) -> None:
    remarks: list[tuple[str, str]] = []
    for key, spec in (("inputs", program.in_spec), ("outputs", program.out_spec)):
        manifest["structure"][key] = Structure.from_spec(spec, remarks, key).to_json()
    for where, message in dict.fromkeys(remarks):
        add_note(manifest, "structure", where, message)


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}
