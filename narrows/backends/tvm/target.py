"""`TvmTarget`: program -> described -> compiled in a process of its own -> checked in another.

torch and TVM are imported when the target is used, not when it is looked up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.backends.artifact import Artifact
from narrows.backends.base import KINDS, Pair, Target, Variant, Written
from narrows.backends.store import describe_files
from narrows.backends.tvm.devices import DEVICES, Device, has_gpu
from narrows.backends.tvm.link import find_linker
from narrows.backends.tvm.versions import WANTED, problem
from narrows.errors import LowerError, UsageError, suggest
from narrows.files.folders import scratch
from narrows.ir.budget import seconds_of
from narrows.options import option, whole_or_text

if TYPE_CHECKING:
    from narrows.backends.tvm.describe import Description
    from narrows.ir.program import Program

SEARCHES = ("rules", "metaschedule")


@dataclass(frozen=True)
class TvmTarget(Target):
    """Lowers a program to a shared library of TVM, for one batch size.

    Attributes:
        device: What it runs on; see `narrows.backends.tvm.devices`.
        mcpu: A processor as LLVM names it, or an architecture of CUDA; empty for this CPU, or for
            the device's default.
        batch: The batch size where the program leaves it free.
        tune: Seconds that timing candidates on this CPU may take, or a time: ``"600s"``,
            ``"10m"``; 0 takes a fixed choice.
        search: Where kernels' candidates come from: our own ``rules``, or ``metaschedule``, which
            spends the rest of the time on TVM's own search, too, and wants a tune of 10m or more.
        importer: ``narrows``, or ``tvm`` for the importer that TVM brings along, which knows
            other operators but makes slow code.
        check: Whether the library is held to the program, where it can run here.
        samples: How many inputs the check tries.
    """

    name: ClassVar[str] = "tvm"
    summary: ClassVar[str] = "a shared library through TVM, for CPUs, GPUs and other machines"

    device: str = "llvm"
    mcpu: str = ""
    batch: int = 1
    tune: int | str = option(
        120, meta={KINDS: (int, str)}, metavar="TIME", read=whole_or_text, off=0
    )
    search: str = option("rules", choices=SEARCHES)
    importer: str = "narrows"
    check: bool = True
    samples: int = 2

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise UsageError(
                f"tvm has no device {self.device!r}",
                why=f"its devices are: {', '.join(DEVICES)}",
                hint=suggest(self.device, DEVICES),
            )
        if self.importer not in ("narrows", "tvm"):
            raise UsageError(f"tvm takes the importer narrows or tvm, got {self.importer!r}")
        found = {"batch": self.batch, "tune": self.seconds, "samples": self.samples}
        for (key, value), least in zip(found.items(), (1, 0, 1), strict=True):
            if value < least:
                raise UsageError(f"tvm takes a {key} of {least} or more, got {value}")
        self._refuse_search()

    def _refuse_search(self) -> None:
        """Raise if the option ``search`` has no meaning, or no effect."""
        if self.search not in SEARCHES:
            raise UsageError(
                f"tvm takes the search {' or '.join(SEARCHES)}, got {self.search!r}",
                hint=suggest(self.search, SEARCHES),
            )
        if self.search == "rules":
            return
        if not DEVICES[self.device].runs_here:
            why = f"candidates are timed here, and code for {self.device} runs elsewhere"
        elif not self.seconds:
            why = "tune=0 times no candidates"
        else:
            return
        raise UsageError(f"search={self.search} would have no effect", why=why)

    @property
    def seconds(self) -> float:
        """The time for candidates."""
        if not isinstance(self.tune, str):
            return self.tune
        seconds = seconds_of(self.tune)
        if seconds is None:
            raise UsageError(
                f"tune={self.tune!r} is no time",
                hint="120 is a number of seconds; '600s', '10m' and '2h' are times",
            )
        return seconds

    @classmethod
    def available(cls) -> str | None:
        """Return what is missing or wrong, or ``None``."""
        return problem() or None

    @classmethod
    def variants(cls) -> list[Variant]:
        """Return one row per device."""
        reason = problem()
        return [_variant(device, reason) for device in DEVICES.values()]

    def write(self, pair: Pair, plan_json: Any = None) -> Written:
        """Return the program as a TVM artifact; see `Target.write`."""
        from narrows.backends import integers
        from narrows.backends.compare import FLAT, Wanted, draw_inputs
        from narrows.backends.leaves import Leaves
        from narrows.backends.manifest import add_note, new_manifest
        from narrows.backends.tvm.check import check
        from narrows.backends.tvm.compiler import compile_in_child
        from narrows.backends.tvm.describe import describe
        from narrows.backends.tvm.stock import EXPORTED, export

        device, program = DEVICES[self.device], pair.lowered
        leaves = Leaves.of(program)
        integers.refuse_fake(program)
        integers.refuse_wide(program, self.name)
        whole = integers.is_integer(program)
        if whole and self.importer != "narrows":
            raise LowerError(
                f"the importer of TVM has no form for the integers of {program.name}",
                hint="leave the option importer out",
            )
        # What islands give comes out, too: only then can be told what follows from it.
        islands = integers.float_islands(program) if whole else []
        batch = self.batch if program.dynamic_batch else None
        examples = draw_inputs(program, batch, None)
        wanted = [*leaves.computed, *islands]
        description = describe(program, examples, wanted)
        inputs, outputs = _specs(description)
        count = len(leaves.computed)
        outputs, shown = outputs[:count], outputs[count:]
        manifest = new_manifest(self, program, leaves, inputs, outputs, plan_json, WANTED)
        folder = scratch()
        artifact = Artifact.owning(folder, manifest)  # from here on the folder goes with it

        def prepare(job: Path) -> None:
            if self.importer == "tvm":
                export(program, examples, wanted, job / EXPORTED)

        made = compile_in_child(description, self._options(), folder, _tell, prepare)
        _raise_refusal(made, program, self)
        manifest["files"] = describe_files(folder, made.pop("files"))
        manifest["device"] = {
            "name": device.name,
            "runs_on": "cuda" if device.kind == "cuda" else "cpu",
            "runs_here": device.runs_here,
        }
        manifest["build"] = made
        manifest["islands"] = shown
        if made.get("unscheduled"):
            slow = f"{len(made['unscheduled'])} of {made['kernels']} kernels"
            message = f"{slow} have no schedule and may be slow"
            add_note(manifest, "schedule", made["unscheduled"][0], message)
        for name, why in made.get("search", {}).get("failed", {}).items():
            add_note(manifest, "search", name, f"kept the schedule of the rules: {why}")
        where = program.output.name
        if not (device.runs_here and made["linked"]):
            why = (
                f"code for {device.name} was not run: this machine cannot, or has no linker for it"
            )
            add_note(manifest, "check", where, why)
            return Written(artifact)
        if not self.check:
            return Written(artifact)
        if whole:
            integers.add_golden(artifact, pair.reference)
        outcome = Wanted.of(pair.reference, (batch,), self.samples)
        flat: Any = pair.reference.output.args[0]
        exact = [whole and not integers.ends_in_floats(node) for node in flat]

        def complete(again: Callable[[], Pair]) -> None:
            manifest["fidelity"] = check(artifact, outcome, again, exact)
            if outcome.flat:
                add_note(manifest, "check", where, FLAT)

        return Written(artifact, complete)

    def _options(self) -> dict[str, Any]:
        from narrows.backends.tvm.cache import folder

        return {
            "device": self.device,
            "mcpu": self.mcpu,
            "importer": self.importer,
            "tune": self.seconds,
            "search": self.search,
            "cache": str(folder()),
        }


def _variant(device: Device, reason: str) -> Variant:
    linker = find_linker(device.linkers)
    needs = f"apache-tvm; {device.linkers[0]}"
    where = reason or ("" if linker else f"object files only: there is no {device.linkers[0]}")
    checked = "run against the program" if device.runs_here else "compiled, not run"
    runs = not reason and (device.runs_here or (device.kind == "cuda" and _runs_cuda()))
    where = where or ("" if runs else _elsewhere(device))
    return Variant(f"tvm:{device.name}", needs, where, device.summary, checked, not reason, runs)


def _runs_cuda() -> bool:
    """Whether there is a GPU, and this TVM knows how to use it; it is slow to ask."""
    if not has_gpu():
        return False
    import tvm

    return bool(tvm.device("cuda", 0).exist)


def _elsewhere(device: Device) -> str:
    if device.kind == "cuda":
        return "compiled here, not run: there is no NVIDIA GPU that TVM can use"
    return "compiled here, and run elsewhere"


def _tell(line: str) -> None:
    if sys.stderr.isatty():
        print(line, file=sys.stderr)


def _specs(description: Description) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return name, shape and dtype of what goes in and comes out."""
    graph = description.graph
    known = {n["name"]: n for n in (*graph["inputs"], *graph["nodes"])}
    for name, array in description.weights.items():
        known[name] = {"shape": list(array.shape), "dtype": array.dtype.name}
    keys = ("shape", "dtype")
    outputs = [
        {"name": node.name, **{k: known[name][k] for k in keys}}
        for node, name in zip(description.outputs, graph["outputs"], strict=True)
    ]
    return [{k: spec[k] for k in ("name", *keys)} for spec in graph["inputs"]], outputs


def _raise_refusal(made: dict[str, Any], program: Program, target: TvmTarget) -> None:
    """Raise what the compiler had to say against the program."""
    from narrows.ir.meta import where

    nodes = {node.name: node for node in program.graph.nodes}
    if "missing" in made:
        found = made["missing"]
        lines = [
            f"{op} ({len(names)}x), first at {where(nodes[names[0]])}"
            for op, names in sorted(found.items())
        ]
        raise LowerError(
            f"the tvm target has no rule for {len(found)} operators of {program.name}: "
            f"{', '.join(sorted(found))}",
            where="; ".join(lines),
            hint="target onnx, or replace them before capturing",
        )
    if "node" in made:
        raise LowerError(
            f"the tvm target cannot lower {made['node']}",
            where=where(nodes[made["node"]]) if made["node"] in nodes else made["node"],
            why=made["why"],
        )
    if "failed" in made:
        raise LowerError(
            f"TVM cannot compile for {target.device}", why=made["failed"], hint=made["hint"]
        )
