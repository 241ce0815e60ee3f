"""The commands that make something: compile, demo, plan, check."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrows.cli import grids
from narrows.cli.emitted import parse_target
from narrows.cli.flags import given
from narrows.cli.model import capture_model, named
from narrows.errors import ArtifactError, UsageError
from narrows.files.quoting import plain
from narrows.files.writing import STDOUT
from narrows.options import to_json

if TYPE_CHECKING:
    from narrows.backends.artifact import Artifact
    from narrows.ir.program import Program


def compile_(arguments: argparse.Namespace) -> int:
    """Compile a model and save the artifact."""
    with contextlib.ExitStack() as stack:
        return _compile(arguments, stack)


def _compile(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    from narrows import api
    from narrows.api import contest
    from narrows.api.gains import Size, gains
    from narrows.api.integers import quick
    from narrows.api.lowering import lower_freeing
    from narrows.api.passes import checks_of
    from narrows.cli import dumps
    from narrows.passes.instruments import Progress
    from narrows.passes.pipeline import format_table
    from narrows.passes.plans.options import Choosing
    from narrows.passes.quant.options import Quantization

    output = Path(arguments.output)
    refuse_output(output)
    target = parse_target(arguments.target, arguments)
    settings = grids.settings_of(arguments)
    idle = [*settings, *([] if arguments.report is None else ["report"])]
    if idle and arguments.quantize is None:
        raise UsageError(
            f"{', '.join(idle)} would have no effect",
            why="they are about grids, and the model stays floating-point",
            hint="--quantize images.npy",
        )
    told = report_folder(output, arguments.report)
    choosing = choice(arguments)
    batch = choosing.get("batch")
    if not {"ratio", "latency"} & choosing.keys():  # then it is about reads and widths alone
        choosing.pop("batch", None)
    if choosing and arguments.plan is not None:
        raise UsageError(
            f"--plan {arguments.plan} says what to keep, and other options ask to choose it",
            hint=f"leave out --plan, or {', '.join(choosing)}",
        )
    chooses = Choosing(**choosing)  # what is wrong with them shows before any work is done
    options = {
        "plan": to_json(chooses) if choosing else None,
        "quantize": None if arguments.quantize is None else to_json(Quantization(**settings)),
    }
    program = capture_model(arguments)
    images = None if arguments.quantize is None else Path(arguments.quantize)
    data = None if images is None else grids.batches(images, program)
    choosing = with_data(choosing, program)
    integers = data is not None
    chosen = api.plan_for(program, choosing, target, integers) if choosing else arguments.plan
    watches: list[Any] = [Progress()]
    dumper = dumps.make_dumper(output, arguments.dump, stack)
    watches += [] if dumper is None else [dumper]
    asked = None if data is None else {"options": Quantization(**settings)}
    passes = api.passes_for(program, chosen, target, batch, arguments.pipeline, integers)
    trying = {"asked": False if arguments.no_contest else None, "quantize": quick(asked)}
    watched = [*checks_of(passes, True, arguments.double), *watches]
    ran = contest.run(program, passes, target, watched, **trying)
    result, passes = ran.result, ran.passes
    before, after = Size.of(program, passes), Size.of(result.program, passes)
    made, reports = [result.program], (result.initial, *result.reports)
    held = ran.contest
    del ran, result  # `made` holds the program now, until it is lowered
    found: dict[str, Any] = {}
    quantized = None
    if data is not None:
        quantized = api.quantize(made[0], data, instruments=watches, **settings)
        found = grids.findings(made.pop(), quantized)
        reports = (*reports, *quantized.passes)
        artifact = api.lower(quantized.program, target, plan=chosen)
    else:
        how = {"target": target, "pipeline": passes, "check": False}
        again = functools.partial(api.rewrite, program, **how)
        artifact = lower_freeing(made, lambda: again().program, target, plan=chosen)
    artifact.manifest.update(gains(before, after, artifact, held))
    dump = dumps.save(artifact, output, dumper, arguments.dump)
    if quantized is not None and images is not None and told is not None:
        found |= grids.report(quantized, grids.batches(images, program), told, artifact)
    if arguments.json:
        dumped = {} if dump is None else {"dump": str(dump)}
        passes = [r.to_json() for r in reports]
        print_json(
            {
                **facts_of(artifact, output),
                **times_of(artifact),
                "options": options,
                **found,
                **dumped,
                "passes": passes,
            }
        )
    else:
        print(format_table(reports))
        print(artifact.report)
        if found:
            print(grids.describe(found))
        print(f"\nsaved in {output}" + (f", dump in {dump}" if dump is not None else ""))
    return 0


def times_of(artifact: Artifact) -> dict[str, Any]:
    """Return what a compile came to, and what its contest found, as JSON values."""
    return {k: artifact.manifest[k] for k in ("gain", "contest") if k in artifact.manifest}


def facts_of(artifact: Artifact, output: Path) -> dict[str, Any]:
    """Return what every command that saves an artifact tells of it, as JSON values."""
    return {"artifact": str(output), "bytes": artifact.size, "fidelity": artifact.fidelity}


def report_folder(output: Path, asked: str | None) -> Path | None:
    """Return where a report goes: beside the artifact, or where it is asked for.

    Raise before any work is done if it could not be written.
    """
    if asked is None:
        return None
    folder = Path(asked) if asked else output.with_name(f"{output.name}.report")
    if folder.absolute() == output.absolute():
        raise UsageError(
            "the report cannot go into the artifact's folder",
            why="that holds only what its manifest lists",
            hint="--report alone puts it beside",
        )
    refuse_unwritable(folder)
    return folder


def refuse_output(output: Path) -> None:
    """Raise before any work is done if the artifact could not be saved at the end."""
    from narrows.backends.store import refuse_foreign

    refuse_foreign(output)
    refuse_unwritable(output)


def refuse_unwritable(folder: Path) -> None:
    """Raise if nothing can be written into a folder, or to where it would be made."""
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ArtifactError(f"cannot write {folder}", why=f"{parent} is not a writable folder")


def refuse_missing_folder(path: Path) -> None:
    """Raise before any work is done if a plan could not be written."""
    if str(path) != STDOUT and not path.absolute().parent.is_dir():
        raise UsageError("the plan's folder does not exist", where=str(path))


def plan(arguments: argparse.Namespace) -> int:
    """Choose channels and save the plan."""
    from narrows import api
    from narrows.passes.plans.options import Choosing

    output = Path(arguments.output)
    refuse_missing_folder(output)
    say = teller(arguments, output)
    options = choice(arguments)
    choosing = Choosing(**options)  # what is wrong with them shows before any work is done
    target = None if arguments.target is None else parse_target(arguments.target)
    program = capture_model(arguments)
    where = {n: getattr(arguments, n) for n in ("integers", "executor", "jobs")}
    chosen = api.plan(program, target=target, **where, **with_data(options, program))
    chosen.save(output)
    kept = {"inputs": _widths(chosen.inputs), "outputs": _widths(chosen.outputs)}
    if arguments.json:
        notes = [vars(n) for n in chosen.notes]
        print_json({"plan": str(output), **kept, "options": to_json(choosing), "notes": notes})
    else:
        for side, widths in kept.items():
            for weight, width in widths.items():
                say(plain(f"{weight}  keeps {width} {side}"))
        for note in chosen.notes:
            say(plain(f"note: {note.where}: {note.message}", None))
        if str(output) != STDOUT:
            print(output)
    return 0


def teller(arguments: argparse.Namespace, output: Path | None) -> Callable[[str], None]:
    """Return what prints a line for a person: not between the lines of a file on standard output.

    `UsageError` if JSON is asked for there as well.
    """
    if output is None or str(output) != STDOUT:
        return print
    if arguments.json:
        raise UsageError("--json prints to standard output, and so does a file called -")
    return lambda line: print(line, file=sys.stderr)


def choice(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `narrows.plan` that the command line gives."""
    from narrows.passes.plans.options import Choosing

    options = given(arguments, Choosing)
    if "side" in options:
        options.setdefault("constrained", False)
    return options


