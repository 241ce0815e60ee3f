"""`CTarget`: integer program -> steps -> an arena -> C files -> compiled and compared.

torch is imported when the target is used, not when it is looked up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from narrows.backends.artifact import Artifact
from narrows.backends.base import Pair, Target, Variant, Written
from narrows.backends.c.compiler import HINT, MISSING, find_compiler
from narrows.backends.store import describe_files
from narrows.errors import ArtifactError, LowerError, UsageError
from narrows.files.folders import scratch
from narrows.files.quoting import C_LONGEST, is_prefix

if TYPE_CHECKING:
    from narrows.backends.c.lower import Arena, Drawn, Port
    from narrows.backends.compare import Wanted
    from narrows.ir.program import Program

PIECE = 1 << 20  # letters of a file that are written at a time

UNITS = {"": 1, "B": 1, "K": 1 << 10, "KB": 1 << 10, "KIB": 1 << 10, "M": 1 << 20, "MB": 1 << 20,
         "MIB": 1 << 20}  # fmt: skip


@dataclass(frozen=True)
class CTarget(Target):
    """Writes an integer program as C, for one batch size.

    Attributes:
        batch: The batch size where the program leaves it free.
        ram: The largest arena allowed, such as ``256K``; empty for any.
        prefix: What the names in the header begin with, so that models can stand side by side.
        vectors: How many vectors the self-test holds; 0 for up to 8, fewer where they are large.
        check: Whether the code is compiled here and held to the program.
        samples: How many inputs the check tries.
    """

    name: ClassVar[str] = "c"
    summary: ClassVar[str] = "one C file for machines without anything else, for integer programs"

    batch: int = 1
    ram: str = ""
    prefix: str = "narrows"
    vectors: int = 0
    check: bool = True
    samples: int = 2

    def __post_init__(self) -> None:
        for key, least in (("batch", 1), ("samples", 1), ("vectors", 0)):
            if getattr(self, key) < least:
                raise UsageError(f"c takes a {key} of {least} or more, got {getattr(self, key)}")
        if not is_prefix(self.prefix):
            raise UsageError(
                f"c takes a prefix that is a name in C, of up to {C_LONGEST} letters, got "
                f"{self.prefix!r:.60}"
            )
        parse_size(self.ram)

    @classmethod
    def available(cls) -> str | None:
        """Return ``None``: writing C needs nothing; a compiler is needed to check and to run."""
        return None

    @classmethod
    def variants(cls) -> list[Variant]:
        """Return the one row of this target."""
        missing = "" if find_compiler() else f"written, not run: {MISSING}; {HINT}"
        checked = "compiled and run against the program, =="
        supports = "microcontrollers: integer programs, one batch size"
        needs = "a C compiler to check and run"
        return [Variant(cls.name, needs, missing, supports, checked, True, not missing)]

    def write(self, pair: Pair, plan_json: Any = None) -> Written:
        """Return the program as C files; see `Target.write`."""
        from narrows.backends import integers
        from narrows.backends.c import files, header, lower, source
        from narrows.backends.c.runner import runner
        from narrows.backends.compare import Wanted, draw_inputs
        from narrows.backends.leaves import Leaves
        from narrows.backends.manifest import add_note, new_manifest

        program = pair.lowered
        integers.refuse_fake(program)
        if not integers.is_integer(program):
            raise LowerError(
                f"{program.name} is floating-point, and the c target writes integer programs",
                hint="narrows.quantize(program, [images]).program, or narrows compile --quantize",
            )
        leaves = Leaves.of(program)
        batch = self.batch if program.dynamic_batch else None
        if batch is None and self.batch != 1:
            raise LowerError(
                f"c{{batch={self.batch}}} would have no effect",
                why=f"{program.name} was captured with the batch size of its example",
                hint="leave it out, or capture with dynamic_batch=True",
            )
        drawn = lower.draw(program, draw_inputs(program, batch, None), leaves.computed)
        arena = lower.plan(drawn.sketch)
        _refuse_size(arena, parse_size(self.ram), self.ram)
        inputs, outputs = ([_spec(p) for p in side] for side in (drawn.inputs, drawn.outputs))
        manifest = new_manifest(self, program, leaves, inputs, outputs, plan_json, ["torch"])
        manifest["c"] = {
            "inputs": [p.to_json() for p in drawn.inputs],
            "outputs": [p.to_json() for p in drawn.outputs],
            "arena": arena.placement.size,
            "bound": arena.placement.bound,
            "constants": files.rom_total(drawn),
            "macs": files.macs_total(drawn),
        }
        folder = scratch()
        artifact = Artifact.owning(folder, manifest)  # from here on the folder goes with it
        count = self.vectors or files.vector_count(drawn)
        texts: dict[str, Callable[[], str]] = {  # one in memory at a time: weights are long as text
            files.MODEL: lambda: source.model_c(drawn, arena, self.prefix),
            files.HEADER: lambda: header.model_h(drawn, arena, self.prefix),
            files.RUNNER: lambda: runner(drawn.inputs, drawn.outputs, self.prefix),
            files.TEST: lambda: files.test(drawn, self.prefix),
            files.VECTORS: lambda: files.vectors(drawn, _vectors(program, drawn, batch, count)),
            files.MAKEFILE: lambda: files.MAKE,
            files.REPORT: lambda: files.report(drawn, arena),
        }
        for name, text in texts.items():
            _write(text(), folder / name)
        manifest["files"] = describe_files(folder, list(texts))
        integers.add_golden(artifact, pair.reference)
        where = program.output.name
        if program.dynamic_batch:
            add_note(manifest, "batch", where, f"the C code is for a batch of {self.batch}")
        add_note(manifest, "memory", where, files.memory_text(arena))
        add_note(manifest, "memory", where,
                 f"constants {manifest['c']['constants']:,} bytes, "
                 f"{manifest['c']['macs']:,} multiply-adds")  # fmt: skip
        if not self.check:
            return Written(artifact)
        if not find_compiler():
            add_note(manifest, "check", where, f"the C code was not run: {MISSING}; {HINT}")
            return Written(artifact)
        wanted = Wanted.of(pair.reference, (batch,), self.samples)

        def complete(again: Callable[[], Pair]) -> None:
            manifest["fidelity"] = _check(artifact, wanted)

        return Written(artifact, complete)


def _write(text: str, path: Path) -> None:
    """Write a file piece by piece, without a copy of it as bytes."""
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, len(text), PIECE):
            file.write(text[start : start + PIECE])


def parse_size(text: str) -> int | None:
    """Return the bytes that ``256K`` says, ``None`` for no text; `UsageError` if it says none."""
    if not text:
        return None
    found = re.fullmatch(r"(\d+) ?([A-Za-z]*)", text)
    if not found or found[2].upper() not in UNITS:
        raise UsageError(f"c takes a ram such as 64K, 1M or 65536B, got {text!r}")
    return int(found[1]) * UNITS[found[2].upper()]


def _refuse_size(arena: Arena, limit: int | None, text: str) -> None:
    placed = arena.placement
    if limit is None or placed.size <= limit:
        return
    live = ", ".join(f"{b.name} ({b.size:,})" for b in placed.peak)
    raise LowerError(
        f"the arena takes {placed.size:,} bytes, and ram={text} allows {limit:,}",
        where=f"the bytes that are live at the peak, {placed.bound:,}: {live}",
        hint="prune the layers that make these tensors, or take smaller inputs",
    )


def _spec(port: Port) -> dict[str, Any]:
    return {"name": port.node.name, "shape": list(port.shape), "dtype": port.dtype}


def _vectors(program: Program, drawn: Drawn, batch: int | None, count: int) -> list[list[Any]]:
    """Return codes of ``count`` inputs and of what the interpreter gives for them."""
    import torch

    from narrows.backends.c.session import codes_of, steps_of
    from narrows.backends.compare import draw_inputs

    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        inputs = draw_inputs(program, batch, generator if i else None)
        with torch.no_grad():
            results = program.run_flat(inputs)
        flat: Any = program.output.args[0]
        found = dict(zip(flat, results, strict=True))
        vector = []
        for port, value in _given(program, drawn.inputs, inputs):
            array = value.numpy()
            if port.dtype.startswith("float"):
                grid = port.to_json()["codes"]
                array = codes_of(array, grid, port.rounding)
            vector.append(array.transpose(port.order))
        for port in drawn.outputs:
            array = found[port.node].numpy()
            if port.dtype.startswith("float") and port.grid is not None:
                told = port.to_json()
                array = codes_of(array / steps_of(told, array.ndim), told["codes"], "half_even")
            vector.append(array.transpose(port.order))
        made.append(vector)
    return made


def _given(program: Program, ports: Sequence[Port], inputs: Sequence[Any]) -> list[tuple[Any, Any]]:
    values = dict(zip(program.placeholders, inputs, strict=True))
    return [(port, values[port.node]) for port in ports]


def _check(artifact: Artifact, wanted: Wanted) -> dict[str, Any]:
    """Run the compiled code: every output has to be equal to the program's."""
    from narrows.backends.compare import output_error

    for case in wanted.cases:
        for optimize in (True, False):
            try:
                actual = artifact.run_flat(case.inputs, optimize=optimize)
            except ArtifactError as error:
                raise LowerError(
                    "the C code cannot be checked", why=f"{error.what}: {error.why}",
                    hint="report this with the model; check=False lowers without the check",
                ) from error  # fmt: skip
            for name, got, expected in zip(wanted.names, actual, case.outputs, strict=True):
                if output_error(got, expected) != 0.0:
                    raise LowerError(
                        f"output {name} of the C code differs from the program",
                        where=name,
                        hint="report this with the model; check=False lowers without the check",
                    )
    return wanted.report([0.0] * len(wanted.cases), 0.0)