def with_data(options: dict[str, Any], program: Program) -> dict[str, Any]:
    """Return the options of `narrows.plan` with what a file and a function's name stand for."""
    found = dict(options)
    if "data" in found:
        found["data"] = grids.batches(Path(found["data"]), program)
    for option, example in (("loss", "losses.py:distance"), ("evaluate", "nets.py:accuracy")):
        if option in found:
            found[option] = named(found[option], "function", example)
    return found


def _widths(keeps: Any) -> dict[str, int]:
    return {weight: len(keep) for weight, keep in keeps.items()}


def check(arguments: argparse.Namespace) -> int:
    """Check an artifact: the hashes of its files, and that it runs and gives what it says.

    One that is code is not run, nor compiled, unless it is trusted.
    """
    from narrows.backends.artifact import load
    from narrows.backends.sessions import runtime_of

    artifact = load(arguments.artifact, trust=arguments.trust)
    why = "" if artifact.trusted else runtime_of(artifact.target).code
    if why:
        findings = [f"its files are whole; it was not run, as it is code ({why}): --trust runs it"]
    else:
        findings = [f for batch in (1, 3) for f in _trial(artifact, batch)]
    if arguments.json:
        facts = {"artifact": arguments.artifact, "identity": artifact.identity}
        print_json({**facts, "findings": findings})
    else:
        for finding in findings:
            print(finding)
        exact = ", bit for bit" if "golden" in artifact.manifest else ""
        verdict = (
            f"{len(findings)} findings" if findings else f"ok: hashes, batches of 1 and 3{exact}"
        )
        print(f"{arguments.artifact}: {verdict}")
    return 1 if findings else 0


def _trial(artifact: Artifact, batch: int) -> list[str]:
    """Run an artifact on made-up inputs and return what is wrong with its outputs."""
    import numpy as np

    from narrows.backends import golden

    arrays = golden.draw(artifact.inputs, batch)
    findings = _golden(artifact, arrays, batch)
    for spec, array in zip(artifact.outputs, artifact.session.run(arrays), strict=True):
        known = [s if isinstance(s, int) or s == "b" else None for s in spec.shape]
        wanted = [batch if s == "b" else s for s in known]
        fits = len(wanted) == array.ndim and all(
            w in (None, s) for w, s in zip(wanted, array.shape, strict=True)
        )
        if not fits or array.dtype.name != spec.dtype:
            got = f"{array.dtype.name}{list(array.shape)}"
            findings.append(f"batch {batch}: {spec} came out as {got}")
        elif array.dtype.kind == "f" and not np.isfinite(array).all():
            findings.append(f"batch {batch}: {spec} is not finite")
    return findings


def _golden(artifact: Artifact, arrays: dict[str, Any], batch: int) -> list[str]:
    """Return where an integer artifact gives other bits than the interpreter did."""
    from narrows.backends import golden

    wanted = artifact.manifest.get("golden", {}).get(str(batch))
    if wanted is None:
        return []
    findings = []
    for optimize in (True, False):
        got = golden.digests(artifact.open(optimize=optimize).run(arrays))
        how = "" if optimize else ", without the runtime's optimizations"
        for spec, mine, other in zip(artifact.outputs, got, wanted, strict=True):
            if mine != other:
                findings.append(f"batch {batch}: {spec.name} has other bits than it should{how}")
    return findings


def demo(arguments: argparse.Namespace) -> int:
    """Run the demo."""
    from narrows import demo as module

    return module.main(arguments)


def print_json(value: Any) -> None:
    """Print one JSON value."""
    print(json.dumps(value, indent=1))
